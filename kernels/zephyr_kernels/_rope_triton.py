"""Triton kernel of `rope`: a program turns a few heads of one token, in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotate_kernel(
    x_ptr,  # [T, H, 2 P]: turned in place
    cos_ptr,  # [T, P] fp32
    sin_ptr,  # [T, P] fp32
    stride_xt,
    stride_xh,
    stride_ct,
    stride_st,
    heads,
    half,  # P
    groups,  # programs a token: heads / BLOCK_H, rounded up
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    program = tl.program_id(0)
    token = (program // groups).to(tl.int64)
    head = (program % groups) * BLOCK_H + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_P)
    head_inside = (head < heads)[:, None]
    pair_inside = (pair < half)[None, :]
    # Loaded once a head: from the cache, which is faster than sharing one copy behind a barrier.
    table = tl.broadcast_to(pair[None, :], (BLOCK_H, BLOCK_P))
    inside = head_inside & pair_inside
    cos = tl.load(cos_ptr + token * stride_ct + table, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + token * stride_st + table, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    head_ptrs = x_ptr + token * stride_xt + (head * stride_xh)[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_P)[None, :]
        both_inside = head_inside & (column < 2 * half)
        x = tl.load(head_ptrs + column, mask=both_inside, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_P, 2)))
        turned = tl.interleave(a * cos - b * sin, b * cos + a * sin)
        tl.store(head_ptrs + column, turned.to(x_ptr.dtype.element_ty), mask=both_inside)
    else:
        a_ptrs = head_ptrs + pair[None, :]
        b_ptrs = a_ptrs + half
        a = tl.load(a_ptrs, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptrs, mask=inside, other=0.0).to(tl.float32)
        tl.store(a_ptrs, (a * cos - b * sin).to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(b_ptrs, (b * cos + a * sin).to(x_ptr.dtype.element_ty), mask=inside)
