"""`gemm: fp16acc`: what it changes, by how much, where it is on, and when it is refused."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from random_bases import (
    ADAPTERS,
    BASES,
    CPU,
    SHAPE,
    documents,
    pairs,
    random_model,
)
from torch.nn.functional import logsigmoid
from transformers import MistralConfig
from zephyr_kernels import fp16acc, reference

from zephyr_lite.data.layout import Layout
from zephyr_lite.errors import MachineError
from zephyr_lite.model import gemm_probe, projections
from zephyr_lite.model.engines import choose_gemm, make_engine
from zephyr_lite.model.frozen_weights import FrozenWeight, Gemm
from zephyr_lite.model.gemm_probe import Product, measure, refusal, total_gain
from zephyr_lite.model.native import NativeEngine
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Memory

ACTIVE = ("sft", "dpo")
# All but the frozen products is fp32 here, and all is bf16 in the yardstick. Seen: 0.1 to 0.15.
TIMES_BF16 = 0.3


def policy_by(
    gemm: Gemm,
    dtype: torch.dtype = torch.float32,
    checkpointing: str = "none",
    base: Callable = BASES["mistral"],
) -> Policy:
    model = random_model(base(), ADAPTERS, ACTIVE, "dpo")
    memory = Memory.model_validate({"head_rows": 16, "checkpointing": checkpointing})
    policy = make_policy(model, dtype, CPU, memory, gemm=gemm, self_test=False)
    policy.use(ACTIVE, "dpo")
    return policy


def fresh(policy: Policy) -> Policy:
    """As before the first step of dDPO."""
    for name, parameter in policy.model.named_parameters():
        if "lora_B.dpo" in name:
            parameter.data.zero_()
    return policy


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def trained(policy: Policy, layout: Layout) -> Result:
    """Log-probs of training, and every gradient of a random projection of them."""
    logp_N = policy.log_probs(layout, training=True)
    weight_N = torch.randn(len(logp_N), generator=torch.Generator().manual_seed(3))
    named = policy.trainable()
    grads = torch.autograd.grad(logp_N @ weight_N, list(named.values()))
    return logp_N.detach(), dict(zip(named, grads, strict=True))


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# ---------------------------------------------------------------- how far off


@pytest.mark.parametrize("name", list(BASES))
def test_training_is_less_far_off_than_in_bf16(name: str) -> None:
    """Against the same model in fp32: log-probs by token, gradients by tensor."""
    layout = pairs((9, 4, 12), (30, 1, 2), (3, 60, 5), (60, 40, 30))
    exact, ours, bf16 = (
        trained(policy_by(gemm, dtype, base=BASES[name]), layout)
        for gemm, dtype in (
            ("exact", torch.float32),
            ("fp16acc", torch.float32),
            ("exact", torch.bfloat16),
        )
    )
    error, yardstick = rms(ours[0] - exact[0]), rms(bf16[0] - exact[0])
    assert 1e-5 < error < TIMES_BF16 * yardstick
    for key, gradient in exact[1].items():
        cosine = torch.cosine_similarity(gradient.flatten(), ours[1][key].flatten(), 0)
        assert 1 - cosine < 1e-4, key
        far, own = ((x[1][key] - gradient).norm() for x in (ours, bf16))
        assert 0 < far < TIMES_BF16 * own, key


def test_what_a_layer_keeps_changes_no_bit() -> None:
    layout = documents(12, 3, 40, 9)
    kept, *others = (
        trained(policy_by("fp16acc", checkpointing=saved), layout)
        for saved in ("none", "full", "offload")
    )
    for other in others:
        assert torch.equal(other[0], kept[0])
        assert all(torch.equal(other[1][key], kept[1][key]) for key in kept[1])


def test_frozen_products_and_no_others_are_computed_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and dX of every group; the last layer's q apart; nobody wants the first one's dX."""
    policy = policy_by("fp16acc")
    layers = policy.engine.layers  # type: ignore[attr-defined]
    widths = {group.frozen.shape for layer in layers for group in layer.groups}
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = fp16acc.product

    def spy(x_TK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
        seen.append((x_TK, weight_KN))
        return plain(x_TK, weight_KN)

    monkeypatch.setattr(projections.fp16acc, "product", spy)
    logp_N = policy.log_probs(pairs((9, 4, 12), (20, 9, 5)), training=True)
    assert len(seen) == 4 * len(layers) + 1
    logp_N.sum().backward()
    assert len(seen) == 2 * (4 * len(layers) + 1) - 1
    assert {weight.dtype for _, weight in seen} == {torch.float16}
    wide = {tuple(sorted(w.shape)) for _, w in seen if tuple(w.shape)[::-1] in widths}
    assert wide == {tuple(sorted(shape)) for shape in widths}
    assert {x.dtype for x, _ in seen} == {torch.float32}


# ---------------------------------------------------------------- where it is on


@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
def test_step_0_is_ln_2_when_the_reference_is_computed_as_it_trains(checkpointing: str) -> None:
    for sizes in ([(1, 1, 1)], [(7, 3, 5), (1, 9, 1)], [(61, 17, 30), (5, 1, 2)]):
        layout, policy = pairs(*sizes), fresh(policy_by("fp16acc", checkpointing=checkpointing))
        ours = policy.sequence_log_probs(layout, training=True).detach()
        policy.use(["sft"])
        with policy.as_trained():
            reference_S = policy.sequence_log_probs(layout)
        won = (ours - reference_S).double().view(-1, 2)
        loss = -logsigmoid(won[:, 0] - won[:, 1]).mean().item()
        assert loss == pytest.approx(math.log(2), abs=1e-12)
        assert torch.equal(ours, reference_S)
        assert not torch.equal(policy.sequence_log_probs(layout), ours), "an exact one is another"


def test_what_is_measured_is_exact_before_and_after_training() -> None:
    layout, policy, exact = pairs((9, 4, 12)), policy_by("fp16acc"), policy_by("exact")
    truth_N, ids = exact.log_probs(layout), [3, 5, 8, 13]
    steps = exact.next_token_log_probs(ids)
    for _ in range(2):
        assert torch.equal(policy.log_probs(layout), truth_N)
        assert torch.equal(policy.next_token_log_probs(ids), steps)
        with policy.as_trained():
            in_block = policy.log_probs(layout)
            assert torch.equal(policy.next_token_log_probs(ids), steps), "an export's check"
        logp_N = policy.log_probs(layout, training=True)
        assert torch.equal(in_block, logp_N.detach()) and not torch.equal(in_block, truth_N)
        logp_N.sum().backward()


def test_a_block_ends_whatever_happens_in_it() -> None:
    layout, policy = pairs((9, 4, 12)), policy_by("fp16acc")
    truth_N = policy.log_probs(layout)
    with pytest.raises(KeyError), policy.as_trained(), policy.as_trained():
        raise KeyError
    assert torch.equal(policy.log_probs(layout), truth_N)


def test_a_backward_is_by_the_products_of_its_forward() -> None:
    """An evaluation between the two, as nobody does it, changes nothing."""
    layout = documents(12, 9)
    expected = trained(policy_by("fp16acc", checkpointing="full"), layout)[1]
    policy = policy_by("fp16acc", checkpointing="full")
    logp_N = policy.log_probs(layout, training=True)
    policy.log_probs(layout)
    weight_N = torch.randn(len(logp_N), generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(logp_N @ weight_N, list(policy.trainable().values()))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected.values(), strict=True))


def test_the_self_test_is_of_the_exact_engine() -> None:
    model = random_model(BASES["mistral"](), {}, (), None)
    errors = [
        NativeEngine(model, torch.float32, gemm=g).self_test(CPU) for g in ("exact", "fp16acc")
    ]
    assert errors[0] == errors[1] < 1e-5


# ---------------------------------------------------------------- refused before anything runs


@pytest.mark.parametrize("engine", ["hf", "unsloth"])
def test_an_engine_that_does_not_compute_it_is_named(engine: str) -> None:
    with pytest.raises(MachineError, match=f"gemm: fp16acc: engine {engine} does not") as found:
        choose_gemm("fp16acc", engine, torch.device("cuda"))
    assert found.value.hint == "set gemm=exact"
    assert choose_gemm("exact", engine, CPU) == "exact"


def test_an_hf_engine_is_not_made_with_it() -> None:
    model = random_model(BASES["mistral"](), {}, (), None)
    with pytest.raises(MachineError, match="gemm: fp16acc: engine hf does not"):
        make_engine("hf", model, torch.float32, "none", "fp16acc")


def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(MachineError, match="gemm: fp16acc: it needs a GPU") as found:
        choose_gemm("fp16acc", "native", CPU)
    assert found.value.hint == "set gemm=exact"
    assert choose_gemm("fp16acc", "native", torch.device("cuda")) == "fp16acc"


@pytest.mark.parametrize("value", [1e5, -1e5, math.nan])
def test_a_weight_beyond_fp16_is_refused(value: float) -> None:
    model = random_model(BASES["mistral"](), {}, (), None)
    model.model.layers[2].mlp.up_proj.weight.data[3, 5] = value
    with pytest.raises(MachineError, match=r"a frozen weight of magnitude (1e.05|nan) is beyond"):
        NativeEngine(model, torch.float32, gemm="fp16acc")
    NativeEngine(model, torch.float32)


# ---------------------------------------------------------------- the probe

GOOD = Product("qkv", 4096, 4096, 6144, 1.5, 1.0, 3e-3, 4e-3)


def but(**changes: Any) -> list[Product]:
    return [GOOD, dataclasses.replace(GOOD, name="down dX", inputs=14336, **changes)]


@pytest.mark.parametrize(
    ("products", "reason"),
    [
        (but(), None),
        (but(fp16acc_error=6e-3), None),
        (but(fp16acc_error=6.1e-3), "error of down dX, 4096 x 14336 x 6144, is 6.10e-03, more than "
                                    "2 times the 3.00e-03 of the exact product"),
        (but(fp16acc_error=math.nan), "is nan, more than 2 times"),
        (but(fp16acc_error=math.inf), "is inf, more than 2 times"),
        (but(exact_ms=0.9), None),  # 1.2 together
        (but(exact_ms=0.8), "1.15 times as fast as exact ones, less than 1.2; the slowest is "
                            "down dX, 4096 x 14336 x 6144: 1 ms, exact 0.8 ms"),
        (but(exact_ms=9.0), None),
    ],
)  # fmt: skip
def test_what_was_measured_decides(products: list[Product], reason: str | None) -> None:
    found = refusal(products)
    assert found is None if reason is None else reason in str(found)


def test_the_gain_is_that_of_the_sum() -> None:
    assert total_gain(but(exact_ms=4.5, fp16acc_ms=2.0)) == pytest.approx(2.0)


def race(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Once each, by the clock on the wall."""
    found = []
    for call in calls:
        began = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - began))
    return found


def a_layer(dtype: torch.dtype = torch.bfloat16) -> Any:
    wide = {**SHAPE, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 1}
    return NativeEngine(random_model(MistralConfig(**wide), {}, (), None), dtype).layers[0]


def test_every_product_of_a_layer_is_measured() -> None:
    products = list(measure(a_layer(), 70, race))
    assert [(p.name, p.inputs, p.outputs) for p in products] == [
        ("qkv", 256, 96), ("qkv dX", 96, 256), ("o", 64, 256), ("o dX", 256, 64),
        ("gate_up", 256, 1280), ("gate_up dX", 1280, 256),
        ("down", 640, 256), ("down dX", 256, 640),
    ]  # fmt: skip
    assert {p.tokens for p in products} == {70} and all(p.exact_ms > 0 for p in products)
    for p in products:
        assert 1e-3 < p.exact_error < 6e-3, "bf16's own"
        assert 5e-4 < p.fp16acc_error < 2 * p.exact_error, p.name


def _truncating(x_TK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    """A unit that rounds its sums towards zero."""
    total_TN = x_TK.new_zeros(len(x_TK), weight_KN.shape[1])
    for x_TC, weight_CN in zip(x_TK.split(16, 1), weight_KN.split(16), strict=True):
        exact_TN = total_TN.double() + x_TC.double() @ weight_CN.double()
        total_TN = exact_TN.half()
        beyond_TN = total_TN.double().abs() > exact_TN.abs()
        total_TN = (total_TN.view(torch.int16) - beyond_TN.short()).view(torch.float16)
    return total_TN


def test_a_unit_that_truncates_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "mm_fp16_sums", _truncating)
    reason = refusal(list(measure(a_layer(), 70, race)))
    assert reason is not None and "the relative error of" in reason


def test_a_compute_dtype_that_is_finer_than_bf16_is_not_traded_in() -> None:
    """Where exact means fp32, fp16 sums are a hundred times as wrong."""
    assert "the relative error of qkv" in str(
        refusal(list(measure(a_layer(torch.float32), 70, race)))
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_card_gets_an_answer() -> None:
    wide = {**SHAPE, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 1}
    model = random_model(MistralConfig(**wide), {}, (), None).to("cuda")
    engine = NativeEngine(model, torch.bfloat16, gemm="fp16acc")
    try:
        assert gemm_probe.probe(engine, 2048)["gain"] >= gemm_probe.LEAST_GAIN
    except MachineError as refused:
        assert "refused on this GPU" in str(refused)


# ---------------------------------------------------------------- the scratch


def test_a_plain_weight_is_cast_and_its_modules_stay_as_they_are() -> None:
    linears = [torch.nn.Linear(12, 8 + i, bias=False).requires_grad_(False) for i in range(2)]
    frozen = FrozenWeight(linears, torch.float32)
    exact = frozen.weight()
    halves = frozen.weight("fp16acc")
    assert halves.dtype == torch.float16 and torch.equal(halves, exact.half())
    assert frozen.weight().data_ptr() == exact.data_ptr() == linears[0].weight.data_ptr()
    assert frozen.weight("fp16acc").data_ptr() == halves.data_ptr()
