"""RMSNorm, alone or of a residual sum, and its backward. The gain is frozen and gets no gradient.

    rstd = (mean_d(x^2) + eps)^-1/2        y = x * rstd * gain
    g = dy * gain,  n = x * rstd:          dx = rstd * (g - n * mean_d(g * n)) + residual

`add_rms_norm_` writes delta + x over delta and norms the sum, so that the residual stream is read
once where a separate addition reads it twice. The backward adds the gradient that came down the
residual stream in the same pass.

Shapes: T tokens, D hidden width. Rows are contiguous; the distance between them is free, so `out`
may be the first D columns of an augmented operand [T, D + R].

Bytes moved a token at D = 4096 in bf16: rms_norm 16 kB (read x, write y); add_rms_norm_ 32 kB (read
delta and x, write the sum and y); backward 24 kB (read dy and x, write dx), 32 kB with a residual.

One program a row, which stays in registers: BLOCK_D = next power of 2 of D, 16 values a thread.
No atomics and one order of summation: the same input gives the same bits.

Source: Zhang and Sennrich, arXiv 1910.07467.
Reference: `reference.rms_norm`, `reference.rms_norm_backward_`.
"""

from __future__ import annotations

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch
from zephyr_kernels.rows import row_strides


def rms_norm(
    x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float, out_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """y = x * rstd * gain.

    Args:
        x_TD: fp64, fp32, bf16 or fp16, rows contiguous.
        gain_D: contiguous, any float dtype.
        out_TD: where y goes; its dtype is y's. A new tensor like x without it.
    Returns: y_TD and rstd_T (fp32; fp64 for fp64), which the backward takes.
    Raises: ValueError if shapes differ or rows are not contiguous.
    """
    out_TD = _place(x_TD, gain_D, out_TD)
    strides = row_strides(x_TD, out_TD)
    if runs_triton(x_TD):
        return out_TD, _launch_fwd(x_TD, None, gain_D, eps, out_TD, (strides[0], 0, strides[1]))
    return out_TD, reference.rms_norm(x_TD, gain_D, eps, out_TD)


def add_rms_norm_(
    delta_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write delta + x over delta; y is the norm of that sum, as it was rounded to delta's dtype.

    Args:
        delta_TD: what a block adds to the residual stream; becomes the stream. Rows contiguous.
        x_TD: the residual stream so far; stays as it is. Rows contiguous.
        gain_D, out_TD: as in `rms_norm`.
    Returns: y_TD and rstd_T, as `rms_norm` does.
    Raises: ValueError if shapes differ or rows are not contiguous.
    """
    out_TD = _place(x_TD, gain_D, out_TD)
    strides = row_strides(x_TD, delta_TD, out_TD)
    if runs_triton(x_TD):
        return out_TD, _launch_fwd(x_TD, delta_TD, gain_D, eps, out_TD, strides)
    delta_TD.add_(x_TD)
    return out_TD, reference.rms_norm(delta_TD, gain_D, eps, out_TD)


def rms_norm_backward_(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_T: torch.Tensor,
    residual_TD: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write d loss / dx over dy and return it.

    Args:
        dy_TD: d loss / dy, rows contiguous.
        x_TD: what was normed: x of `rms_norm`, the sum of `add_rms_norm_`.
        rstd_T: what the forward returned.
        residual_TD: added to the result: the gradient of the stream that x is a part of.
    Raises: ValueError if shapes differ or rows are not contiguous.
    """
    _check_gain(x_TD, gain_D)
    if rstd_T.shape != x_TD.shape[:1] or not rstd_T.is_contiguous():
        raise ValueError(f"rstd must be contiguous [{len(x_TD)}], got {list(rstd_T.shape)}")
    given = () if residual_TD is None else (residual_TD,)
    strides = row_strides(dy_TD, x_TD, *given)
    if runs_triton(x_TD):
        _launch_bwd(dy_TD, x_TD, gain_D, rstd_T, residual_TD, strides)
        return dy_TD
    return reference.rms_norm_backward_(dy_TD, x_TD, gain_D, rstd_T, residual_TD)


def _launch_fwd(
    x_TD: torch.Tensor,
    sum_TD: torch.Tensor | None,
    gain_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor,
    strides: tuple[int, ...],
) -> torch.Tensor:
    from zephyr_kernels._norm_triton import rms_norm_fwd_kernel

    tokens, width = x_TD.shape
    rstd_T = torch.empty(tokens, dtype=torch.float32, device=x_TD.device)
    if tokens:
        block, warps = _tile(width)
        launch(
            rms_norm_fwd_kernel, (tokens,),
            x_TD, sum_TD, gain_D, out_TD, rstd_T, *strides, width, eps,
            ADD=sum_TD is not None, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return rstd_T


def _launch_bwd(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gain_D: torch.Tensor,
    rstd_T: torch.Tensor,
    residual_TD: torch.Tensor | None,
    strides: tuple[int, ...],
) -> None:
    from zephyr_kernels._norm_triton import rms_norm_bwd_kernel

    tokens, width = x_TD.shape
    if not tokens:
        return
    block, warps = _tile(width)
    stride_r = strides[2] if residual_TD is not None else 0
    launch(
        rms_norm_bwd_kernel, (tokens,),
        dy_TD, x_TD, residual_TD, gain_D, rstd_T, strides[0], strides[1], stride_r, width,
        HAS_RESIDUAL=residual_TD is not None, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip


def _tile(width: int) -> tuple[int, int]:
    """BLOCK_D and the number of warps: 16 values a thread, two 16-byte loads of bf16."""
    block = 1 << max(width - 1, 0).bit_length()
    return block, min(max(block // 512, 1), 16)


def _place(x_TD: torch.Tensor, gain_D: torch.Tensor, out_TD: torch.Tensor | None) -> torch.Tensor:
    _check_gain(x_TD, gain_D)
    if out_TD is not None:
        return out_TD
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)


def _check_gain(x_TD: torch.Tensor, gain_D: torch.Tensor) -> None:
    if gain_D.shape != x_TD.shape[-1:] or not gain_D.is_contiguous():
        raise ValueError(f"gain must be contiguous [{x_TD.shape[-1]}], got {list(gain_D.shape)}")
