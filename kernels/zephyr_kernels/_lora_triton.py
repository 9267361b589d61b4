"""Triton kernels of `lora`: tiles of X, dX or dY are read once for all the adapters that need them.

Up to three pieces, runs of rows of the stacked A with a dropout of their own, share a launch; each
comes as its first row, its end, the hash its mask starts at and its threshold (0 keeps all).
Rounds are those of `reference`: what is kept is multiplied by the scale in fp32, after the product.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep(row, column, start, threshold, WIDTH: tl.constexpr):
    """`reference.dropout_mask` at rows x columns of a matrix of that width."""
    # Half of row * WIDTH + column in 32 bits that wrap around, without 64-bit arithmetic between.
    shifted = row[:, None] * (WIDTH % 2) + column[None, :]
    counter = row[:, None].to(tl.uint32) * (WIDTH // 2) + (shifted >> 1).to(tl.uint32)
    bits = counter ^ start.to(tl.uint32)
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    bits = bits ^ (bits >> 15)
    lane = tl.where((shifted & 1) == 1, bits >> 16, bits & 0xFFFF)
    return lane.to(tl.int32) >= threshold


@triton.jit
def scale_of(threshold):
    """What a kept value is multiplied with."""
    return 65536.0 / (65536 - threshold).to(tl.float32)


@triton.jit
def _shrink_step(s, x, a_ptr, row, column, first, end, start, threshold, stride_ar,
                 WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """s + drop(x) a', with one piece of a and one tile of its columns."""
    rank = first + tl.arange(0, BLOCK_R)
    a = tl.load(
        a_ptr + rank[None, :].to(tl.int64) * stride_ar + column[:, None],
        mask=(rank < end)[None, :] & (column < WIDTH)[:, None],
        other=0.0,
    )
    dropped = tl.where(keep(row, column, start, threshold, WIDTH), x, tl.zeros_like(x))
    return tl.dot(dropped, a, s, input_precision="ieee")


@triton.jit
def _shrink_store(s_ptr, s, row, tokens, first, end, threshold, stride_st, BLOCK_R: tl.constexpr):
    rank = first + tl.arange(0, BLOCK_R)
    s = (s * scale_of(threshold)).to(s_ptr.dtype.element_ty)
    inside = (row < tokens)[:, None] & (rank < end)[None, :]
    tl.store(s_ptr + row[:, None].to(tl.int64) * stride_st + rank[None, :], s, mask=inside)


# Seeds and lengths change at every step: a kernel that was compiled for their divisors would be
# compiled again and again.
VARYING = [
    "tokens",
    *(f"{name}{i}" for name in ("first", "end", "start", "threshold") for i in "012"),
]


@triton.jit(do_not_specialize=VARYING)
def shrink_kernel(
    x_ptr,  # [T, I]
    a_ptr,  # [R, I]
    s_ptr,  # [T, R]
    stride_xt,
    stride_ar,
    stride_st,
    tokens,
    first0, end0, start0, threshold0,
    first1, end1, start1, threshold1,
    first2, end2, start2, threshold2,
    WIDTH: tl.constexpr,  # I
    PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """S = drop(X) A': one program per BLOCK_T rows, which walks along I once."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    s1 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    s2 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for i in range(0, WIDTH, BLOCK_I):
        column = i + tl.arange(0, BLOCK_I)
        inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * stride_xt + column[None, :], mask=inside, other=0.0
        )
        s0 = _shrink_step(s0, x, a_ptr, row, column, first0, end0, start0, threshold0,
                          stride_ar, WIDTH, BLOCK_R)  # fmt: skip
        if PIECES > 1:
            s1 = _shrink_step(s1, x, a_ptr, row, column, first1, end1, start1, threshold1,
                              stride_ar, WIDTH, BLOCK_R)  # fmt: skip
        if PIECES > 2:
            s2 = _shrink_step(s2, x, a_ptr, row, column, first2, end2, start2, threshold2,
                              stride_ar, WIDTH, BLOCK_R)  # fmt: skip
    _shrink_store(s_ptr, s0, row, tokens, first0, end0, threshold0, stride_st, BLOCK_R)
    if PIECES > 1:
        _shrink_store(s_ptr, s1, row, tokens, first1, end1, threshold1, stride_st, BLOCK_R)
    if PIECES > 2:
        _shrink_store(s_ptr, s2, row, tokens, first2, end2, threshold2, stride_st, BLOCK_R)


@triton.jit(do_not_specialize=["tokens"])
def rank_backward_kernel(
    dy_ptr,  # [T, N]
    s_ptr,  # [T, R]
    b_ptr,  # [N, R]
    ds_ptr,  # fp32 [N / BLOCK_N, T, R]: to be summed over the first
    db_ptr,  # fp32 [T / CHUNK_T, N, R]: to be summed over the first
    stride_dt,
    stride_st,
    stride_bn,
    tokens,
    WIDTH: tl.constexpr,  # N
    RANK: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS = dY B and dB = dY' S from one read of dY: a program has CHUNK_T x BLOCK_N of it."""
    chunk, strip = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    in_b = (column < WIDTH)[:, None] & (rank < RANK)[None, :]
    b = tl.load(b_ptr + column[:, None] * stride_bn + rank[None, :], mask=in_b, other=0.0)
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for t in range(0, CHUNK_T, BLOCK_T):
        row = chunk * CHUNK_T + t + tl.arange(0, BLOCK_T)
        in_dy = (row < tokens)[:, None] & (column < WIDTH)[None, :]
        in_s = (row < tokens)[:, None] & (rank < RANK)[None, :]
        dy = tl.load(
            dy_ptr + row[:, None].to(tl.int64) * stride_dt + column[None, :], mask=in_dy, other=0.0
        )
        s = tl.load(
            s_ptr + row[:, None].to(tl.int64) * stride_st + rank[None, :], mask=in_s, other=0.0
        )
        ds = tl.dot(dy, b, input_precision="ieee")
        ds_ptrs = ds_ptr + (strip * tokens + row)[:, None] * RANK + rank[None, :]
        tl.store(ds_ptrs, ds, mask=in_s)
        db = tl.dot(tl.trans(dy), s, db, input_precision="ieee")
    db_row = chunk.to(tl.int64) * WIDTH + column
    tl.store(db_ptr + db_row[:, None] * RANK + rank[None, :], db, mask=in_b)


@triton.jit
def _a_step(da, x, ds_ptr, row, column, tokens, first, end, start, threshold, stride_dt,
            WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """da + ds' drop(x), with one piece of ds and one tile of its rows."""
    rank = first + tl.arange(0, BLOCK_R)
    inside = (row < tokens)[:, None] & (rank < end)[None, :]
    ds = tl.load(
        ds_ptr + row[:, None].to(tl.int64) * stride_dt + rank[None, :], mask=inside, other=0.0
    )
    dropped = tl.where(keep(row, column, start, threshold, WIDTH), x, tl.zeros_like(x))
    return tl.dot(tl.trans(ds), dropped, da, input_precision="ieee")


@triton.jit
def _a_store(da_ptr, da, chunk, column, first, end, threshold, rank_all,
             WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    rank = first + tl.arange(0, BLOCK_R)
    inside = (rank < end)[:, None] & (column < WIDTH)[None, :]
    at = (chunk * rank_all + rank).to(tl.int64) * WIDTH
    tl.store(da_ptr + at[:, None] + column[None, :], da * scale_of(threshold), mask=inside)


@triton.jit(do_not_specialize=VARYING)
def a_backward_kernel(
    ds_ptr,  # [T, R]
    x_ptr,  # [T, I]
    da_ptr,  # fp32 [T / CHUNK_T, R, I]: to be summed over the first
    stride_dt,
    stride_xt,
    rank_all,  # R
    tokens,
    first0, end0, start0, threshold0,
    first1, end1, start1, threshold1,
    first2, end2, start2, threshold2,
    WIDTH: tl.constexpr,  # I
    PIECES: tl.constexpr,
    CHUNK_T: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dA = dS' drop(X): a program walks down CHUNK_T rows of BLOCK_I columns of X."""
    chunk = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    da0 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    da1 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    da2 = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    for t in range(0, CHUNK_T, BLOCK_T):
        row = chunk * CHUNK_T + t + tl.arange(0, BLOCK_T)
        inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
        x = tl.load(
            x_ptr + row[:, None].to(tl.int64) * stride_xt + column[None, :], mask=inside, other=0.0
        )
        da0 = _a_step(da0, x, ds_ptr, row, column, tokens, first0, end0, start0, threshold0,
                      stride_dt, WIDTH, BLOCK_R)  # fmt: skip
        if PIECES > 1:
            da1 = _a_step(da1, x, ds_ptr, row, column, tokens, first1, end1, start1, threshold1,
                          stride_dt, WIDTH, BLOCK_R)  # fmt: skip
        if PIECES > 2:
            da2 = _a_step(da2, x, ds_ptr, row, column, tokens, first2, end2, start2, threshold2,
                          stride_dt, WIDTH, BLOCK_R)  # fmt: skip
    _a_store(da_ptr, da0, chunk, column, first0, end0, threshold0, rank_all, WIDTH, BLOCK_R)
    if PIECES > 1:
        _a_store(da_ptr, da1, chunk, column, first1, end1, threshold1, rank_all, WIDTH, BLOCK_R)
    if PIECES > 2:
        _a_store(da_ptr, da2, chunk, column, first2, end2, threshold2, rank_all, WIDTH, BLOCK_R)


@triton.jit
def _input_step(ds_ptr, a_ptr, row, column, tokens, first, end, start, threshold,
                stride_dt, stride_ar, WIDTH: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """mask * (ds a) * scale of one piece on one tile."""
    rank = first + tl.arange(0, BLOCK_R)
    in_ds = (row < tokens)[:, None] & (rank < end)[None, :]
    in_a = (rank < end)[:, None] & (column < WIDTH)[None, :]
    ds = tl.load(
        ds_ptr + row[:, None].to(tl.int64) * stride_dt + rank[None, :], mask=in_ds, other=0.0
    )
    a_ptrs = a_ptr + rank[:, None].to(tl.int64) * stride_ar + column[None, :]
    a = tl.load(a_ptrs, mask=in_a, other=0.0)
    grad = tl.dot(ds, a, input_precision="ieee") * scale_of(threshold)
    return tl.where(keep(row, column, start, threshold, WIDTH), grad, 0.0)


@triton.jit(do_not_specialize=VARYING)
def input_backward_kernel(
    dx_ptr,  # [T, I]: read, then written
    ds_ptr,  # [T, R]
    a_ptr,  # [R, I]
    stride_xt,
    stride_dt,
    stride_ar,
    tokens,
    first0, end0, start0, threshold0,
    first1, end1, start1, threshold1,
    first2, end2, start2, threshold2,
    WIDTH: tl.constexpr,  # I
    PIECES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dX += sum over pieces of mask * (dS A) * scale: one tile of dX a program."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    inside = (row < tokens)[:, None] & (column < WIDTH)[None, :]
    dx_ptrs = dx_ptr + row[:, None].to(tl.int64) * stride_xt + column[None, :]
    dx = tl.load(dx_ptrs, mask=inside, other=0.0).to(tl.float32)
    dx += _input_step(ds_ptr, a_ptr, row, column, tokens, first0, end0, start0,
                      threshold0, stride_dt, stride_ar, WIDTH, BLOCK_R)  # fmt: skip
    if PIECES > 1:
        dx += _input_step(ds_ptr, a_ptr, row, column, tokens, first1, end1, start1,
                          threshold1, stride_dt, stride_ar, WIDTH, BLOCK_R)  # fmt: skip
    if PIECES > 2:
        dx += _input_step(ds_ptr, a_ptr, row, column, tokens, first2, end2, start2,
                          threshold2, stride_dt, stride_ar, WIDTH, BLOCK_R)  # fmt: skip
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
