"""Triton kernels of `norm`: one program a row, the row in registers, each byte touched once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_fwd_kernel(
    x_ptr,  # [T, D], or unused when the sum is normed
    sum_ptr,  # [T, D]: delta, over which delta + x is written
    gain_ptr,  # [D]
    out_ptr,  # [T, D]
    rstd_ptr,  # [T] fp32
    stride_xt,
    stride_st,
    stride_ot,
    width,
    eps,
    ADD: tl.constexpr,  # norm delta + x, not x
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    x = tl.load(x_ptr + row * stride_xt + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        sum_ptrs = sum_ptr + row * stride_st + column
        x += tl.load(sum_ptrs, mask=inside, other=0.0).to(tl.float32)
        # What is normed is the sum as it is stored, rounded: the backward will read that.
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptrs, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    gain = tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    out = (x * rstd * gain).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_ot + column, out, mask=inside)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def rms_norm_bwd_kernel(
    dy_ptr,  # [T, D]: read, then dx
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D], or unused
    gain_ptr,  # [D]
    rstd_ptr,  # [T] fp32
    stride_dt,
    stride_xt,
    stride_rt,
    width,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    inside = column < width
    dy_ptrs = dy_ptr + row * stride_dt + column
    g = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    g *= tl.load(gain_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride_xt + column, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row)
    normed = x * rstd
    dx = rstd * (g - normed * (tl.sum(g * normed, axis=0) / width))
    if HAS_RESIDUAL:
        residual_ptrs = residual_ptr + row * stride_rt + column
        dx += tl.load(residual_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(dy_ptrs, dx.to(dy_ptr.dtype.element_ty), mask=inside)
