"""Rows by a power of two, sums in fp16: what is exact, what is rounded, and how often."""

from __future__ import annotations

import math

import pytest
import torch
from zephyr_kernels import fp16acc, reference

SHAPES = [(1, 1), (1, 8), (3, 5), (7, 64), (5, 123), (2, 1000)]
BF16 = 2.0**-8  # half a unit in the last place of bf16, relative


def relative(out: torch.Tensor, truth: torch.Tensor) -> float:
    return ((out.double() - truth).norm() / truth.norm()).item()


def undone(x16_TK: torch.Tensor, undo_T: torch.Tensor) -> torch.Tensor:
    return x16_TK.double() * undo_T.double()[:, None]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_a_row_comes_back_in_every_digit(tokens, width, size, normal):
    """bf16 has eight digits and fp16 eleven; what is 2^-17 below the largest is left out here."""
    x_TK = (normal(tokens, width).clamp(min=2.0**-10) * size).bfloat16().float()
    x16_TK, undo_T = fp16acc.scale_rows(x_TK)
    assert x16_TK.dtype == torch.float16 and undo_T.dtype == torch.float32
    largest_T = x16_TK.abs().amax(1)
    assert ((largest_T >= 4) & (largest_T < 8)).all()
    assert torch.equal(undone(x16_TK, undo_T), x_TK.double())
    assert (undo_T.log2() == undo_T.log2().round()).all(), "powers of two"


def test_every_row_has_a_scale_of_its_own(normal, dtype, device):
    size_T1 = torch.tensor([[1e-4], [1.0], [6e2]], device=device)
    x_TK = (normal(3, 77) * size_T1).to(dtype)
    x16_TK, undo_T = fp16acc.scale_rows(x_TK)
    assert len(set(undo_T.tolist())) == 3
    assert relative(undone(x16_TK, undo_T), x_TK.double()) < 2.0**-11


def test_a_row_of_a_wider_buffer_is_read_alone(normal, dtype):
    wide_TK = normal(4, 50, dtype=dtype)
    wide_TK[:, 20:] = torch.nan
    alone, undo_T = fp16acc.scale_rows(wide_TK[:, :20].contiguous())
    found, found_T = fp16acc.scale_rows(wide_TK[:, :20])
    assert torch.equal(found, alone) and torch.equal(found_T, undo_T)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3.4e38])
def test_the_ends_of_fp32_stay_finite(value, device):
    x16_TK, undo_T = fp16acc.scale_rows(torch.full((2, 9), value, device=device))
    assert x16_TK.isfinite().all() and (undo_T >= torch.finfo(torch.float32).tiny).all()
    assert undo_T.isfinite().all()
    assert abs(undone(x16_TK, undo_T) - value).max() <= max(1e-44, value * 2.0**-11)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad, device, normal):
    x_TK = normal(3, 40)
    x_TK[1, 7] = bad
    y_TN = fp16acc.product(x_TK, normal(40, 6, seed=1).half())
    assert not y_TN[1].isfinite().any()
    assert y_TN[[0, 2]].isfinite().all(), "another row's"


# ---------------------------------------------------------------- sums


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_pieces_are_added_and_undone(tokens, width, dtype, device, normal):
    for pieces in (1, 2, 3):
        sums_PTN = normal(pieces, tokens, width).half()
        undo_T = torch.exp2(torch.arange(tokens, device=device) - 3.0)
        truth_TN = sums_PTN.double().sum(0) * undo_T.double()[:, None]
        out_TN = fp16acc.unscale_rows(sums_PTN.clone(), undo_T, dtype)
        assert out_TN.dtype == dtype and out_TN.shape == (tokens, width)
        # Two or three fp16 numbers of one size are added exactly enough by fp32.
        assert torch.allclose(out_TN.double(), truth_TN.to(dtype).double(), rtol=1e-6, atol=1e-6)


def test_the_only_piece_is_written_over(normal, device):
    undo_T = torch.ones(4, device=device)
    for pieces, dtype, is_over in (
        (1, torch.float16, True),
        (1, torch.float32, False),
        (2, torch.float16, False),
    ):
        sums_PTN = normal(pieces, 4, 9).half()
        out_TN = fp16acc.unscale_rows(sums_PTN, undo_T, dtype)
        assert (out_TN.data_ptr() == sums_PTN.data_ptr()) == is_over


def test_a_sum_rounds_to_nearest_every_16_products():
    """16 * 2^-15 is half a step above 1, rounded to even: small terms leave a sum where it is."""
    x_TK = torch.full((1, 48), 2.0**-15, dtype=torch.float16)
    x_TK[0, 0] = 1.0
    weight_KN = torch.ones(48, 1, dtype=torch.float16)
    for depth, expected in ((16, 1.0), (48, 1 + 2.0**-10)):  # the sum is 1 + 1.47 * 2^-10
        assert reference.mm_fp16_sums(x_TK, weight_KN, depth).item() == expected


def test_an_exact_sum_is_exact(device):
    ones_TK = torch.ones(3, 640, device=device)
    assert (fp16acc.product(ones_TK, torch.ones(640, 2, device=device).half()) == 640).all()


@pytest.mark.parametrize(("width", "count"), [(1, 1), (64, 1), (256, 1), (257, 2), (896, 4)])
def test_a_long_reduction_is_cut_into_equal_aligned_pieces(width, count, monkeypatch):
    monkeypatch.setattr(fp16acc, "PIECE_K", 256)
    pieces = fp16acc.pieces_of(width)
    lengths = [piece.stop - piece.start for piece in pieces]
    assert len(pieces) == count and sum(lengths) == width and max(lengths) <= 256
    assert [piece.start for piece in pieces[1:]] == [piece.stop for piece in pieces[:-1]]
    assert all(piece.start % fp16acc.ALIGNMENT == 0 for piece in pieces)


def test_the_pieces_of_a_7b():
    lengths = {k: [p.stop - p.start for p in fp16acc.pieces_of(k)] for k in (4096, 14336, 28672)}
    assert lengths == {4096: [4096], 14336: [3584] * 4, 28672: [4096] * 7}


def loud(tokens: int, width: int) -> torch.Tensor:
    """bf16 rows with four channels 30 times as loud as the rest."""
    x_TK = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1))
    x_TK[:, :4] *= 30
    return x_TK.bfloat16()


@pytest.mark.parametrize("width", [256, 4096, 14336])
def test_the_simulated_error_is_below_twice_bf16_s(width):
    """As a probe on a card asks; and of a 14336 in one piece it is not."""
    x_TK = loud(16, width)
    weight_KN = 0.02 * torch.randn(width, 32, generator=torch.Generator().manual_seed(2))
    truth_TN = x_TK.double() @ weight_KN.double()
    exact = relative((x_TK.float() @ weight_KN.bfloat16().float()).bfloat16(), truth_TN)
    error = relative(fp16acc.product(x_TK, weight_KN.half()), truth_TN)
    assert 1e-3 < exact < BF16 and error < 1.6 * exact
    if width == 14336:
        x16_TK, undo_T = fp16acc.scale_rows(x_TK)
        whole_TN = reference.mm_fp16_sums(x16_TK, weight_KN.half())
        assert relative(undone(whole_TN, undo_T), truth_TN) > 1.9 * exact


def test_pieces_of_one_product_are_that_product(normal, monkeypatch, dtype):
    x_TK, weight_KN = normal(6, 200, dtype=dtype), normal(200, 12, seed=1).half()
    truth_TN = x_TK.double() @ weight_KN.double()
    for length in (64, 128, 4096):
        monkeypatch.setattr(fp16acc, "PIECE_K", length)
        y_TN = fp16acc.product(x_TK, weight_KN)
        assert y_TN.dtype == dtype and relative(y_TN, truth_TN) < BF16


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_weight_lies_as_the_forward_or_the_backward_has_it(is_transposed, normal):
    x_TK, weight_KN = normal(6, 70), normal(70, 12, seed=1).half()
    given = weight_KN.T.contiguous().T if is_transposed else weight_KN
    assert given.is_contiguous() != is_transposed
    assert relative(fp16acc.product(x_TK, given), x_TK.double() @ weight_KN.double()) < 2e-3


def test_the_same_rows_give_the_same_bits(normal, dtype):
    x_TK, weight_KN = normal(6, 123, dtype=dtype), normal(123, 10).half()
    first, second = (fp16acc.product(x_TK, weight_KN) for _ in range(2))
    assert torch.equal(first, second)


def test_no_tokens_are_no_work(device, dtype):
    y_TN = fp16acc.product(
        torch.empty(0, 8, dtype=dtype, device=device), torch.ones(8, 3, device=device).half()
    )
    assert y_TN.shape == (0, 3) and y_TN.dtype == dtype


def test_what_it_does_not_multiply_is_refused(device):
    x_TK = torch.ones(4, 6, device=device)
    with pytest.raises(ValueError, match=r"weight must be fp16 \[6, N\], got torch.float32"):
        fp16acc.product(x_TK, torch.ones(6, 2, device=device))
    with pytest.raises(ValueError, match=r"weight must be fp16 \[6, N\], got .* \[5, 2\]"):
        fp16acc.product(x_TK, torch.ones(5, 2, device=device).half())
    with pytest.raises(ValueError, match="rows must be contiguous"):
        fp16acc.scale_rows(torch.ones(6, 4, device=device).t())


# ---------------------------------------------------------------- the switch


def test_the_switch_is_put_back_whatever_happens():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    for value in (False, True):
        matmul.allow_fp16_accumulation = value
        try:
            with pytest.raises(KeyError), fp16acc.fp16_sums():
                assert matmul.allow_fp16_accumulation is True
                raise KeyError
            assert matmul.allow_fp16_accumulation is value
        finally:
            matmul.allow_fp16_accumulation = before


def test_a_product_leaves_the_switch_alone(normal):
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    fp16acc.product(normal(3, 8), normal(8, 2).half())
    assert torch.backends.cuda.matmul.allow_fp16_accumulation is before
