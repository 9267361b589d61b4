"""Triton kernels of `linear_logprob`: a program walks along a row of logits.

Log-probs and excess are two kernels: in one, the excess' narrower type would change how the row is
laid over the threads, so the order of its sum, and a training's log-probs would not be those of the
reference pass bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """c tanh(z / c), by one exponential of a negative number."""
    if HAS_SOFTCAP:
        e = tl.exp(-2.0 * tl.abs(z) / softcap)
        bounded = softcap * ((1.0 - e) / (1.0 + e))
        z = tl.where(z < 0.0, -bounded, bounded)
    return z


@triton.jit
def row_log_prob_kernel(
    logits_ptr,  # fp32 [C, V]
    target_ptr,  # int64 [C]
    logp_ptr,  # fp32 [C]
    sums_ptr,  # fp32 [C, 3]: the maximum, and over it the sum of the others and of all
    stride_lc,
    softcap,
    VOCAB: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_lc
    target = tl.load(target_ptr + row)
    chosen = capped(tl.load(logits_ptr + target), softcap, HAS_SOFTCAP)
    # Of the others only: of a sure token softmax - onehot is their share, and the difference of
    # two numbers near 1 would be mostly rounding.
    top = chosen
    others = 0.0
    for first in range(0, VOCAB, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = column < VOCAB
        z = capped(tl.load(logits_ptr + column, mask=inside, other=0.0), softcap, HAS_SOFTCAP)
        z = tl.where(inside & (column != target), z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, axis=0))
        others = others * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    total = others + tl.exp(chosen - top)
    tl.store(logp_ptr + row, chosen - top - tl.log(total))
    tl.store(sums_ptr + 3 * row, top)
    tl.store(sums_ptr + 3 * row + 1, others)
    tl.store(sums_ptr + 3 * row + 2, total)


@triton.jit
def excess_kernel(
    logits_ptr,  # fp32 [C, V]
    target_ptr,  # int64 [C]
    sums_ptr,  # fp32 [C, 3], of row_log_prob_kernel
    excess_ptr,  # [C, V]: onehot - softmax; may be the logits themselves when fp32
    stride_lc,
    stride_ec,
    softcap,
    VOCAB: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride_lc
    excess_ptr += row * stride_ec
    target = tl.load(target_ptr + row)
    top = tl.load(sums_ptr + 3 * row)
    others = tl.load(sums_ptr + 3 * row + 1)
    total = tl.load(sums_ptr + 3 * row + 2)
    for first in range(0, VOCAB, BLOCK_V):
        column = first + tl.arange(0, BLOCK_V)
        inside = column < VOCAB
        z = capped(tl.load(logits_ptr + column, mask=inside, other=0.0), softcap, HAS_SOFTCAP)
        excess = tl.where(column == target, others, -tl.exp(z - top)) / total
        if HAS_SOFTCAP:
            excess *= 1.0 - (z / softcap) * (z / softcap)
        tl.store(excess_ptr + column, excess.to(excess_ptr.dtype.element_ty), mask=inside)
