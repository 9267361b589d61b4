"""Attention over packed rows: two layouts, every backend torch has for them, and the truth.

Shapes: T tokens of a row, H query heads, J key/value heads, K head dimension. A layout cuts the
row into query segments; each attends to a span of keys whose end is aligned with its own
(bottom-right causal). For a shared prompt the keys are the row's, gathered: [prompt | chosen] for
the first segment and a copy of [prompt | rejected] for the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sequence:
    """What one position of the row would see in a row of its own: for the truth, no kernel.

    index: positions of the row, in order; kept: how many of the first are another's outputs.
    """

    index: torch.Tensor
    kept: int


@dataclass
class Layout:
    """A row of T tokens. q_lengths, k_lengths: one entry per segment, k >= q.

    gather: row positions of the keys, None where keys are the row itself. segment_T, branch_T:
    document of a token, and 0 for what all see, 1 or 2 for a branch of it.
    """

    q_lengths: list[int]
    k_lengths: list[int]
    gather: torch.Tensor | None
    segment_T: torch.Tensor
    branch_T: torch.Tensor
    sequences: list[Sequence] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(self.q_lengths)

    @property
    def scores(self) -> int:
        """Query-key pairs that are not masked; 4 K FLOPs each in the forward of one head."""
        pairs = zip(self.q_lengths, self.k_lengths, strict=True)
        return sum(q * (k - q) + q * (q + 1) // 2 for q, k in pairs)

    @cached_property
    def cu_q(self) -> torch.Tensor:
        """Cumulative query lengths, int32, on the device."""
        return self._cumulate(self.q_lengths)

    @cached_property
    def cu_k(self) -> torch.Tensor:
        """Cumulative key lengths, int32, on the device."""
        return self._cumulate(self.k_lengths)

    def _cumulate(self, lengths: list[int]) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device=self.segment_T.device, dtype=torch.int32)

    def keys(self, x_TJK: torch.Tensor) -> torch.Tensor:
        """The keys or values that the segments attend to; its gradient sums the copies."""
        return x_TJK if self.gather is None else x_TJK.index_select(0, self.gather)


def pack_documents(lengths: list[int], device: torch.device) -> Layout:
    """Documents one after another, each causal in itself."""
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    sequences = [
        Sequence(torch.arange(start, end, device=device), 0) for start, end in pairwise(ends)
    ]
    segment_T = torch.repeat_interleave(torch.tensor(lengths)).to(device)
    return Layout(lengths, lengths, None, segment_T, torch.zeros_like(segment_T), sequences)


def pack_pairs(pairs: list[tuple[int, int, int]], device: torch.device) -> Layout:
    """[prompt | chosen | rejected] per preference pair; lengths (p >= 0, c >= 1, r >= 1)."""
    q_lengths, k_lengths, gathers, segments, branches, sequences = [], [], [], [], [], []
    start = 0
    for number, (p, c, r) in enumerate(pairs):
        row = torch.arange(start, start + p + c + r, device=device)
        first, second = row[: p + c], torch.cat((row[:p], row[p + c :]))
        q_lengths += [p + c, r]
        k_lengths += [p + c, p + r]
        gathers += [first, second]
        sequences += [Sequence(first, 0), Sequence(second, p)]
        segments.append(torch.full_like(row, number))
        branches.append(torch.tensor([0] * p + [1] * c + [2] * r, device=device))
        start += p + c + r
    return Layout(
        q_lengths,
        k_lengths,
        torch.cat(gathers),
        torch.cat(segments),
        torch.cat(branches),
        sequences,
    )


# ---- truth


def attend_plainly(
    q_THK: torch.Tensor, k_TJK: torch.Tensor, v_TJK: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Softmax attention written out, one sequence at a time, every prompt recomputed per branch.

    In fp64 inputs it is the truth; in bf16 inputs (softmax in fp32) the eager path to compare with.
    """
    group = q_THK.shape[1] // k_TJK.shape[1]
    parts = []
    for sequence in layout.sequences:
        q, k, v = (x[sequence.index].transpose(0, 1) for x in (q_THK, k_TJK, v_TJK))
        k, v = (x.repeat_interleave(group, dim=0) for x in (k, v))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        precise = scores if scores.dtype == torch.float64 else scores.float()
        weights = precise.masked_fill(future, float("-inf")).softmax(-1).to(q.dtype)
        parts.append((weights @ v).transpose(0, 1)[sequence.kept :])
    return torch.cat(parts)


# ---- backends: each builder does what is done once per layout, and returns the call to time


def build_varlen(layout: Layout) -> Attend:
    """torch's varlen flash attention with native GQA: the public function, whose arguments
    changed between releases; the ATen operator under it where there is none."""
    lengths = (layout.cu_q, layout.cu_k, max(layout.q_lengths), max(layout.k_lengths))
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        forward = torch.ops.aten._flash_attention_forward

        def attend_aten(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return forward(q, layout.keys(k), layout.keys(v), *lengths, 0.0, True, False)[0]

        return attend_aten
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    )
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    call: Any = varlen_attn  # a tensor, as no auxiliary output is asked for
    return lambda q, k, v: call(q, layout.keys(k), layout.keys(v), *lengths, **options)


def build_varlen_expanded(layout: Layout) -> Attend:
    """The same with keys and values repeated to all query heads before the call."""
    attend = build_varlen(layout)

    def attend_expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[1] // k.shape[1]
        return attend(q, k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1))

    return attend_expanded


def build_sdpa_segments(layout: Layout) -> Attend:
    """One scaled_dot_product_attention call per segment: the path of machines without varlen."""
    from torch.nn.attention.bias import causal_lower_right

    masks = [
        None if q == k else causal_lower_right(q, k)
        for q, k in zip(layout.q_lengths, layout.k_lengths, strict=True)
    ]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        queries = q.split(layout.q_lengths)
        keys = layout.keys(k).split(layout.k_lengths)
        values = layout.keys(v).split(layout.k_lengths)
        outs = []
        for q_i, k_i, v_i, mask in zip(queries, keys, values, masks, strict=True):
            q_HSK, k_JSK, v_JSK = (x.transpose(0, 1)[None] for x in (q_i, k_i, v_i))
            out = F.scaled_dot_product_attention(
                q_HSK, k_JSK, v_JSK, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    return attend


def build_sdpa_flash(layout: Layout) -> Attend:
    """One batched SDPA call, flash backend only. Raises: RuntimeError for unequal segments."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    length = layout.q_lengths[0]
    if layout.gather is not None or set(layout.q_lengths) != {length}:
        raise RuntimeError("batched SDPA needs segments of one length")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def build_flex(layout: Layout) -> Attend:
    """Compiled FlexAttention with the layout as a block mask; no key is copied."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    segment_T, branch_T = layout.segment_T, layout.branch_T

    def sees(
        batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        is_same = segment_T[q] == segment_T[k]
        is_visible = (branch_T[k] == 0) | (branch_T[k] == branch_T[q])
        return is_same & is_visible & (q >= k)

    size, device = layout.tokens, segment_T.device
    mask = create_block_mask(sees, None, None, size, size, device=device)
    call: Any = flex_attention  # on a CPU, where it refuses the backward, there is no need to
    if device.type == "cuda":  # compile it first
        # One layout at a time: past the limit of recompilations it would run uncompiled.
        torch.compiler.reset()
        call = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        row = (x.transpose(0, 1)[None] for x in (q, k, v))
        return call(*row, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


BACKENDS: dict[str, Callable[[Layout], Attend]] = {
    "varlen": build_varlen,
    "varlen_expanded": build_varlen_expanded,
    "sdpa_flash": build_sdpa_flash,
    "sdpa_segments": build_sdpa_segments,
    "flex": build_flex,
}
