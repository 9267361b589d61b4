"""A row's segments as one variable-length call, whose causal mask is aligned bottom right.

A segment of q queries and k >= q keys is then exactly ours. Keys are gathered once per segment, so
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
    """Lengths of every segment's queries and keys, and the rows of the gathered keys.

    cu_q, cu_k: the lengths cumulated from 0, int32, on the device.
    key_rows: for each gathered key its token, or None where keys are the row itself.
    own: (position among the gathered, token) of every key's own copy; contexts: for each further
        copy of a span the two places and its length.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    key_rows: torch.Tensor | None
    own: torch.Tensor
    own_tokens: torch.Tensor
    contexts: tuple[tuple[int, int, int], ...]

    @property
    def longest_q(self) -> int:
        """Queries of the longest segment."""
        return max(self.q_lengths)

    @property
    def longest_k(self) -> int:
        """Keys of the segment with most of them."""
        return max(self.k_lengths)

    def gather(self, x_TJD: torch.Tensor) -> torch.Tensor:
        """Keys or values in the order of the call."""
        return x_TJD if self.key_rows is None else x_TJD[self.key_rows]

    def put_back_(self, grad_TJD: torch.Tensor, copies: torch.Tensor) -> None:
        """Write each key's gradient, the sum of its copies'."""
        if self.key_rows is None:
            grad_TJD.copy_(copies)
            return
        grad_TJD.zero_()
        grad_TJD[self.own_tokens] = copies[self.own]
        for at, c_at, n in self.contexts:
            grad_TJD[c_at : c_at + n] += copies[at : at + n]


def plan(segments: Sequence[Segment], n_keys: int, device: torch.device) -> Varlen:
    """Where each segment's queries and keys lie in the call.

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
        tuple(q_lengths),
        tuple(k_lengths),
        cu_q,
        cu_k,
        None if is_row and done == n_keys else torch.cat(rows).to(device),
        torch.cat(own).to(device),
        torch.cat(tokens).to(device),
        tuple(contexts),
    )
