"""One matrix and one stack of LoRA against PEFT's own modules, linear by linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layer_truth import relative
from random_bases import random_model
from transformers import Qwen2Config

from zephyr_lite.model import projections
from zephyr_lite.model.adapters import activate
from zephyr_lite.model.group import Group, Part

TOKENS, WIDTH = 11, 24
LIMIT_FP32 = 1e-6
SFT = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
DPO = {"rank_pattern": {"k_proj": 5}, "use_rslora": True}


def make(adapters: dict[str, Any], active: tuple[str, ...], trains: str | None = None) -> Any:
    """A model with biases on q, k and v, whose heads are wider together than its hidden state."""
    config = Qwen2Config(
        vocab_size=8, hidden_size=WIDTH, intermediate_size=20, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return random_model(config, adapters, active, trains)


def modules_of(model: Any) -> list[Any]:
    """q, k and v."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention = causal_lm.model.layers[0].self_attn
    return [attention.q_proj, attention.k_proj, attention.v_proj]


def rows(seed: int, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(TOKENS, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


STACKS: dict[str, tuple[dict[str, Any], tuple[str, ...], str | None]] = {
    "one": ({"dpo": {}}, ("dpo",), "dpo"),
    "stacked": ({"sft": SFT, "dpo": DPO}, ("sft", "dpo"), "dpo"),
    "inactive": ({"sft": SFT, "dpo": DPO}, ("sft",), "sft"),
    "all off": ({"sft": SFT, "dpo": DPO}, (), None),
    "none": ({}, (), None),
}
stacks = pytest.mark.parametrize("stack", STACKS.values(), ids=list(STACKS))


@stacks
def test_forward_and_backward_equal_peft(stack: Any) -> None:
    model = make(*stack)
    modules, named = modules_of(model), dict(model.named_parameters())
    x, leaves = rows(1).requires_grad_(), [p for p in named.values() if p.requires_grad]
    truth = torch.cat([module(x) for module in modules], 1)
    dy = rows(2, truth.shape[1])
    expected = torch.autograd.grad(truth, [x, *leaves], dy, allow_unused=True)
    group = Group(modules, torch.float32)
    current = group.outline(None).stack()
    (y,), s_TR = projections.forward(x.detach(), group, current)
    assert (s_TR is None) == (not stack[0])
    back = projections.backward([dy], s_TR, group, current)
    assert relative(y, truth.detach()) < LIMIT_FP32
    assert relative(back.dx_TI, expected[0]) < LIMIT_FP32
    found = projections.adapter_gradients(back, x.detach(), current)
    assert len(found) == len(current.trainable)
    wanted = {id(p): g for p, g in zip(leaves, expected[1:], strict=True) if g is not None}
    assert {id(p) for p in current.trainable} == wanted.keys()
    for parameter, gradient in zip(current.trainable, found, strict=True):
        assert relative(gradient, wanted[id(parameter)]) < LIMIT_FP32


def test_a_part_for_some_rows_equals_those_rows_of_the_whole() -> None:
    model = make(*STACKS["stacked"])
    group = Group(modules_of(model), torch.float32)
    stack, x, rows_U = group.outline(None).stack(), rows(1), torch.tensor([0, 3, 4, 10])
    parts = (Part(0, 32, rows_U), Part(32, 64))
    (whole,), s_TR = projections.forward(x, group, stack)
    (q_UO, kv_TO), _ = projections.forward(x, group, stack, parts)
    assert torch.allclose(q_UO, whole[rows_U, :32], rtol=0, atol=1e-5)
    assert torch.allclose(kv_TO, whole[:, 32:], rtol=0, atol=1e-5)
    # What nobody asked for has no gradient: the same as zeros there.
    dy = rows(2, 64)
    zeroed = dy.clone()
    zeroed[:, :32] = 0
    zeroed[rows_U, :32] = dy[rows_U, :32]
    some = projections.backward([dy[rows_U, :32], dy[:, 32:]], s_TR, group, stack, parts)
    full = projections.backward([zeroed], s_TR, group, stack)
    assert relative(some.dx_TI, full.dx_TI) < LIMIT_FP32
    for a, b in zip(
        projections.adapter_gradients(some, x, stack),
        projections.adapter_gradients(full, x, stack),
        strict=True,
    ):
        assert relative(a, b) < LIMIT_FP32


def test_parts_must_cover_all_rows_between_them() -> None:
    group = Group(modules_of(make(*STACKS["one"])), torch.float32)
    some = (Part(0, 64, torch.arange(3)),)
    with pytest.raises(ValueError, match="no part of the group covers all rows"):
        projections.backward([torch.zeros(3, 64)], None, group, group.outline(None).stack(), some)


def test_dx_is_left_out_where_nobody_wants_it() -> None:
    group = Group(modules_of(make(*STACKS["stacked"])), torch.float32)
    stack, x = group.outline(None).stack(), rows(1)
    _, s_TR = projections.forward(x, group, stack)
    without = projections.backward([rows(2, 64)], s_TR, group, stack, wants_dx=False)
    with_it = projections.backward([rows(2, 64)], s_TR, group, stack)
    with pytest.raises(ValueError, match="dX was not asked for"):
        assert without.dx_TI is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            projections.adapter_gradients(without, x, stack),
            projections.adapter_gradients(with_it, x, stack),
            strict=True,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_an_attached_adapter_with_b_0_changes_no_bit(dtype: torch.dtype, tokens: int) -> None:
    """Policy and reference before the first step: the same columns, so the same sums."""
    model = make({"sft": SFT, "dpo": DPO}, ("sft", "dpo"), "dpo")
    for name, parameter in model.named_parameters():
        if "lora_B.dpo" in name:
            parameter.data.zero_()
    group, x = Group(modules_of(model), dtype), rows(1, dtype=dtype)[:tokens]
    (policy,), _ = projections.forward(x, group, group.outline(None).stack())
    activate(model, ["sft"])
    reference_stack = group.outline(None).stack()
    (reference,), _ = projections.forward(x, group, reference_stack)
    assert torch.equal(policy, reference)
    assert [len(lora.pieces) for lora in reference_stack.loras] == [2, 1, 2]


def test_the_scale_is_peft_s() -> None:
    group = Group(modules_of(make(*STACKS["stacked"])), torch.float32)
    scales = [[p.scale for p in lora.pieces] for lora in group.outline(None).stack().loras]
    rslora = [5 / rank**0.5 for rank in (3, 5, 3)]
    assert scales == [[5 / 4, rslora[0]], [rslora[1]], [5 / 4, rslora[2]]]


def test_an_adapter_that_is_not_active_has_scale_0_and_does_not_train() -> None:
    model = make(*STACKS["inactive"])
    model.requires_grad_(True)  # as PEFT leaves an adapter that was active before
    group = Group(modules_of(model), torch.float32)
    for lora in group.outline(None).stack().loras:
        dpo = lora.pieces[-1]
        assert dpo.scale == 0.0 and not dpo.trains
        assert not lora.b_OR[:, dpo.columns].any()


def test_only_what_trains_has_dropout_each_projection_its_own() -> None:
    adapters = {"sft": {**SFT, "lora_dropout": 0.1}, "dpo": {**DPO, "lora_dropout": 0.2}}
    group = Group(modules_of(make(adapters, ("sft", "dpo"), "dpo")), torch.float32)
    assert group.outline(None).stack().spans == ()
    spans = group.outline(0).stack().spans  # a seed like any other
    assert [(start, stop) for start, stop, _ in spans] == [(4, 7), (7, 12), (16, 19)]
    assert {drop.rate for *_, drop in spans} == {0.2}
    assert len({drop.seed for *_, drop in spans}) == 3


def test_adapters_are_read_anew_for_each_stack() -> None:
    """An optimizer step between two forwards must be seen."""
    model = make(*STACKS["one"])
    group, x = Group(modules_of(model), torch.float32), rows(1)
    before = group.outline(None).stack()
    (first,), _ = projections.forward(x, group, before)
    with torch.no_grad():
        for parameter in before.trainable:
            parameter.mul_(2.0)
    (second,), _ = projections.forward(x, group, group.outline(None).stack())
    (old,), _ = projections.forward(x, group, before)
    assert torch.equal(first, old) and relative(second, first) > 1e-2


def test_nothing_is_folded_into_the_frozen_matrix() -> None:
    model = make(*STACKS["stacked"])
    modules = modules_of(model)
    before = [module.base_layer.weight.clone() for module in modules]
    group, x = Group(modules, torch.float32), rows(1)
    _, s_TR = projections.forward(x, group, group.outline(None).stack())
    projections.backward([rows(2, 64)], s_TR, group, group.outline(None).stack())
    assert torch.equal(group.frozen.weight(), torch.cat(before))


def gradients(group: Group, current: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    _, s_TR = projections.forward(x, group, current)
    back = projections.backward([dy], s_TR, group, current)
    return projections.adapter_gradients(back, x, current)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_only_ranks_that_train_are_differentiated(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """dA and dB of a frozen adapter beside a trained one are nobody's."""
    adapters = {"sft": SFT, "dpo": {**DPO, "lora_dropout": dropout}}
    group = Group(modules_of(make(adapters, ("sft", "dpo"), "dpo")), torch.float32)
    ranks = {"a": 0, "b": 0}
    a_backward, rank_backward = projections.a_backward, projections.rank_backward

    def spy_a(ds_TR: torch.Tensor, *rest: Any) -> torch.Tensor:
        ranks["a"] += ds_TR.shape[1]
        return a_backward(ds_TR, *rest)

    def spy_b(dy: torch.Tensor, s_TR: torch.Tensor, *rest: Any) -> Any:
        ranks["b"] += s_TR.shape[1]
        return rank_backward(dy, s_TR, *rest)

    monkeypatch.setattr(projections, "a_backward", spy_a)
    monkeypatch.setattr(projections, "rank_backward", spy_b)
    gradients(group, group.outline(5 if dropout else None).stack(), rows(1), rows(2, 64))
    assert ranks == {"a": 3 + 5 + 3, "b": 3 + 5 + 3}


@pytest.mark.parametrize("seed", [None, 9])
@pytest.mark.parametrize("trained", [("one",), ("two",), ("one", "three"), ("one", "two", "three")])
def test_what_trains_beside_and_between_frozen_ranks(
    trained: tuple[str, ...], seed: int | None
) -> None:
    """The gradients of an adapter do not depend on which others train."""
    adapters = {
        "one": {"r": 2, "lora_dropout": 0.3},
        "two": {"r": 3, "target_modules": ["q_proj", "k_proj"], "lora_dropout": 0.2},
        "three": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    }
    model = make(adapters, tuple(adapters), "one")
    model.train()  # dropout in all three
    group, x, dy = Group(modules_of(model), torch.float32), rows(1), rows(2, 64)
    found = []
    for names in (tuple(adapters), trained):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                any(f"lora_A.{n}" in name or f"lora_B.{n}" in name for n in names)
            )
        current = group.outline(seed).stack()
        assert (current.spans == ()) == (seed is None)
        grads = gradients(group, current, x, dy)
        found.append({id(p): g for p, g in zip(current.trainable, grads, strict=True)})
    every, some = found
    assert len(some) == 2 * sum({"one": 3, "two": 2, "three": 2}[name] for name in trained)
    assert all(relative(some[key], every[key]) < LIMIT_FP32 for key in some)
