"""What is read is what bitsandbytes packed, whatever the width, and needs no second copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import DataError
from zephyr_lite.export.weights import four_bit
from zephyr_lite.export.weights.base_weights import BaseWeights, empty_fp32, is_finite
from zephyr_lite.model.frozen_weights import dequantised

NAME = "model.layers.0.mlp.up_proj.weight"


def packed_folder(folder: Path, weight: torch.Tensor, **options: Any) -> tuple[Path, Any, Any]:
    """A checkpoint of one 4-bit weight; with bitsandbytes' codes and state of it."""
    packed, state = quantize_4bit(weight, **{"quant_type": "nf4", **options})
    tensors = {NAME: packed, **{f"{NAME}.{k}": v for k, v in state.as_dict(packed=True).items()}}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder, packed, state


@pytest.mark.parametrize("shape", [(64, 64), (192, 96), (255, 171), (3, 7), (600, 512)])
@pytest.mark.parametrize("is_nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nf4_is_read_bit_for_bit(
    shape: tuple[int, int], is_nested: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    weight = (torch.randn(shape) * 0.02).to(dtype)
    folder, packed, state = packed_folder(tmp_path, weight, compress_statistics=is_nested)
    base = BaseWeights(folder)
    assert base.names() == [NAME] and base.shape(NAME) == shape
    expected = dequantised(packed, state, dtype).float()
    assert torch.equal(base.tensor(NAME), expected)


def test_fp4_is_read_bit_for_bit(tmp_path: Path) -> None:
    weight = torch.randn(128, 256, dtype=torch.bfloat16)
    folder, packed, state = packed_folder(tmp_path, weight, quant_type="fp4", blocksize=128)
    expected = dequantize_4bit(packed, state).float()
    assert torch.equal(BaseWeights(folder).tensor(NAME), expected)


def test_chunks_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, *_ = packed_folder(tmp_path, torch.randn(100, 172), compress_statistics=True)
    whole = BaseWeights(folder).tensor(NAME)
    monkeypatch.setattr(four_bit, "CHUNK", 256)
    assert torch.equal(BaseWeights(folder).tensor(NAME), whole)


def test_codes_of_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    folder, *_ = packed_folder(tmp_path, torch.randn(9, 13))
    packed = BaseWeights(folder).packed(NAME)
    assert packed is not None
    assert torch.equal(packed.codes(slice(3, 6)), packed.codes(slice(0, 9))[3:6])


def test_a_tensor_is_the_callers_own(plain_base: Path, nf4_base: Path) -> None:
    for folder in (plain_base, nf4_base):
        base = BaseWeights(folder)
        for name in base.names():
            before = base.tensor(name)
            base.tensor(name).zero_()
            assert torch.equal(base.tensor(name), before)


def test_buffers_of_old_checkpoints_are_not_weights(tmp_path: Path) -> None:
    old = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file({NAME: torch.ones(2, 2), old: torch.ones(4)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert BaseWeights(tmp_path).names() == [NAME]


def test_a_large_weight_needs_no_second_copy(tmp_path: Path) -> None:
    """32 M weights, 134 MB in fp32: the codes, the result, and a little."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("peak memory is read from /proc")

    def resident(field: str) -> int:
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) * 1024

    torch.manual_seed(0)
    folder, *_ = packed_folder(tmp_path, torch.randn(4096, 8192), compress_statistics=True)
    base = BaseWeights(folder)
    clear.write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    weight = base.tensor(NAME)
    assert resident("VmHWM") - before < 1.3 * weight.nbytes
    assert is_finite(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", [0, 4096, -1])
def test_one_value_that_is_not_finite_is_seen(value: float, at: int) -> None:
    weight = torch.zeros(5000)
    assert is_finite(weight)
    weight[at] = value
    assert not is_finite(weight)


def test_huge_pages_hold_any_size() -> None:
    for size in (0, 1, 1 << 20, (1 << 20) + 3):
        fresh = empty_fp32(size)
        assert fresh.shape == (size,) and fresh.dtype == torch.float32
        assert fresh.fill_(1).sum() == size


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("absmax", None),
        ("quant_map", None),
        ("nested_absmax", None),
        ("nested_quant_map", None),
        ("absmax", lambda x: x[:-1].clone()),
        ("absmax", lambda x: x.float()),
        ("quant_map", lambda x: x[:8].clone()),
        ("", lambda x: x[:-1].clone()),
        ("surprise", lambda _: torch.ones(1)),
        ("quant_state.bitsandbytes__nf4", lambda x: x[:-1].clone()),
    ],
)
def test_a_damaged_4_bit_weight_is_named_when_opened(
    part: str, change: Any, tmp_path: Path
) -> None:
    folder, *_ = packed_folder(tmp_path, torch.randn(64, 256), compress_statistics=True)
    path, key = folder / "model.safetensors", f"{NAME}.{part}".removesuffix(".")
    tensors = load_file(path)
    old = tensors.pop(key, None)
    if change is not None:
        tensors[key] = change(old)
    save_file(tensors, path)
    with pytest.raises(DataError, match=f"model.safetensors: tensor {key}") as caught:
        BaseWeights(folder)
    assert caught.value.exit_code == 2
