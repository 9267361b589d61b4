"""The dropout mask against its definition, and the mask that each LoRA kernel makes for itself."""

from __future__ import annotations

import math

import pytest
import torch
from zephyr_kernels import reference
from zephyr_kernels.lora import Dropout, a_backward, input_backward_, shrink

SEEDS = (0, 1, 2**31 - 1, 12_345_678_901, -7)


def definition(seed: int, rate: float, rows: int, width: int) -> torch.Tensor:
    """Element by element, in Python's integers."""

    def mixed(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) % 2**32
        x = ((x ^ (x >> 15)) * 0xD35A2D97) % 2**32
        return x ^ (x >> 15)

    start = mixed(seed % 2**31)
    kept = []
    for element in range(rows * width):
        bits = mixed(start ^ (element // 2))
        lane = bits // 2**16 if element % 2 else bits % 2**16
        kept.append(lane >= round(rate * 2**16))
    return torch.tensor(kept, dtype=torch.bool).view(rows, width)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (5, 8), (0, 4)])
def test_mask_is_its_definition(seed: int, rows: int, width: int) -> None:
    for rate in (0.0, 0.05, 0.5, 0.9999):
        mask = reference.dropout_mask(seed, rate, rows, width, torch.device("cpu"))
        assert torch.equal(mask, definition(seed, rate, rows, width))


@pytest.mark.parametrize("width", [47, 48], ids=["odd", "even"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_operation_drops_the_same_elements(
    seed: int, width: int, device: torch.device
) -> None:
    """Identities on one side make each operation show its mask; both the kernel's and torch's."""
    rows = 37
    dropout = Dropout(0.3, seed)
    mask = reference.dropout_mask(seed, 0.3, rows, width, device)
    shown = mask * torch.tensor(dropout.scale, dtype=torch.float32, device=device)
    x_TI = torch.ones(rows, width, device=device)
    eye_II, eye_TT = torch.eye(width, device=device), torch.eye(rows, device=device)
    dx_TI = torch.zeros(rows, width, device=device)
    input_backward_(dx_TI, eye_TT, x_TI, [(0, rows, dropout)])
    found = {
        "shrink": shrink(x_TI, eye_II, [(0, width, dropout)]),
        "a_backward": a_backward(eye_TT, x_TI, [(0, rows, dropout)]),
        "input_backward_": dx_TI,
    }
    for name, values in found.items():
        assert torch.equal(values != 0, mask), name
        assert (values - shown).abs().max() <= 4e-7, name


@pytest.mark.parametrize("rate", [0.05, 0.5])
def test_share_of_kept_is_the_rates(rate: float) -> None:
    rows, width = 256, 1001
    for seed in range(6):
        mask = reference.dropout_mask(seed, rate, rows, width, torch.device("cpu")).double()
        kept = 1 - reference.dropout_threshold(rate) / 65536
        sigma = math.sqrt(kept * (1 - kept))
        assert abs(mask.mean().item() - kept) < 3 * sigma / math.sqrt(mask.numel())
        by_column = (mask.mean(0) - kept).abs().max().item()
        assert by_column < 5 * sigma / math.sqrt(rows), "a column is dropped more than others"


@pytest.mark.parametrize("shift", [1, 2, 1001], ids=["lanes", "counters", "rows"])
def test_neighbours_are_independent(shift: int) -> None:
    flat = reference.dropout_mask(3, 0.5, 256, 1001, torch.device("cpu")).flatten().double() - 0.5
    correlation = 4 * (flat[shift:] * flat[:-shift]).mean().item()
    assert abs(correlation) < 4 / math.sqrt(len(flat))


def test_seeds_give_independent_masks() -> None:
    masks = [
        reference.dropout_mask(s, 0.5, 200, 500, torch.device("cpu")).double() for s in range(4)
    ]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert abs(4 * ((a - 0.5) * (b - 0.5)).mean().item()) < 4 / math.sqrt(a.numel())


def test_expectation_is_the_input() -> None:
    dropout = Dropout(0.25, 11)
    ones = torch.ones(300, 1)
    kept = shrink(torch.ones(300, 400), torch.eye(400)[:, :], [(0, 400, dropout)])
    assert kept.mean().item() == pytest.approx(1.0, abs=3 * math.sqrt(1 / 3 / kept.numel()))
    assert torch.equal(shrink(ones, torch.ones(1, 1), [(0, 1, Dropout(0.0, 5))]), ones)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 0.999999, 1.5])
def test_impossible_rates_are_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="rate"):
        Dropout(rate, 0)
