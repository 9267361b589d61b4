"""The GPU's attention by xformers, where it is chosen: the same call under its bottom-right mask.

xformers picks what computes: an installed flash-attn, torch's, or CUTLASS for fp32 and for cards
before Ampere. Its forward takes key heads that stand for several query heads; its backward does
not: there they are copied for each, and their gradients summed in fp32.

Facts of its interface (xformers 0.0.35): tensors are [1, tokens, heads, D], in the forward also
[1, tokens, key heads, heads a key head, D]; the log-sum-exp comes packed, [1, H, U], or padded,
[segments, H, longest], and goes back into the backward as it came.
"""

from __future__ import annotations

import importlib
from functools import cache, lru_cache
from typing import Any

import torch

from zephyr_kernels.varlen import Varlen


@cache
def fmha() -> Any:
    """xformers' attention. Raises: ImportError, which says what is missing."""
    # By name, for the package is an option and this one does without.
    return importlib.import_module("xformers.ops.fmha")


@cache
def computes(gpu: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether xformers computes such heads on this GPU, forward and backward: tried once."""
    heads = torch.zeros(1, 8, 1, head_width, dtype=dtype, device=gpu)
    bias = mask((8,), (8,), gpu)
    try:
        out, lse = fmha().memory_efficient_attention_forward_requires_grad(
            *(heads[:, :, None],) * 3, attn_bias=bias
        )
        fmha().memory_efficient_attention_backward(
            heads, out[:, :, 0], lse.flatten(1, 2), *(heads,) * 3, attn_bias=bias
        )
    except (NotImplementedError, ValueError):  # how it says that no operation of its takes these
        return False
    return True


@lru_cache(maxsize=8)
def mask(q_lengths: tuple[int, ...], k_lengths: tuple[int, ...], device: torch.device) -> Any:
    """xformers' mask of segments with these lengths; one for all layers of a micro-batch."""
    kind = fmha().attn_bias.BlockDiagonalCausalFromBottomRightMask
    return kind.from_seqlens(list(q_lengths), list(k_lengths), device=device)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Varlen, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [U, H, D] and xformers' lse, packed or padded."""
    copies = q.shape[1] // k.shape[1]
    keys, values = (
        plan.gather(x)[:, :, None].expand(-1, -1, copies, -1)[None]  # heads a stride of 0 apart
        for x in (k, v)
    )
    out, lse = fmha().memory_efficient_attention_forward_requires_grad(
        q.unflatten(1, (-1, copies))[None],
        keys,
        values,
        attn_bias=mask(plan.q_lengths, plan.k_lengths, q.device),
        scale=scale,
    )
    return out[0].flatten(1, 2), lse.flatten(1, 2)


def backward_(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Varlen,
    scale: float,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write dq, dk, dv."""
    copies = q.shape[1] // k.shape[1]
    keys, values = (head_copies(plan.gather(x), copies) for x in (k, v))
    dq, dkeys, dvalues = fmha().memory_efficient_attention_backward(
        *(x[None] for x in (dout.contiguous(), out)),
        lse,
        *(x[None] for x in (q, keys, values)),
        attn_bias=mask(plan.q_lengths, plan.k_lengths, q.device),
        scale=scale,
    )
    grads[0].copy_(dq[0])
    for grad, found in zip(grads[1:], (dkeys, dvalues), strict=True):
        plan.put_back_(grad, sum_of_copies(found[0], copies))


def head_copies(x_TJD: torch.Tensor, copies: int) -> torch.Tensor:
    """Each key head for every query head that reads it: [T, J * copies, D]."""
    return x_TJD if copies == 1 else x_TJD.repeat_interleave(copies, 1)


def sum_of_copies(grad_THD: torch.Tensor, copies: int) -> torch.Tensor:
    """The adjoint of `head_copies`: [T, J, D], added in fp32 (fp64 for fp64), rounded once."""
    if copies == 1:
        return grad_THD
    wide = torch.float64 if grad_THD.dtype == torch.float64 else torch.float32
    return grad_THD.unflatten(1, (-1, copies)).sum(2, dtype=wide).to(grad_THD.dtype)
