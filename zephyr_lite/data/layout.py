"""The layout: tokens of many segments in one row, without padding. The one thing the engine eats.

    SFT    [doc 0 | doc 1 | doc 2 ...]             each document attends causally to itself
    DPO    [prompt | chosen | rejected | prompt | chosen | rejected ...]
           chosen continues the prompt; rejected restarts at the prompt's length and attends to the
           prompt's keys and its own, as if the chosen answer were not there

Attention is a list of *segments*. The queries of a segment are `q_len` tokens from `q_start`; its
keys are its context, `c_len` tokens from `c_start` (0 when there is none), followed by those same
tokens, under a causal mask aligned to the bottom right. A pair is two segments: (q = prompt +
chosen, no context) and (q = rejected, context = prompt), so the prompt is computed once. Exact.

Shapes: T tokens of the row, S segments, N scored tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from zephyr_lite.data.encoded import EncodedPair


@dataclass(frozen=True)
class Layout:
    """One micro-batch. All arrays are int64 unless said.

    rows_N: index in the row of the token whose hidden state predicts target n (the prompt's last
        token predicts the first token of both answers, so a row may occur twice).
    sequence_N: which sequence a scored token belongs to, in [0, n_sequences): the document, or
        2 * pair for chosen and 2 * pair + 1 for rejected.
    answer_N: bool, whether the target is part of an answer.
    """

    ids_T: np.ndarray
    positions_T: np.ndarray
    q_start_S: np.ndarray
    q_len_S: np.ndarray
    c_start_S: np.ndarray
    c_len_S: np.ndarray
    rows_N: np.ndarray
    targets_N: np.ndarray
    sequence_N: np.ndarray
    answer_N: np.ndarray
    n_sequences: int

    @property
    def n_tokens(self) -> int:
        """Tokens in the row."""
        return len(self.ids_T)

    @property
    def scored_lengths(self) -> np.ndarray:
        """Scored tokens of each sequence; they stand together, in the order of the sequences."""
        return np.bincount(self.sequence_N, minlength=self.n_sequences)


@dataclass
class _Builder:
    """Appends segments and scored tokens, then freezes them into a Layout."""

    ids: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    segments: list[tuple[int, int, int, int]] = field(default_factory=list)
    scored: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = field(default_factory=list)
    length: int = 0

    def add(self, ids: np.ndarray, context: tuple[int, int] = (0, 0)) -> int:
        """Append a segment behind `context` (start, length); returns where it starts."""
        start, first = self.length, context[1]
        self.ids.append(ids)
        self.positions.append(np.arange(first, first + len(ids)))
        if len(ids):
            self.segments.append((start, len(ids), *context))
        self.length += len(ids)
        return start

    def score(self, rows: np.ndarray, targets: np.ndarray, answer: np.ndarray, seq: int) -> None:
        """Note that the hidden states at `rows` predict `targets`."""
        self.scored.append((rows, targets, answer, seq))

    def freeze(self, n_sequences: int) -> Layout:
        segments = np.array(self.segments, dtype=np.int64).reshape(-1, 4)
        rows, targets, answer, sequence = zip(*self.scored, strict=True)
        lengths = [len(r) for r in rows]
        return Layout(
            ids_T=np.concatenate(self.ids).astype(np.int64),
            positions_T=np.concatenate(self.positions).astype(np.int64),
            q_start_S=segments[:, 0],
            q_len_S=segments[:, 1],
            c_start_S=segments[:, 2],
            c_len_S=segments[:, 3],
            rows_N=np.concatenate(rows).astype(np.int64),
            targets_N=np.concatenate(targets).astype(np.int64),
            sequence_N=np.repeat(np.array(sequence, np.int64), lengths),
            answer_N=np.concatenate(answer).astype(bool),
            n_sequences=n_sequences,
        )


def document_layout(
    documents: Sequence[tuple[np.ndarray, np.ndarray]], loss_on: str = "all"
) -> Layout:
    """Documents packed into one row, each attending to itself only.

    Args:
        documents: (ids, answer) per document; answer[t] says whether token t is part of an answer.
        loss_on: `all` scores every token that has a predecessor, `assistant` answers only.
    """
    builder = _Builder()
    for index, (ids, answer) in enumerate(documents):
        start = builder.add(ids)
        predicted = np.arange(1, len(ids))
        if loss_on == "assistant":
            predicted = predicted[answer[1:]]
        builder.score(start + predicted - 1, ids[predicted], answer[predicted], index)
    return builder.freeze(len(documents))


def pair_layout(pairs: Sequence[EncodedPair], share_prompt: bool = True) -> Layout:
    """Preference pairs; the answers' tokens are scored.

    Args:
        share_prompt: False lays every branch out as a sequence of its own, prompt included: the
            definition that the shared layout must agree with.
    """
    builder = _Builder()
    for index, pair in enumerate(pairs):
        n_prompt = len(pair.prompt)
        start = builder.add(np.concatenate([pair.prompt, pair.chosen]))
        last = start + n_prompt - 1
        _score_answer(builder, last, last + 1, pair.chosen, 2 * index)
        if share_prompt:
            begin = builder.add(pair.rejected, (start, n_prompt))
        else:
            last = builder.add(np.concatenate([pair.prompt, pair.rejected])) + n_prompt - 1
            begin = last + 1
        _score_answer(builder, last, begin, pair.rejected, 2 * index + 1)
    return builder.freeze(2 * len(pairs))


def _score_answer(
    builder: _Builder, prompt_last: int, begin: int, answer: np.ndarray, sequence: int
) -> None:
    """Score an answer that starts at `begin`; its first token is predicted by the prompt's last."""
    rows = begin - 1 + np.arange(len(answer))
    rows[:1] = prompt_last
    builder.score(rows, answer, np.ones(len(answer), bool), sequence)


@dataclass(frozen=True)
class Documents:
    """Tokenised documents end to end: document i is the span offsets[i] to offsets[i + 1]."""

    ids: np.ndarray  # int32
    answer: np.ndarray  # bool
    offsets: np.ndarray  # int64, one more than documents

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def span(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, answer) of a span of the stream."""
        return self.ids[start:stop], self.answer[start:stop]


def join_documents(encoded: Sequence[tuple[np.ndarray, np.ndarray]]) -> Documents:
    """Lay (ids, answer) of many documents end to end. Raises: ValueError when there is none."""
    if not encoded:
        raise ValueError("there is no document")
    lengths = [len(ids) for ids, _ in encoded]
    return Documents(
        ids=np.concatenate([ids for ids, _ in encoded]).astype(np.int32),
        answer=np.concatenate([answer for _, answer in encoded]).astype(bool),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


Row = list[tuple[int, int]]
"""A packed row: (start, stop) spans of the stream, each a segment of its own."""


def pack_masked(documents: Documents, max_length: int) -> list[Row]:
    """Rows of at most `max_length` tokens holding whole documents, best-fit decreasing.

    A document longer than a row is cut into spans, so that no token is lost.
    """
    bounds = zip(documents.offsets[:-1].tolist(), documents.offsets[1:].tolist(), strict=True)
    spans = [
        (start, min(start + max_length, last))
        for first, last in bounds
        for start in range(first, last, max_length)
    ]
    spans.sort(key=lambda span: (span[0] - span[1], span[0]))
    rows: list[Row] = []
    by_room: dict[int, list[int]] = {}
    rooms = 0  # bit r is set where some row has room for exactly r more tokens
    for start, stop in spans:
        size, room = stop - start, max_length
        if fitting := rooms >> size:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            row = len(rows)
            rows.append([])
        rows[row].append((start, stop))
        by_room.setdefault(room - size, []).append(row)
        rooms |= 1 << (room - size)
    return rows


def pack_wrapped(documents: Documents, max_length: int) -> list[Row]:
    """One stream cut every `max_length` tokens with no document mask, as published."""
    total = int(documents.offsets[-1])
    return [[(at, min(at + max_length, total))] for at in range(0, total, max_length)]


def fill(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Group items into bins of at most `budget`, first-fit decreasing; deterministic.

    An item larger than the budget gets a bin of its own. Returns indices into `sizes`.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for slot, left in enumerate(room):
            if sizes[index] <= left:
                bins[slot].append(index)
                room[slot] -= sizes[index]
                break
        else:
            bins.append([index])
            room.append(budget - sizes[index])
    return bins


@dataclass(frozen=True)
class Order:
    """Which examples each optimizer step sees: a pure function of (seed, epoch, position).

    The last step of an epoch holds what is left over, so that every example is seen once an epoch.
    """

    n_examples: int
    batch_size: int
    epochs: float
    seed: int
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass."""
        return -(-self.n_examples // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        steps = math.ceil(self.epochs * self.steps_per_epoch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def step(self, step: int) -> list[int]:
        """Indices of the examples of optimizer step `step` (0-based)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        start = at * self.batch_size
        return self.epoch(epoch)[start : start + self.batch_size].tolist()

    def epoch(self, epoch: int) -> np.ndarray:
        """The permutation of one epoch. Raw Philox bits are stable across numpy versions."""
        key = np.array([self.seed, epoch], np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.n_examples), kind="stable")
