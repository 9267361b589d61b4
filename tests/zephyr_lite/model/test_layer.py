"""The layer's own forward and backward against plain composition under autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from layer_truth import layer_output, relative, turns
from random_bases import random_model, with_border
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config
from zephyr_kernels import reference

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.model import group
from zephyr_lite.model import layer as layer_module
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.layer import Call, Layer, Saved, run
from zephyr_lite.model.native import NativeEngine

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 1,
    "head_dim": 6, "initializer_range": 0.15, "max_position_embeddings": 64,
}  # fmt: skip
LIMIT_FP32, LIMIT_FP64 = 1e-6, 1e-10
POLICIES: tuple[Saved, ...] = ("keep", "lean", "offload")
SEED = 77

BOTH = {"sft": {"r": 4}, "dpo": {"lora_dropout": 0.3}}
UNLIKE = {"rank_pattern": {"q_proj": 1, "k_proj": 5, "down_proj": 2, "gate_proj": 7}}


@dataclass(frozen=True)
class Case:
    """One geometry, one stack of adapters, one layout; `trimmed` as the last layer runs."""

    heads: tuple[int, int] = (4, 2)
    adapters: dict[str, dict[str, Any]] = field(default_factory=lambda: {"dpo": {}})
    active: tuple[str, ...] = ("dpo",)
    trains: str | None = "dpo"
    pairs: bool = False
    trimmed: bool = False
    is_first: bool = False
    config: type[PreTrainedConfig] = MistralConfig

    def model(self, dtype: torch.dtype) -> Any:
        heads = {"num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1]}
        config = self.config(**SHAPE, **heads)
        return random_model(config, self.adapters, self.active, self.trains, dtype)

    def layout(self) -> Layout:
        rng = np.random.default_rng(0)
        if self.pairs:
            sizes = [(5, 4, 3), (1, 1, 1), (6, 2, 9)]
            return pair_layout([EncodedPair(*(rng.integers(0, 32, n) for n in s)) for s in sizes])
        documents = [(rng.integers(0, 32, n), np.arange(n) > 3) for n in (7, 1, 12, 7)]
        return document_layout(documents, loss_on="assistant")


STACKED = Case(adapters=BOTH, active=("sft", "dpo"))
CASES = {
    "gqa 8/2": Case(heads=(8, 2)),
    "mha": Case(heads=(4, 4)),
    "mqa": Case(heads=(4, 1)),
    "pairs": Case(pairs=True),
    "trimmed documents": Case(trimmed=True),
    "trimmed pairs": Case(trimmed=True, pairs=True, adapters=BOTH, active=("sft", "dpo")),
    "stacked": STACKED,
    "inactive": Case(adapters=BOTH, active=("sft",), trains="sft"),
    "frozen only": Case(adapters=BOTH, active=("sft",), trains=None),
    "some linears": Case(adapters={"dpo": {"target_modules": ["k_proj", "o_proj", "up_proj"]}}),
    "queries only": Case(adapters={"dpo": {"target_modules": ["q_proj"]}}),
    "values only": Case(adapters={"dpo": {"target_modules": ["v_proj"]}}, trimmed=True),
    "unlike linears": Case(
        adapters={"sft": {"target_modules": ["q_proj", "v_proj"]}, "dpo": UNLIKE},
        active=("sft", "dpo"),
    ),
    "unlike ranks": Case(adapters={"dpo": UNLIKE}, trimmed=True),
    "no adapters": Case(adapters={}, active=(), trains=None),
    "no adapters, trimmed": Case(adapters={}, active=(), trains=None, trimmed=True, pairs=True),
    "all off": Case(adapters=BOTH, active=(), trains=None),
    "first layer": Case(is_first=True, adapters=BOTH, active=("sft", "dpo")),
    "only layer": Case(is_first=True, trimmed=True, pairs=True),
    "biases": Case(config=Qwen2Config, adapters=BOTH, active=("sft", "dpo")),
    "biases, trimmed": Case(config=Qwen2Config, heads=(6, 3), trimmed=True, pairs=True),
    "normed heads": Case(config=Qwen3Config, adapters=BOTH, active=("sft", "dpo")),
    "normed heads, mqa": Case(config=Qwen3Config, heads=(4, 1), pairs=True, is_first=True),
    "normed heads, trimmed": Case(config=Qwen3Config, heads=(6, 3), trimmed=True, pairs=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
Result = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What is allocated and not written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[False, True], ids=["as held", "bordered"])
def border(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Adapters apart from the weights, or in a border around them, as around dequantised ones."""
    if request.param:
        with_border(monkeypatch)
    return request.param


def random_like(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call_of(case: Case, dtype: torch.dtype, saved: Saved, seed: int | None = None) -> Call:
    layout = case.layout()
    moved = to_device(layout, CPU)
    cos_TP, sin_TP = turns(layout, SHAPE["head_dim"], dtype)
    plan, rows_U = moved.plan, None
    if case.trimmed:
        assert moved.last is not None and len(moved.last.rows_U) < layout.n_tokens
        plan, rows_U = moved.last.plan, moved.last.rows_U
    return Call(plan, cos_TP, sin_TP, SHAPE["head_dim"] ** -0.5, saved, rows_U, seed)


def differentiate(y: torch.Tensor, x: torch.Tensor, model: Any) -> Result:
    """Output and the gradients of a random projection of it, by name."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if x.requires_grad:
        named["x"] = x
    if not named:
        return {"y": y.detach()}
    grads = torch.autograd.grad(y, list(named.values()), random_like(y.shape, 2, y.dtype))
    return {"y": y.detach(), **dict(zip(named, grads, strict=True))}


def ours(case: Case, dtype: torch.dtype, saved: Saved, seed: int | None = None) -> Result:
    model = case.model(dtype)
    layer = NativeEngine(model, dtype).layers[0]
    x = random_like((case.layout().n_tokens, 40), 1, dtype).requires_grad_(not case.is_first)
    return differentiate(run(x, layer, call_of(case, dtype, saved, seed)), x, model)


def composed(case: Case, dtype: torch.dtype, seed: int | None = None) -> Result:
    model, layout = case.model(dtype), case.layout()
    decoder_layer = NativeEngine(model, dtype).decoder.layers[0]
    rows_U = call_of(case, dtype, "keep").rows_U
    factors = {} if seed is None else dropout_factors(model, dtype, layout.n_tokens, rows_U, seed)
    x = random_like((layout.n_tokens, 40), 1, dtype).requires_grad_(not case.is_first)
    y = layer_output(decoder_layer, x, layout, factors)
    return differentiate(y if rows_U is None else y[rows_U], x, model)


def dropout_factors(
    model: Any, dtype: torch.dtype, tokens: int, rows_U: torch.Tensor | None, seed: int
) -> dict[Any, torch.Tensor]:
    """What each A of `dpo` sees its input multiplied with, from the spans that are drawn for it.

    Behind the attention a mask is drawn for the rows that are computed; the others' are not read.
    """
    factors = {}
    for number, part in enumerate(NativeEngine(model, dtype).layers[0].groups):
        rows = torch.arange(tokens) if rows_U is None or number == 0 else rows_U
        spans = iter(part.outline(seed + 8 * number).stack().spans)
        for module in part.modules:
            a_RD = module.lora_A["dpo"].weight
            start, stop, drop = next(spans)
            assert stop - start == len(a_RD), "a span is one adapter's ranks"
            mask = reference.dropout_mask(drop.seed, drop.rate, len(rows), a_RD.shape[1], CPU)
            factors[a_RD] = torch.zeros(tokens, a_RD.shape[1], dtype=dtype)
            factors[a_RD][rows] = mask.to(dtype) * drop.scale
        assert next(spans, None) is None, "only what trains has dropout"
    return factors


def assert_close(found: Result, truth: Result, plain: Result | None, limit: float) -> None:
    """Every tensor by itself; twice the error of `plain`, where that is more than the limit."""
    assert found.keys() == truth.keys()
    for name, x in found.items():
        allowed = max(limit, 2 * relative(plain[name], truth[name]) if plain else 0.0)
        error = relative(x, truth[name])
        assert x.shape == truth[name].shape and error <= allowed, f"{name}: {error:.2g}"


@cases
@pytest.mark.usefixtures("border")
def test_equals_the_composition_in_fp64(case: Case) -> None:
    assert_close(ours(case, torch.float64, "keep"), composed(case, torch.float64), None, LIMIT_FP64)


@cases
@pytest.mark.usefixtures("border")
def test_fp32_is_as_close_to_fp64_as_the_composition(case: Case) -> None:
    truth, plain = composed(case, torch.float64), composed(case, torch.float32)
    assert_close(ours(case, torch.float32, "keep"), truth, plain, LIMIT_FP32)


@cases
@pytest.mark.usefixtures("border")
def test_the_policies_are_equal_bit_for_bit(case: Case) -> None:
    keep, *others = (ours(case, torch.float32, saved, SEED) for saved in POLICIES)
    for other in others:
        assert keep.keys() == other.keys()
        assert all(torch.equal(keep[name], other[name]) for name in keep)


DROPPED = {
    "stacked": STACKED,
    "trimmed": dataclasses.replace(STACKED, trimmed=True),
    "unlike ranks": Case(adapters={"dpo": UNLIKE | {"lora_dropout": 0.5}}, pairs=True),
}


@pytest.mark.parametrize("saved", POLICIES)
@pytest.mark.parametrize("case", DROPPED.values(), ids=list(DROPPED))
@pytest.mark.usefixtures("border")
def test_dropout_equals_the_composition_with_its_masks(case: Case, saved: Saved) -> None:
    truth = composed(case, torch.float64, SEED)
    assert_close(ours(case, torch.float64, saved, SEED), truth, None, LIMIT_FP64)
    assert relative(composed(case, torch.float64)["y"], truth["y"]) > 1e-2, "it does something"


class AddedProducts(TorchDispatchMode):
    """How many products are added to a result that another one wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.addmm_.default
        return func(*args, **(kwargs or {}))


def test_a_border_saves_the_passes_over_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but o's in the forward, whose input is attention's own, and down's in the backward."""
    case, counts = STACKED, []
    for _ in range(2):
        with AddedProducts() as forward:
            model = case.model(torch.float32)
            layer = NativeEngine(model, torch.float32).layers[0]
            x = random_like((case.layout().n_tokens, 40), 1, torch.float32).requires_grad_()
            y = run(x, layer, call_of(case, torch.float32, "keep"))
        with AddedProducts() as backward:
            y.sum().backward()
        counts.append((forward.count, backward.count))
        with_border(monkeypatch)
    assert counts == [(7, 4), (1, 1)]


def test_zeros_that_cost_more_than_they_save_are_not_multiplied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """B of q, k and v side by side is zeros for two thirds; of o alone none are."""
    with_border(monkeypatch)
    layer = NativeEngine(Case().model(torch.float32), torch.float32).layers[0]
    ranks = layer.qkv.outline(None).ranks
    assert layer.qkv.outline(None).wasted(sum(layer.qkv.widths)) == pytest.approx(ranks * 2 / 3)
    assert layer.o.outline(None).wasted(sum(layer.o.widths)) == 0
    for limit, expected in ((256, True), (0, False)):
        monkeypatch.setattr(group, "MOST_WASTED", limit)
        assert (layer.qkv.stack(layer.qkv.outline(None)).border is not None) == expected
        assert layer.o.stack(layer.o.outline(None)).border is not None
    assert layer.qkv.stack(layer.qkv.outline(None, "fp16acc")).border is None, "W is fp16 there"


@pytest.mark.parametrize("trimmed", [False, True], ids=["whole", "trimmed"])
@pytest.mark.parametrize("saved", ["keep", "lean"])
def test_gradients_by_finite_differences_under_dropout(saved: Saved, trimmed: bool) -> None:
    """Another mask in the backward than in the forward would be wrong by order 1."""
    adapters = {"sft": {"r": 1}, "dpo": {"r": 2, "lora_dropout": 0.4}}
    case = Case(adapters=adapters, active=("sft", "dpo"), heads=(2, 1), trimmed=trimmed)
    model = case.model(torch.float64)
    layer, call = NativeEngine(model, torch.float64).layers[0], call_of(case, torch.float64, saved)
    call = dataclasses.replace(call, seed=SEED)
    x = random_like((call.plan.n_keys, 40), 1, torch.float64).requires_grad_()
    probe = random_like((call.plan.n_queries, 40), 2, torch.float64)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    found = torch.autograd.grad((run(x, layer, call) * probe).sum(), leaves)
    with torch.no_grad():
        for number, (leaf, grad) in enumerate(zip(leaves, found, strict=True)):
            step = 1e-5 * random_like(tuple(leaf.shape), number, torch.float64)
            ends = []
            for sign in (1, -2):  # to +step, then to -step
                leaf += sign * step
                ends.append((run(x, layer, call) * probe).sum())
            leaf += step
            slope, expected = (ends[0] - ends[1]).item() / 2, (grad * step).sum().item()
            assert abs(slope - expected) <= 1e-7 * abs(expected) + 1e-13, tuple(leaf.shape)


def mixed(case: Case) -> Any:
    """A base in bf16 under fp32 masters that bf16 does not hold."""
    model = case.model(torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


@pytest.mark.parametrize("name", ["stacked", "trimmed pairs", "biases", "normed heads"])
def test_bf16_over_fp32_masters_is_as_close_as_the_composition(name: str) -> None:
    case, results = CASES[name], []
    layout, call = case.layout(), call_of(case, torch.float32, "keep")
    x = random_like((layout.n_tokens, 40), 1, torch.bfloat16)
    for dtype in (torch.float64, torch.bfloat16):
        leaf, model = x.to(dtype, copy=True).requires_grad_(), mixed(case).to(dtype)
        y = layer_output(NativeEngine(model, dtype).decoder.layers[0], leaf, layout)
        results.append(differentiate(y if call.rows_U is None else y[call.rows_U], leaf, model))
    for saved in POLICIES:
        leaf, model = x.clone().requires_grad_(), mixed(case)
        layer = NativeEngine(model, torch.bfloat16).layers[0]
        y = run(leaf, layer, dataclasses.replace(call, saved=saved))
        results.append(differentiate(y, leaf, model))
    truth, plain, keep, *others = results
    assert_close(keep, truth, plain, 0.0)
    assert all(g.dtype == torch.float32 for name, g in keep.items() if "lora_" in name)
    assert all(torch.equal(keep[name], other[name]) for other in others for name in keep)


def test_two_backwards_through_one_graph_are_equal() -> None:
    """The first writes over what was kept; the second must not read that."""
    for saved in POLICIES:
        model = STACKED.model(torch.float32)
        layer = NativeEngine(model, torch.float32).layers[0]
        x = random_like((STACKED.layout().n_tokens, 40), 1, torch.float32).requires_grad_()
        y = run(x, layer, call_of(STACKED, torch.float32, saved, SEED))
        leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
        probe = random_like(tuple(y.shape), 2, torch.float32)
        first = torch.autograd.grad(y, leaves, probe, retain_graph=True)
        second = torch.autograd.grad(y, leaves, probe)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), saved


def test_the_input_and_the_incoming_gradient_are_left_alone() -> None:
    for saved in POLICIES:
        model = STACKED.model(torch.float32)
        layer = NativeEngine(model, torch.float32).layers[0]
        x = random_like((STACKED.layout().n_tokens, 40), 1, torch.float32).requires_grad_()
        x_before, dy = x.detach().clone(), random_like(tuple(x.shape), 2, torch.float32)
        dy_before = dy.clone()
        run(x, layer, call_of(STACKED, torch.float32, saved)).backward(dy)
        assert torch.equal(x.detach(), x_before) and torch.equal(dy, dy_before), saved


def test_offload_keeps_nothing_of_the_tokens_on_the_device() -> None:
    model = STACKED.model(torch.float32)
    layer = NativeEngine(model, torch.float32).layers[0]
    x = random_like((STACKED.layout().n_tokens, 40), 1, torch.float32).requires_grad_()
    y: Any = run(x, layer, call_of(STACKED, torch.float32, "offload"))
    assert y.grad_fn.saved_tensors == () and y.grad_fn.kept is None
    host = y.grad_fn.held.host
    assert host.data_ptr() != x.data_ptr() and torch.equal(host, x)


def test_a_wrong_backward_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: a turn that is not turned back."""
    turn = layer_module.rotate_
    monkeypatch.setattr(
        layer_module, "rotate_", lambda x, cos, sin, *, inverse: turn(x, cos, sin, inverse=False)
    )
    with pytest.raises(AssertionError):
        test_equals_the_composition_in_fp64(CASES["gqa 8/2"])


def test_a_layer_is_described_in_the_order_of_its_forward() -> None:
    layer: Layer = NativeEngine(Case().model(torch.float32), torch.float32).layers[0]
    assert [g.widths for g in layer.groups] == [(24, 12, 12), (40,), (56, 56), (40,)]
