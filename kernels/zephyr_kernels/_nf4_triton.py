"""Triton kernel of `nf4`: a program unpacks two runs of blocks, scales resolved in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _read_run(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    scale_ptr,
    offset,
    first_block,
    blocks,
    bytes,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The bytes of the run that starts at `first_block`, and the fp32 scale of each byte.

    Flat, [BLOCKS * 32]: only in one dimension do all Triton versions keep what a thread loaded in
    that thread until it is stored. In two, 3.6 sends it through shared memory.
    """
    block = tl.arange(0, BLOCKS)
    inside = block < blocks - first_block
    absmax = tl.load(absmax_ptr + first_block + block, mask=inside, other=0)
    byte = tl.arange(0, BLOCKS * 32)
    first_byte = first_block * 32
    pair = tl.load(packed_ptr + first_byte + byte, mask=byte < bytes - first_byte, other=0)
    if NESTED:
        group = (first_block + block) // 256
        code = tl.load(code_ptr + absmax.to(tl.int32))
        # Rounded after the product and after the sum, as bitsandbytes rounds: never fused.
        scale = code * tl.load(scale_ptr + group, mask=inside, other=0.0) + offset
    else:
        scale = absmax.to(tl.float32)
    scale_of_byte = tl.broadcast_to(scale[:, None], (BLOCKS, 32))
    return pair.to(tl.int32), tl.reshape(scale_of_byte, (BLOCKS * 32,))


@triton.jit
def _write_run(
    pair,
    scale,
    levels_ptr,
    out_ptr,
    stride_on,
    first_block,
    weights,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Store levels[nibble] * scale at the row and column of each weight of the run."""
    high = tl.load(levels_ptr + (pair >> 4)) * scale
    low = tl.load(levels_ptr + (pair & 15)) * scale
    out = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    out = tl.reshape(out, (BLOCKS, 64))
    # Only the first weight's index is large: its row and column are the program's, the rest 32-bit.
    first = first_block * 64
    first_row, first_column = first // K, (first % K).to(tl.int32)
    start = tl.arange(0, BLOCKS)[:, None] * 64
    lane = tl.arange(0, 64)[None, :]
    if K % 64 == 0:  # a block lies in one row: one division for its 64 weights
        row = first_row + (first_column + start) // K
        column = tl.multiple_of((first_column + start) % K, (64, 64)) + lane
    else:
        row = first_row + (first_column + start + lane) // K
        column = (first_column + start + lane) % K
    tl.store(out_ptr + row * stride_on + column, out, mask=start + lane < weights - first)


@triton.jit
def dequantise_kernel(
    packed_ptr,  # [bytes] uint8, two weights each, the high nibble first
    absmax_ptr,  # [blocks]: fp32, or uint8 if NESTED
    code_ptr,  # [256] fp32, or unused
    scale_ptr,  # [blocks / 256] fp32, or unused
    levels_ptr,  # [16] fp32
    out_ptr,  # [N, K]
    offset,
    stride_on,
    weights,  # N * K
    blocks,  # weights / 64, rounded up
    bytes,  # weights / 2, rounded up
    K: tl.constexpr,
    NESTED: tl.constexpr,
    BLOCKS: tl.constexpr,  # of a run
):
    one = tl.program_id(0).to(tl.int64) * (2 * BLOCKS)
    two = one + BLOCKS
    # Both reads before the first write: their latencies overlap.
    pair_1, scale_1 = _read_run(
        packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset, one, blocks, bytes, NESTED, BLOCKS
    )
    pair_2, scale_2 = _read_run(
        packed_ptr, absmax_ptr, code_ptr, scale_ptr, offset, two, blocks, bytes, NESTED, BLOCKS
    )
    _write_run(pair_1, scale_1, levels_ptr, out_ptr, stride_on, one, weights, K, BLOCKS)
    _write_run(pair_2, scale_2, levels_ptr, out_ptr, stride_on, two, weights, K, BLOCKS)
