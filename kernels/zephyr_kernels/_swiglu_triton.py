"""Triton kernels of `swiglu`: elementwise over tiles of one row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def swiglu_fwd_kernel(
    gate_ptr,  # [T, F]
    up_ptr,  # [T, F]
    out_ptr,  # [T, F]
    stride_gt,
    stride_ut,
    stride_ot,
    width,
    tiles,  # programs a row
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < width
    gate = tl.load(gate_ptr + row * stride_gt + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_ut + column, mask=inside, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * stride_ot + column, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_bwd_kernel(
    dh_ptr,  # [T, F]: read, then h
    gate_ptr,  # [T, F]: read, then d gate
    up_ptr,  # [T, F]: read, then d up
    stride_dt,
    stride_gt,
    stride_ut,
    width,
    tiles,  # programs a row
    BLOCK_F: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64)
    column = (program % tiles) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = column < width
    dh_ptrs = dh_ptr + row * stride_dt + column
    gate_ptrs = gate_ptr + row * stride_gt + column
    up_ptrs = up_ptr + row * stride_ut + column
    dh = tl.load(dh_ptrs, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptrs, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptrs, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * s
    tl.store(dh_ptrs, (silu * up).to(dh_ptr.dtype.element_ty), mask=inside)
    d_gate = dh * up * s * (1.0 + gate * (1.0 - s))
    tl.store(gate_ptrs, d_gate.to(gate_ptr.dtype.element_ty), mask=inside)
    tl.store(up_ptrs, (dh * silu).to(up_ptr.dtype.element_ty), mask=inside)
