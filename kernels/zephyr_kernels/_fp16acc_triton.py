"""Triton kernels of `fp16acc`: a row to fp16 by its power of two, and its sums back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scale_rows_kernel(
    x_ptr,  # [T, K]
    out_ptr,  # [T, K] fp16
    undo_ptr,  # [T] fp32
    stride_xt,
    stride_ot,
    width,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_K)
    inside = column < width
    x = tl.load(x_ptr + row * stride_xt + column, mask=inside, other=0.0).to(tl.float32)
    # The largest exponent as it is stored, 127 for 1; below 3 a power would underflow.
    exponents = tl.abs(x).to(tl.int32, bitcast=True) >> 23
    exponent = tl.maximum(tl.max(exponents, axis=0), 3)
    scale = ((256 - exponent) << 23).to(tl.float32, bitcast=True)
    undo = ((exponent - 2) << 23).to(tl.float32, bitcast=True)
    tl.store(out_ptr + row * stride_ot + column, (x * scale).to(tl.float16), mask=inside)
    tl.store(undo_ptr + row, undo)


@triton.jit
def unscale_rows_kernel(
    sums_ptr,  # [P, T, N] fp16
    undo_ptr,  # [T] fp32
    out_ptr,  # [T, N]; may be where the only piece lies
    stride_sp,
    stride_st,
    stride_ot,
    width,
    tiles,  # programs a row
    PIECES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < width
    sums_ptrs = sums_ptr + row * stride_st + column
    total = tl.load(sums_ptrs, mask=inside, other=0.0).to(tl.float32)
    for piece in range(1, PIECES):
        piece_ptrs = sums_ptrs + piece * stride_sp
        total += tl.load(piece_ptrs, mask=inside, other=0.0).to(tl.float32)
    out = total * tl.load(undo_ptr + row)
    tl.store(out_ptr + row * stride_ot + column, out.to(out_ptr.dtype.element_ty), mask=inside)
