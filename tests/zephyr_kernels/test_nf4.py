"""NF4 bit for bit as bitsandbytes dequantises it, nested or not, whatever the shape."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bitsandbytes import functional as bnb
from zephyr_kernels import backend, nf4

# Of one byte; with ragged blocks; with blocks across rows; with an odd count of weights; of two
# programs and two groups of scales; of one block more than a run.
SHAPES = [(1, 2), (3, 46), (6, 96), (5, 7), (70, 256), (33, 64)]


def normal_weight(rows: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return 0.02 * torch.randn(rows, width, generator=generator)


def quantised(
    rows: int, width: int, nested: bool, device: torch.device
) -> tuple[torch.Tensor, bnb.QuantState]:
    """Packed bytes and state of one long row.

    Blocks run across rows, so the bytes are those of [rows, width]; but of such a shape whose rows
    are no multiple of 64, bitsandbytes' CPU kernel takes the scale of the wrong block.
    """
    flat = normal_weight(rows, width).view(1, -1).to(device)
    return bnb.quantize_4bit(flat, blocksize=64, quant_type="nf4", compress_statistics=nested)


def from_quant_state(
    packed: torch.Tensor, state: bnb.QuantState, shape: tuple[int, int]
) -> nf4.Nf4:
    """What bitsandbytes holds, as the kernel takes it."""
    second = state.state2
    return nf4.Nf4(
        packed=packed,
        absmax=state.absmax,
        absmax_code=second.code if second else None,
        absmax_scale=second.absmax if second else None,
        absmax_offset=state.offset.item() if second else 0.0,
        levels=state.code,
        shape=shape,
    )


@pytest.fixture(params=[False, True], ids=["flat", "nested"])
def nested(request: pytest.FixtureRequest) -> bool:
    """Whether the scales are quantised too."""
    return request.param


# Not the odd count, for which bitsandbytes compiles C++ on a CPU.
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] * s[1] % 2 == 0], ids=str)
def test_every_bit_is_that_of_bitsandbytes(shape, nested, device, poisoned):
    packed, state = quantised(*shape, nested, device)
    theirs = bnb.dequantize_4bit(packed, state)
    out_NK, padding = poisoned(*shape, torch.float32)
    nf4.dequantise(from_quant_state(packed, state, shape), out_NK)
    assert torch.equal(out_NK, theirs.reshape(shape))
    assert padding.isnan().all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_bit_is_the_references(shape, nested, dtype, device, poisoned):
    weight = from_quant_state(*quantised(*shape, nested, device), shape)
    out_NK, padding = poisoned(*shape, dtype)
    nf4.dequantise(weight, out_NK)
    expected_NK = torch.empty(shape, dtype=dtype, device=device)
    with backend.using("torch"):
        nf4.dequantise(weight, expected_NK)
    assert torch.equal(out_NK, expected_NK)
    assert padding.isnan().all()


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_the_error_is_that_of_four_bits(shape, nested, device):
    """Against the weight itself: nothing swapped, shifted or scaled by a neighbour's scale."""
    out_NK = torch.empty(shape, device=device)
    nf4.dequantise(from_quant_state(*quantised(*shape, nested, device), shape), out_NK)
    weight_NK = normal_weight(*shape).to(device)
    assert (out_NK - weight_NK).norm() / weight_NK.norm() < 0.12


def test_fp64_holds_the_fp32_values(nested, device):
    weight = from_quant_state(*quantised(6, 96, nested, device), (6, 96))
    single_NK, double_NK = (
        torch.empty(6, 96, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)
    )
    nf4.dequantise(weight, single_NK)
    nf4.dequantise(weight, double_NK)
    assert torch.equal(single_NK.double(), double_NK)


def test_no_rows_are_no_work(device):
    nothing = torch.empty(0, dtype=torch.uint8, device=device)
    levels = torch.zeros(16, device=device)
    weight = nf4.Nf4(nothing, nothing.float(), None, None, 0.0, levels, (0, 64))
    nf4.dequantise(weight, torch.empty(0, 64, device=device))


def test_an_output_of_another_shape_is_refused(nested, device):
    weight = from_quant_state(*quantised(6, 96, nested, device), (6, 96))
    with pytest.raises(ValueError, match="out must be \\[6, 96\\], got \\[96, 6\\]"):
        nf4.dequantise(weight, torch.empty(96, 6, device=device))
    with pytest.raises(ValueError, match="rows must be contiguous"):
        nf4.dequantise(weight, torch.empty(96, 6, device=device).t())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (6, 100)}, "packed must be contiguous with 300 elements"),
        ({"absmax": torch.zeros(8, dtype=torch.uint8)}, "absmax must be contiguous with 9"),
        ({"absmax": torch.zeros(9)}, "absmax must be uint8, got torch.float32"),
        ({"packed": torch.zeros(288)}, "packed must be uint8, got torch.float32"),
        ({"absmax_code": None}, "must be given together"),
        ({"absmax_scale": torch.zeros(2)}, "absmax_scale must be contiguous with 1 "),
        ({"levels": torch.zeros(15)}, "levels must be contiguous with 16"),
    ],
)
def test_a_weight_whose_parts_do_not_fit_is_refused(change, message):
    weight = from_quant_state(*quantised(6, 96, True, torch.device("cpu")), (6, 96))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(weight, **change)
