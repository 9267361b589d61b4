"""RMSNorm against fp64, the residual sum it writes, and its backward against fp64 autograd."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within
from torch.nn.functional import rms_norm as torch_rms_norm
from zephyr_kernels import norm

SHAPES = [(1, 1), (1, 8), (3, 5), (7, 64), (5, 123), (2, 1000)]
EPS = 1e-5


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_rms_norm_is_as_good_as_eager(tokens, width, dtype, normal, poisoned):
    x_TD, gain_D = normal(tokens, width, dtype=dtype), normal(width, dtype=dtype)
    out_TD, padding = poisoned(tokens, width, dtype)
    y_TD, rstd_T = norm.rms_norm(x_TD, gain_D, EPS, out_TD)
    x64_TD = x_TD.double()
    assert_within(
        y_TD,
        torch_rms_norm(x64_TD, (width,), gain_D.double(), EPS),
        torch_rms_norm(x_TD, (width,), gain_D, EPS),
    )
    truth_T = (x64_TD.square().mean(1) + EPS).rsqrt()
    assert_within(rstd_T, truth_T, truth_T.float())
    assert y_TD is out_TD
    assert padding.isnan().all()


def test_rms_norm_allocates_what_it_is_not_given(dtype, normal):
    x_TD = normal(3, 20, dtype=dtype)[:, :10]
    before_TD = x_TD.clone()
    y_TD, _ = norm.rms_norm(x_TD, normal(10), EPS)
    assert y_TD.dtype == dtype
    assert y_TD.is_contiguous()
    assert torch.equal(x_TD, before_TD)


def test_the_gain_keeps_its_own_dtype(normal):
    """An fp32 gain is not rounded to the fp16 of the activations."""
    x_TD, gain_D = normal(3, 40, dtype=torch.float16), normal(40)
    y_TD, _ = norm.rms_norm(x_TD, gain_D, EPS, torch.empty(3, 40, device=x_TD.device))
    truth_TD = torch_rms_norm(x_TD.double(), (40,), gain_D.double(), EPS)
    assert_within(y_TD, truth_TD, truth_TD.float())


def test_rows_of_zeros_give_zeros(dtype, device, normal):
    y_TD, rstd_T = norm.rms_norm(
        torch.zeros(2, 9, dtype=dtype, device=device), normal(9, dtype=dtype), EPS
    )
    assert torch.equal(y_TD, torch.zeros_like(y_TD))
    assert torch.allclose(rstd_T, torch.full_like(rstd_T, EPS**-0.5))


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_add_rms_norm_writes_the_sum_and_norms_it_as_stored(tokens, width, dtype, normal, poisoned):
    delta_TD, x_TD = (normal(tokens, width, dtype=dtype, seed=seed) for seed in (1, 2))
    gain_D = normal(width, dtype=dtype)
    stored_TD, before_TD = delta_TD + x_TD, x_TD.clone()
    out_TD, padding = poisoned(tokens, width, dtype)
    y_TD, rstd_T = norm.add_rms_norm_(delta_TD, x_TD, gain_D, EPS, out_TD)
    assert torch.equal(delta_TD, stored_TD)
    assert torch.equal(x_TD, before_TD)
    assert padding.isnan().all()
    again_TD, again_T = norm.rms_norm(stored_TD, gain_D, EPS)
    assert torch.equal(y_TD, again_TD)
    assert torch.equal(rstd_T, again_T)


# Not width 1, whose gradient is what two equal terms leave of each other.
@pytest.mark.parametrize("has_residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(("tokens", "width"), SHAPES[1:])
def test_backward_is_as_good_as_eager(tokens, width, has_residual, dtype, normal, poisoned):
    x_TD, given_TD = (normal(tokens, width, dtype=dtype, seed=seed) for seed in (1, 2))
    gain_D = normal(width, dtype=dtype)
    residual_TD = normal(tokens, width, dtype=dtype, seed=3) if has_residual else None
    dy_TD, padding = poisoned(tokens, width, dtype)
    dy_TD.copy_(given_TD)
    _, rstd_T = norm.rms_norm(x_TD, gain_D, EPS)
    dx_TD = norm.rms_norm_backward_(dy_TD, x_TD, gain_D, rstd_T, residual_TD)

    def autograd(wide: torch.dtype) -> torch.Tensor:
        leaf_TD = x_TD.to(wide).requires_grad_()
        torch_rms_norm(leaf_TD, (width,), gain_D.to(wide), EPS).backward(given_TD.to(wide))
        assert leaf_TD.grad is not None
        return leaf_TD.grad if residual_TD is None else leaf_TD.grad + residual_TD

    assert_within(dx_TD, autograd(torch.float64), autograd(dtype))
    assert dx_TD is dy_TD
    assert padding.isnan().all()


def test_backward_of_fp64_agrees_with_autograd_to_the_last_digits(normal):
    x_TD, dy_TD, gain_D = normal(4, 9).double(), normal(4, 9, seed=1).double(), normal(9).double()
    leaf_TD = x_TD.clone().requires_grad_()
    torch_rms_norm(leaf_TD, (9,), gain_D, EPS).backward(dy_TD)
    _, rstd_T = norm.rms_norm(x_TD, gain_D, EPS)
    assert rstd_T.dtype == torch.float64
    dx_TD = norm.rms_norm_backward_(dy_TD, x_TD, gain_D, rstd_T)
    torch.testing.assert_close(dx_TD, leaf_TD.grad, rtol=1e-13, atol=1e-14)


def test_the_same_input_gives_the_same_bits(dtype, normal):
    x_TD, dy_TD = normal(6, 123, dtype=dtype), normal(6, 123, dtype=dtype, seed=1)
    gain_D = normal(123, dtype=dtype)

    def run() -> tuple[torch.Tensor, ...]:
        y_TD, rstd_T = norm.rms_norm(x_TD, gain_D, EPS)
        return y_TD, rstd_T, norm.rms_norm_backward_(dy_TD.clone(), x_TD, gain_D, rstd_T)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_no_tokens_are_no_work(dtype, device, normal):
    empty_TD = torch.empty(0, 8, dtype=dtype, device=device)
    y_TD, rstd_T = norm.rms_norm(empty_TD, normal(8), EPS)
    assert (y_TD.shape, rstd_T.shape) == ((0, 8), (0,))
    assert norm.add_rms_norm_(empty_TD, empty_TD.clone(), normal(8), EPS)[0].shape == (0, 8)
    assert norm.rms_norm_backward_(empty_TD, empty_TD, normal(8), rstd_T).shape == (0, 8)


def test_rows_beyond_two_billion_elements(far_rows, normal):
    x_TD, gain_D = normal(2, 64, dtype=torch.float16), normal(64)
    out_TD, _ = norm.rms_norm(x_TD, gain_D, EPS, far_rows(64))
    assert torch.equal(out_TD, norm.rms_norm(x_TD, gain_D, EPS)[0])


def test_what_a_kernel_would_misread_is_refused(device):
    x_TD, gain_D = torch.ones(4, 6, device=device), torch.ones(6, device=device)
    with pytest.raises(ValueError, match="rows must be contiguous, got strides \\(1, 4\\)"):
        norm.rms_norm(torch.ones(6, 4, device=device).t(), gain_D, EPS)
    with pytest.raises(ValueError, match="shape must be \\[4, 6\\] and 2-D, got \\[4, 5\\]"):
        norm.rms_norm(x_TD, gain_D, EPS, x_TD[:, :5])
    with pytest.raises(ValueError, match="gain must be contiguous \\[6\\], got \\[5\\]"):
        norm.add_rms_norm_(x_TD, x_TD, gain_D[:5], EPS)
    with pytest.raises(ValueError, match="rstd must be contiguous \\[4\\], got \\[3\\]"):
        norm.rms_norm_backward_(x_TD, x_TD, gain_D, gain_D[:3])
