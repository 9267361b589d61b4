"""Frozen matrices: held once, unchanged, and bitsandbytes' own numbers where they are quantised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import load_file
from torch import nn

from zephyr_lite.data.layout import pair_layout
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.frozen_weights import FrozenWeight, Gemm, Slot, dequantised, is_misread
from zephyr_lite.model.layer import Saved
from zephyr_lite.model.native import GROUPS, NativeEngine
from zephyr_lite.recipe import Lora

CPU = torch.device("cpu")


def plain(*biases: bool, dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    torch.manual_seed(0)
    found = [nn.Linear(12, 8 + i, bias=bias, dtype=dtype) for i, bias in enumerate(biases)]
    return [x.requires_grad_(False) for x in found]


def quantised(*shapes: tuple[int, int], nested: bool, dtype: torch.dtype) -> list[Linear4bit]:
    """bitsandbytes' linears [out, in], quantised from `dtype` on the CPU."""
    torch.manual_seed(0)
    found = []
    for n, k in shapes:
        linear = Linear4bit(k, n, bias=False, device="meta")
        options = {"quant_type": "nf4", "compress_statistics": nested}
        linear.weight = Params4bit(torch.randn(n, k, dtype=dtype), requires_grad=False, **options)
        found.append(linear.to("cpu"))
        assert linear.weight.quant_state.dtype == dtype
    return found


def storages(modules: list[Any]) -> set[int]:
    return {m.weight.untyped_storage().data_ptr() for m in modules}


def test_modules_become_views_and_keep_their_values() -> None:
    modules = plain(False, False, False)
    before = [m.weight.clone() for m in modules]
    frozen = FrozenWeight(modules, torch.float32)
    weight = frozen.weight()
    assert torch.equal(weight, torch.cat(before))
    assert all(torch.equal(m.weight, w) for m, w in zip(modules, before, strict=True))
    assert storages(modules) == {weight.untyped_storage().data_ptr()}, "held twice"
    assert weight.untyped_storage().nbytes() == sum(w.numel() for w in before) * 4
    assert all(isinstance(m.weight, nn.Parameter) and not m.weight.requires_grad for m in modules)


def test_every_user_of_a_module_computes_what_it_did() -> None:
    modules, x = plain(True, False), torch.randn(5, 12)
    before = [m(x) for m in modules]
    FrozenWeight(modules, torch.float32)
    assert all(torch.equal(m(x), y) for m, y in zip(modules, before, strict=True))


def test_another_dtype_leaves_the_modules_alone() -> None:
    modules = plain(False, True)
    before, places = [m.weight.clone() for m in modules], storages(modules)
    frozen = FrozenWeight(modules, torch.bfloat16)
    assert frozen.weight().dtype == torch.bfloat16 and frozen.bias_O is not None
    assert frozen.bias_O.dtype == torch.bfloat16
    assert storages(modules) == places and all(m.weight.dtype == torch.float32 for m in modules)
    assert all(torch.equal(m.weight, w) for m, w in zip(modules, before, strict=True))
    assert torch.equal(frozen.weight(), torch.cat(before).bfloat16())


def test_a_bias_that_is_not_there_is_zero() -> None:
    modules = plain(True, False, True)
    bias = FrozenWeight(modules, torch.float32).bias_O
    assert bias is not None
    assert torch.equal(bias, torch.cat([modules[0].bias, torch.zeros(9), modules[2].bias]))
    assert FrozenWeight(plain(False, False), torch.float32).bias_O is None


def test_a_model_saves_the_same_files_afterwards(
    tiny_mistral: Path, load_tiny: Callable, tmp_path: Path
) -> None:
    """Views of one storage are what safetensors refuses to write when it is not told."""
    model = load_tiny("none")
    NativeEngine(model, torch.float32)
    model.save_pretrained(tmp_path)
    saved, found = (load_file(f / "model.safetensors") for f in (tiny_mistral, tmp_path))
    assert saved.keys() == found.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


SHAPES = ((48, 64), (20, 64), (3, 64))
quants = pytest.mark.parametrize("nested", [True, False], ids=["double", "single"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@quants
@dtypes
def test_nf4_is_what_bitsandbytes_dequantises(nested: bool, dtype: torch.dtype) -> None:
    modules = quantised(*SHAPES, nested=nested, dtype=dtype)
    packed = [m.weight.clone() for m in modules]
    weight = FrozenWeight(modules, dtype).weight()
    theirs = [dequantize_4bit(m.weight, m.weight.quant_state) for m in modules]
    assert weight.dtype == dtype and torch.equal(weight, torch.cat(theirs))
    assert all(torch.equal(m.weight, p) for m, p in zip(modules, packed, strict=True))


@quants
@dtypes
def test_nf4_in_fp32_is_what_bitsandbytes_multiplies_with(nested: bool, dtype: torch.dtype) -> None:
    """Its forward does not round to the dtype that the weights had before they were quantised."""
    modules = quantised(*SHAPES, nested=nested, dtype=dtype)
    weight = FrozenWeight(modules, torch.float32).weight()
    for m in modules:
        m.compute_dtype, m.compute_type_is_set = torch.float32, True
    with torch.no_grad():
        theirs = [m.train()(torch.eye(64)).T for m in modules]
    assert torch.equal(weight, torch.cat(theirs))


@quants
@pytest.mark.parametrize("width", [64, 96, 172, 480])
def test_a_block_that_runs_across_rows_keeps_its_scale(width: int, nested: bool) -> None:
    """NF4 of normal values is wrong by 9 %; bitsandbytes' CPU kernel by 26 % at 96 and 480."""
    torch.manual_seed(0)
    original = torch.randn(64, width)
    (linear,) = quantised((64, width), nested=nested, dtype=torch.float32)
    weight = FrozenWeight([linear], torch.float32).weight()
    assert 0.08 < ((weight - original).norm() / original.norm()).item() < 0.1


@quants
@dtypes
def test_the_state_in_the_kernel_s_terms_gives_the_same_bits(
    nested: bool, dtype: torch.dtype
) -> None:
    """17 blocks are no whole group of 256, 300 more than one; blocks that run across rows."""
    for linear in quantised((17, 64), (300, 64), (64, 172), (5, 448), nested=nested, dtype=dtype):
        packed, state = linear.weight.detach(), linear.weight.quant_state
        assert torch.equal(dequantised(packed, state, dtype), dequantize_4bit(packed, state))
        assert not is_misread(linear)


@quants
def test_a_weight_that_bitsandbytes_misreads_is_known(nested: bool) -> None:
    (linear,) = quantised((64, 96), nested=nested, dtype=torch.float32)
    assert is_misread(linear)


def as_on_a_gpu(frozen: FrozenWeight, slot: Slot) -> None:
    """Make a frozen weight dequantise into a slot that others share, as where memory is dear."""
    frozen.slot = slot


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of weights whenever a group is dequantised."""
    seen: list[int] = []
    dequantise = FrozenWeight.dequantise

    def counted(frozen: FrozenWeight, out_OI: torch.Tensor) -> torch.Tensor:
        seen.append(out_OI.numel())
        return dequantise(frozen, out_OI)

    monkeypatch.setattr(FrozenWeight, "dequantise", counted)
    return seen


def test_a_slot_dequantises_when_another_asks_and_only_then(calls: list[int]) -> None:
    slot = Slot()
    small, large = (
        FrozenWeight(quantised(*shapes, nested=True, dtype=torch.float32), torch.float32, slot)
        for shapes in (((5, 64), (7, 64)), ((30, 64), (50, 64), (20, 64)))
    )
    truths = {frozen: frozen.weight() for frozen in (small, large)}
    for frozen in truths:
        as_on_a_gpu(frozen, slot)
    calls.clear()
    for frozen in (small, small, large, large, small, large):
        found = frozen.weight()
        assert torch.equal(found, truths[frozen]) and found.is_contiguous()
    assert calls == [12 * 64, 100 * 64, 12 * 64, 100 * 64]
    assert slot.buffer is not None and slot.buffer.numel() == 100 * 64
    assert large.weight().untyped_storage().data_ptr() == slot.buffer.data_ptr()


@quants
def test_a_border_lies_around_the_same_weights(nested: bool, calls: list[int]) -> None:
    """Rows lie multiples of 16 elements apart, and a change of rank lays the weights out again."""
    frozen = FrozenWeight(quantised(*SHAPES, nested=nested, dtype=torch.float32), torch.float32)
    truth = frozen.weight().clone()
    for ranks in (5, 5, 16):
        border = frozen.bordered(ranks)
        assert border is not None and torch.equal(border.w_OI, truth)
        assert border.w_OI.stride(0) % 16 == 0
        rows, width = 71, border.w_OI.stride(0)
        whole = border.w_OI.as_strided((rows + ranks, width), (width, 1))
        border.b_OR.fill_(2.0)
        border.a_RI.fill_(3.0)
        assert torch.equal(whole[:rows, 64 : 64 + ranks], border.b_OR)
        assert torch.equal(whole[rows:, :64], border.a_RI) and torch.equal(border.w_OI, truth)
    assert len(calls) == 3, "once without a border, once for each"
    assert FrozenWeight(plain(False), torch.float32).bordered(4) is None, "the model's own memory"


def test_a_slot_changes_its_dtype_when_another_is_asked_for(calls: list[int]) -> None:
    slot = Slot()
    weights = [
        FrozenWeight(quantised((9, 64), nested=True, dtype=torch.bfloat16), torch.bfloat16, slot)
        for _ in range(2)
    ]
    wide = torch.empty(9, 64)
    weights[0].dequantise(wide)
    for frozen in weights:
        as_on_a_gpu(frozen, slot)
    calls.clear()
    for gemm, dtype in (("exact", torch.bfloat16), ("fp16acc", torch.float16)) * 2:
        for frozen in (weights[0], weights[0], weights[1]):
            found = frozen.weight(gemm)
            assert found.dtype == dtype and torch.equal(found, wide.to(dtype)), "rounded once"
        assert slot.buffer is not None and slot.buffer.dtype == dtype
    assert len(calls) == 4 * 2


@pytest.mark.parametrize(
    ("saved", "gemm"),
    [("keep", "exact"), ("lean", "exact"), ("offload", "exact"), ("keep", "fp16acc"),
     ("lean", "fp16acc")],
)  # fmt: skip
def test_no_layer_reads_a_weight_that_another_overwrote(
    saved: Saved,
    gemm: Gemm,
    load_tiny: Callable,
    shake: Callable,
    random_pairs: Callable,
    calls: list[int],
) -> None:
    """And each weight is dequantised twice a step: what is computed again shares the backward's."""
    layout = to_device(pair_layout(random_pairs([(9, 4, 12), (3, 6, 5)])), CPU)
    results = []
    for shares in (False, True):
        model = add_adapter(load_tiny(), "dpo", Lora(r=4), seed=0)
        shake(model, "dpo")
        engine = NativeEngine(model, torch.float32, saved=saved, gemm=gemm)
        slots = [Slot() for _ in GROUPS]
        for layer in engine.layers if shares else ():
            for group, slot in zip(layer.groups, slots, strict=True):
                as_on_a_gpu(group.frozen, slot)
        calls.clear()
        hidden = engine.predicting(layout)
        leaves = [p for p in model.parameters() if p.requires_grad]
        results.append([hidden, *torch.autograd.grad(hidden.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    # The last layer's lie there still when its backward begins. Without a border for adapters the
    # first has no use for q, k and v in it, unless it computes them again.
    layers, is_bare = len(engine.layers), gemm == "fp16acc"
    assert len(calls) == 2 * 4 * layers - 4 - (is_bare and saved == "keep")
