"""The GPU's attention: one variable-length flash call over all segments of a row.

torch ships FlashAttention-2 behind two aten operations. Its causal mask is aligned bottom right,
so a segment of q queries and k >= q keys is exactly ours; keys are gathered once per segment, so
that a shared prompt's stand before each of its answers. A key that was copied gets its gradients
added in a fixed order: first as a segment's own, then context by context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from zephyr_kernels.segments import Segment


@dataclass(frozen=True)
class Varlen:
    """Cumulative lengths (int32, on the device), the longest, and the rows of the gathered keys.

    key_rows: for each gathered key its token, or None where keys are the row itself.
    own: (position among the gathered, token) of every key's own copy; contexts: for each further
        copy of a span the two places and its length.
    """

    cu_q: torch.Tensor
    cu_k: torch.Tensor
    longest_q: int
    longest_k: int
    key_rows: torch.Tensor | None
    own: torch.Tensor
    own_tokens: torch.Tensor
    contexts: tuple[tuple[int, int, int], ...]


def takes(x: torch.Tensor) -> bool:
    """Whether flash attention computes these heads where they lie."""
    return x.is_cuda and computes(x.device, x.dtype, x.shape[-1])


def computes(gpu: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether flash attention computes such heads on this GPU (Ampere and later)."""
    if dtype not in (torch.bfloat16, torch.float16) or head_width > 256 or head_width % 8:
        return False
    return torch.cuda.get_device_capability(gpu)[0] >= 8


def plan(segments: Sequence[Segment], n_keys: int, device: torch.device) -> Varlen:
    """Where each segment's queries and keys lie in the variable-length call.

    Keys are the row itself only where every one is some segment's: the call writes no gradient of
    the others.
    """
    q_lengths, k_lengths, rows, own, tokens, contexts = [], [], [], [], [], []
    done, is_row = 0, True
    for s in segments:
        n_own = s.lead + s.q_len
        spans = ((s.c_start, s.c_len), (s.k_start, n_own))
        rows += [torch.arange(at, at + n) for at, n in spans]
        if s.c_len:
            contexts.append((done, s.c_start, s.c_len))
        own.append(torch.arange(done + s.c_len, done + s.c_len + n_own))
        tokens.append(rows[-1])
        is_row &= s.c_len == 0 and s.k_start == done
        done += s.c_len + n_own
        q_lengths.append(s.q_len)
        k_lengths.append(s.c_len + n_own)
    cu_q, cu_k = (
        torch.tensor([0, *x]).cumsum(0).to(device, torch.int32) for x in (q_lengths, k_lengths)
    )
    return Varlen(
        cu_q,
        cu_k,
        max(q_lengths),
        max(k_lengths),
        None if is_row and done == n_keys else torch.cat(rows).to(device),
        torch.cat(own).to(device),
        torch.cat(tokens).to(device),
        tuple(contexts),
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Varlen, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [U, H, D] and lse [U, H]."""
    keys, values = _gather(k, plan), _gather(v, plan)
    out, lse_HU, *_ = torch.ops.aten._flash_attention_forward(
        q, keys, values, plan.cu_q, plan.cu_k, plan.longest_q, plan.longest_k,
        0.0, True, False, scale=scale,
    )  # fmt: skip
    return out, lse_HU.T


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
    """Write dq, dk, dv; without dropout the random state that the operation asks for is unused."""
    keys, values = _gather(k, plan), _gather(v, plan)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        dout.contiguous(), q, keys, values, out, lse.T.contiguous(), plan.cu_q, plan.cu_k,
        plan.longest_q, plan.longest_k, 0.0, True, unused, unused, scale=scale,
    )  # fmt: skip
    grads[0].copy_(found[0])
    for grad, copies in zip(grads[1:], found[1:], strict=True):
        if plan.key_rows is None:
            grad.copy_(copies)
            continue
        grad.zero_()
        grad[plan.own_tokens] = copies[plan.own]
        for at, c_at, n in plan.contexts:
            grad[c_at : c_at + n] += copies[at : at + n]


def _gather(x: torch.Tensor, plan: Varlen) -> torch.Tensor:
    return x if plan.key_rows is None else x[plan.key_rows]
