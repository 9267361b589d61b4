"""SwiGLU against fp64, and its in-place backward against fp64 autograd."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within
from torch.nn.functional import silu
from zephyr_kernels import swiglu as subject

# The last two need more than one tile a row.
SHAPES = [(1, 1), (1, 7), (3, 64), (5, 123), (2, 1025), (3, 2100)]


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_forward_is_as_good_as_eager(tokens, width, dtype, normal, poisoned):
    gate_TF, up_TF = 4 * normal(tokens, width, dtype=dtype), poisoned(tokens, width, dtype)[0]
    up_TF.copy_(normal(tokens, width, dtype=dtype, seed=2))  # three tensors of three strides
    out_TF, padding = poisoned(tokens, width + 1, dtype)
    h_TF = subject.swiglu(gate_TF, up_TF, out_TF[:, :width])
    assert_within(h_TF, silu(gate_TF.double()) * up_TF.double(), silu(gate_TF) * up_TF)
    assert h_TF.data_ptr() == out_TF.data_ptr()
    assert out_TF[:, width:].isnan().all()
    assert padding.isnan().all()


def test_gate_and_up_may_be_halves_of_one_product(dtype, normal):
    both_TF = normal(3, 100, dtype=dtype)
    gate_TF, up_TF = both_TF[:, :50], both_TF[:, 50:]
    apart = [gate_TF.clone(), up_TF.clone()]
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    h_TF = subject.swiglu(gate_TF, up_TF)
    torch.testing.assert_close(h_TF, subject.swiglu(*apart), **close)
    assert torch.equal(both_TF, torch.cat(apart, 1))
    subject.swiglu_backward_(h_TF.clone(), gate_TF, up_TF)
    subject.swiglu_backward_(h_TF.clone(), *apart)
    torch.testing.assert_close(both_TF, torch.cat(apart, 1), **close)


@pytest.mark.parametrize(("tokens", "width"), SHAPES)
def test_backward_is_as_good_as_eager(tokens, width, dtype, normal, poisoned):
    gate_TF, up_TF = 4 * normal(tokens, width, dtype=dtype), poisoned(tokens, width, dtype)[0]
    up_TF.copy_(normal(tokens, width, dtype=dtype, seed=2))  # three tensors of three strides
    given_TF = normal(tokens, width, dtype=dtype, seed=1)

    def autograd(wide: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(wide).clone().requires_grad_() for x in (gate_TF, up_TF)]
        h_TF = silu(leaves[0]) * leaves[1]
        return [h_TF.detach(), *torch.autograd.grad(h_TF, leaves, given_TF.to(wide))]

    truths, eagers = autograd(torch.float64), autograd(dtype)
    dh_TF, padding = poisoned(tokens, width + 1, dtype)
    dh_TF = dh_TF[:, :width].copy_(given_TF)
    subject.swiglu_backward_(dh_TF, gate_TF, up_TF)
    for out_TF, truth_TF, eager_TF in zip((dh_TF, gate_TF, up_TF), truths, eagers, strict=True):
        assert_within(out_TF, truth_TF, eager_TF)
    assert padding.isnan().all()


def test_forward_and_backward_give_the_same_h(dtype, normal):
    gate_TF, up_TF, dh_TF = (normal(3, 50, dtype=dtype, seed=seed) for seed in range(3))
    h_TF = subject.swiglu(gate_TF, up_TF)
    subject.swiglu_backward_(dh_TF, gate_TF, up_TF)
    torch.testing.assert_close(dh_TF, h_TF, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's numpy
def test_saturated_gates_stay_finite(device):
    gate_TF = torch.tensor([[-200.0, -90.0, 0.0, 90.0, 200.0]], device=device)
    one_TF = torch.ones_like(gate_TF)
    h_TF = subject.swiglu(gate_TF, one_TF)
    torch.testing.assert_close(h_TF, gate_TF.clamp(min=0), rtol=0, atol=1e-30)
    up_TF = one_TF.clone()
    subject.swiglu_backward_(one_TF, gate_TF, up_TF)
    slope_TF = torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=device)
    torch.testing.assert_close(gate_TF, slope_TF, rtol=0, atol=1e-30)


def test_an_fp32_output_is_rounded_once(device, normal):
    gate_TF, up_TF = (normal(2, 40, dtype=torch.float16, seed=seed) for seed in (1, 2))
    out_TF = torch.empty(2, 40, device=device)
    subject.swiglu(gate_TF, up_TF, out_TF)
    truth_TF = silu(gate_TF.double()) * up_TF.double()
    assert_within(out_TF, truth_TF, truth_TF.float())


def test_fp64_is_computed_in_fp64(normal):
    gate_TF, up_TF = normal(2, 9).double(), normal(2, 9, seed=1).double()
    truth_TF = silu(gate_TF) * up_TF
    torch.testing.assert_close(subject.swiglu(gate_TF, up_TF), truth_TF, rtol=1e-14, atol=0)


def test_no_tokens_are_no_work(dtype, device):
    empty_TF = torch.empty(0, 8, dtype=dtype, device=device)
    assert subject.swiglu(empty_TF, empty_TF).shape == (0, 8)
    subject.swiglu_backward_(empty_TF, empty_TF, empty_TF)


def test_rows_beyond_two_billion_elements(far_rows, normal):
    gate_TF, up_TF = (normal(2, 64, dtype=torch.float16, seed=seed) for seed in (1, 2))
    out_TF = subject.swiglu(gate_TF, up_TF, far_rows(64))
    assert torch.equal(out_TF, subject.swiglu(gate_TF, up_TF))


def test_what_a_kernel_would_misread_is_refused(device):
    x_TF = torch.ones(4, 6, device=device)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        subject.swiglu(x_TF[:, ::2], x_TF[:, :3])
    with pytest.raises(ValueError, match="got \\[4, 5\\]"):
        subject.swiglu_backward_(x_TF, x_TF, x_TF[:, :5])
