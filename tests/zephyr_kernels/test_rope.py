"""Rotary embedding against complex multiplication, against transformers, and turned back."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_within
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from zephyr_kernels import rope

# Tokens, heads, pairs a head.
SHAPES = [(1, 1, 1), (3, 2, 4), (5, 9, 3), (2, 8, 16), (3, 11, 13)]


def angles(tokens: int, pairs: int, device: torch.device) -> torch.Tensor:
    """fp64 angles of positions that restart after 3."""
    position_T = torch.arange(tokens, dtype=torch.float64, device=device) % 3 + 1
    frequency_P = 10_000.0 ** -(torch.arange(pairs, dtype=torch.float64, device=device) / pairs)
    return position_T[:, None] * frequency_P


def turned(x_THD: torch.Tensor, angle_TP: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """The truth: a pair is a complex number, the turn a product with e^(i angle)."""
    tokens, heads, width = x_THD.shape
    pairs = (width // 2, 2) if interleaved else (2, width // 2)
    x = x_THD.reshape(tokens, heads, *pairs)
    a_THP, b_THP = x.unbind(-1 if interleaved else -2)
    unit_T1P = torch.polar(torch.ones_like(angle_TP), angle_TP)[:, None]
    z_THP = torch.complex(a_THP, b_THP) * unit_T1P
    stacked = torch.stack([z_THP.real, z_THP.imag], -1 if interleaved else -2)
    return stacked.reshape(tokens, heads, width)


def tables(angle_TP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin in fp32."""
    return angle_TP.cos().float(), angle_TP.sin().float()


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
@pytest.mark.parametrize(("tokens", "heads", "pairs"), SHAPES)
def test_turns_as_complex_numbers_turn(tokens, heads, pairs, interleaved, dtype, device, normal):
    angle_TP = angles(tokens, pairs, device)
    x_THD = normal(tokens, heads, 2 * pairs, dtype=dtype)
    truth_THD = turned(x_THD.double(), angle_TP, interleaved)
    eager_THD = turned(x_THD.float(), angle_TP.float(), interleaved).to(dtype)
    rope.rotate_(x_THD, *tables(angle_TP), interleaved=interleaved)
    assert_within(x_THD, truth_THD, eager_THD)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])
def test_inverse_turns_back(interleaved, dtype, device, normal):
    x_THD = normal(5, 3, 14, dtype=dtype)
    before_THD = x_THD.clone()
    cos_TP, sin_TP = tables(angles(5, 7, device))
    rope.rotate_(x_THD, cos_TP, sin_TP, interleaved=interleaved)
    assert not torch.allclose(x_THD, before_THD, atol=0.1)
    rope.rotate_(x_THD, cos_TP, sin_TP, interleaved=interleaved, inverse=True)
    # Two roundings of the dtype and those of cos and sin.
    error = (x_THD - before_THD).float().norm() / before_THD.float().norm()
    assert error < 2 * torch.finfo(dtype).eps


def test_inverse_is_the_backward(device, normal):
    angle_TP = angles(4, 5, device)
    x_THD, dy_THD = normal(4, 2, 10).double().requires_grad_(), normal(4, 2, 10, seed=1)
    turned(x_THD, angle_TP, interleaved=False).backward(dy_THD.double())
    rope.rotate_(dy_THD, *tables(angle_TP), inverse=True)
    assert x_THD.grad is not None
    assert_within(dy_THD, x_THD.grad, x_THD.grad.float())


def test_a_packed_product_keeps_its_values(dtype, device, normal):
    """Queries and keys are a view of the first heads; the values behind them stay as they are."""
    tokens, queries, keys, width = 3, 4, 2, 8
    packed_THD = normal(tokens, queries + 2 * keys, width, dtype=dtype)
    before_THD = packed_THD.clone()
    cos_TP, sin_TP = tables(angles(tokens, width // 2, device))
    rope.rotate_(packed_THD[:, : queries + keys], cos_TP, sin_TP)
    alone_THD = before_THD[:, : queries + keys].contiguous()
    rope.rotate_(alone_THD, cos_TP, sin_TP)
    assert torch.equal(packed_THD[:, : queries + keys], alone_THD)
    assert torch.equal(packed_THD[:, queries + keys :], before_THD[:, queries + keys :])


def test_a_part_of_each_head_is_turned_alone(device, normal):
    """As in models that turn the first columns of a head only."""
    x_THD = normal(3, 2, 12)
    before_THD, alone_THD = x_THD.clone(), x_THD[..., :8].contiguous()
    cos_TP, sin_TP = tables(angles(3, 4, device))
    rope.rotate_(x_THD[..., :8], cos_TP, sin_TP)
    rope.rotate_(alone_THD, cos_TP, sin_TP)
    torch.testing.assert_close(x_THD[..., :8], alone_THD, rtol=1e-6, atol=1e-6)
    assert torch.equal(x_THD[..., 8:], before_THD[..., 8:])


def test_agrees_with_transformers(device, normal):
    q_THD, k_THD = normal(6, 4, 16), normal(6, 2, 16, seed=1)
    angle_TP = angles(6, 8, device)
    doubled_1TD = torch.cat([angle_TP, angle_TP], -1)[None].float()
    theirs = apply_rotary_pos_emb(
        q_THD.transpose(0, 1)[None],
        k_THD.transpose(0, 1)[None],
        doubled_1TD.cos(),
        doubled_1TD.sin(),
    )
    for x_THD, their_1HTD in zip((q_THD, k_THD), theirs, strict=True):
        rope.rotate_(x_THD, *tables(angle_TP))
        torch.testing.assert_close(x_THD, their_1HTD[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_fp64_is_computed_in_fp64(device, normal):
    angle_TP = angles(3, 4, device)
    x_THD = normal(3, 2, 8).double()
    truth_THD = turned(x_THD, angle_TP, interleaved=False)
    rope.rotate_(x_THD, angle_TP.cos(), angle_TP.sin())
    torch.testing.assert_close(x_THD, truth_THD, rtol=1e-14, atol=1e-14)


def test_no_tokens_are_no_work(dtype, device):
    table_TP = torch.empty(0, 4, device=device)
    rope.rotate_(torch.empty(0, 2, 8, dtype=dtype, device=device), table_TP, table_TP)


def test_what_a_kernel_would_misread_is_refused(device):
    x_THD, table_TP = torch.ones(2, 3, 8, device=device), torch.ones(2, 4, device=device)
    with pytest.raises(ValueError, match="even, got width 7"):
        rope.rotate_(x_THD[..., :7], table_TP, table_TP)
    with pytest.raises(
        ValueError, match="contiguous and even, got width 4, strides \\(24, 8, 2\\)"
    ):
        rope.rotate_(x_THD[..., ::2], table_TP[:, :2], table_TP[:, :2])
    with pytest.raises(ValueError, match=r"sin must be \[2, 4\].* got \[1, 4\]"):
        rope.rotate_(x_THD, table_TP, table_TP[:1])
