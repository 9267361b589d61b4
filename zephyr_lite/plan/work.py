"""Work: what one micro-batch asks of memory and time, counted from its layout or from lengths.

tokens   T     rows of every product
needed   U     rows of the last layer's queries: from the first token of a segment that predicts
               something to its last
scored   N     scored tokens, rows of the head
scores   S     unmasked query-key pairs of one head of a layer
keys     E     keys of one variable-length call: a shared prompt counts once per segment
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from zephyr_lite.data.layout import Layout


@dataclass(frozen=True)
class Work:
    """Counts of one micro-batch; see the module. longest: positions of its longest sequence.

    queries, contexts: lengths of each segment and of its context, tokens.
    """

    tokens: int
    needed: int
    scored: int
    scores: int
    keys: int
    longest: int
    queries: tuple[int, ...]
    contexts: tuple[int, ...]
    sequences: int


def work_of(layout: Layout) -> Work:
    """Count a layout."""
    rows = np.unique(layout.rows_N)
    needed = 0
    for start, length in zip(layout.q_start_S.tolist(), layout.q_len_S.tolist(), strict=True):
        inside = rows[np.searchsorted(rows, start) : np.searchsorted(rows, start + length)]
        needed += int(inside[-1] - inside[0]) + 1 if len(inside) else 0
    longest = int(layout.positions_T.max()) + 1 if layout.n_tokens else 0
    counts = (needed, len(layout.targets_N), longest, layout.n_sequences)
    return _counted(layout.q_len_S.tolist(), layout.c_len_S.tolist(), *counts)


def documents_work(lengths: Sequence[int], scored: int | None = None) -> Work:
    """Packed documents of these lengths, tokens; `scored` of them (default: all that can be)."""
    predicting = sum(n - 1 for n in lengths)
    counts = (predicting, predicting if scored is None else scored, max(lengths, default=0))
    return _counted(list(lengths), [0] * len(lengths), *counts, len(lengths))


def pairs_work(pairs: Iterable[tuple[int, int, int]]) -> Work:
    """Pairs of these (prompt, chosen, rejected) lengths, tokens, the prompt shared."""
    queries, contexts, needed, scored, longest = [], [], 0, 0, 0
    for prompt, chosen, rejected in pairs:
        queries += [prompt + chosen, rejected]
        contexts += [0, prompt]
        # The prompt's last token predicts both first tokens; an answer's last predicts nothing.
        needed += max(chosen, 1) + max(rejected - 1, 0)
        scored += chosen + rejected
        longest = max(longest, prompt + max(chosen, rejected))
    return _counted(queries, contexts, needed, scored, longest, len(queries))


def _counted(
    queries: Sequence[int],
    contexts: Sequence[int],
    needed: int,
    scored: int,
    longest: int,
    sequences: int,
) -> Work:
    real = [(q, c) for q, c in zip(queries, contexts, strict=True) if q]
    return Work(
        tokens=sum(q for q, _ in real),
        needed=needed,
        scored=scored,
        scores=sum(q * c + q * (q + 1) // 2 for q, c in real),
        keys=sum(q + c for q, c in real),
        longest=longest,
        queries=tuple(q for q, _ in real),
        contexts=tuple(c for _, c in real),
        sequences=sequences,
    )
