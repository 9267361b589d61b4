"""Lengths: what a training's data looks like in tokens, and the micro-batches that come of it.

Optimizer steps are cut into micro-batches exactly as train/objectives.py cuts them, from sizes
alone: nothing is tokenised here, and no id is read. `estimates.py` makes lengths of data that is
not tokenised yet.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Documents, Order, Row, fill, pack_masked, pack_wrapped
from zephyr_lite.plan.work import Work, documents_work, pairs_work
from zephyr_lite.recipe import Sft

SAMPLE = 64


@dataclass(frozen=True)
class Works:
    """Micro-batches of a training under one token budget.

    steps: those of up to `sample` optimizer steps, evenly spaced. heaviest: the one with the most
    tokens of all steps; of several the first.
    """

    steps: tuple[tuple[Work, ...], ...]
    heaviest: Work


class Lengths(Protocol):
    """The data of one training.

    source: where the lengths are from, a phrase for people.
    """

    @property
    def source(self) -> str: ...

    @property
    def is_estimate(self) -> bool:
        """Whether the data was not tokenised yet."""
        ...

    @property
    def n_examples(self) -> int:
        """Examples of one epoch: packed rows, or pairs."""
        ...

    @property
    def total_tokens(self) -> int:
        """Tokens that one epoch computes."""
        ...

    def works(self, budget: int, order: Order, sample: int = SAMPLE) -> Works:
        """Micro-batches of at most `budget` tokens, longer examples alone.

        Raises: ValueError for an order of another number of examples, or without a step.
        """
        ...

    def bound(self, budget: int, batch: int | None = None) -> Work:
        """The micro-batch with the most tokens that rows of this kind could ever make: the budget
        full of the longest sequences there may be.

        Args: batch: examples of an optimizer step, which a micro-batch is a part of.
        """
        ...


@dataclass(frozen=True)
class DocumentLengths:
    """Packed rows of dSFT.

    answer: which tokens of the stream carry loss (bool); None: every token with a predecessor.
    """

    rows: Sequence[Row]
    max_length: int
    source: str
    answer: np.ndarray | None = None
    is_estimate: bool = False

    @property
    def n_examples(self) -> int:
        """See `Lengths`."""
        return len(self.rows)

    @property
    def total_tokens(self) -> int:
        """See `Lengths`."""
        return int(self._sizes_E.sum())

    def works(self, budget: int, order: Order, sample: int = SAMPLE) -> Works:
        """See `Lengths`."""
        steps, heaviest = _cut(self._sizes_E, budget, order, sample)
        cut = tuple(tuple(self._work(members) for members in micros) for micros in steps)
        return Works(cut, self._work(heaviest))

    def bound(self, budget: int, batch: int | None = None) -> Work:
        """See `Lengths`."""
        tokens = max(budget, self.max_length)
        if batch is not None:
            tokens = min(tokens, batch * self.max_length)
        full, rest = divmod(tokens, self.max_length)
        return documents_work([self.max_length] * full + [rest] * (rest > 0))

    @cached_property
    def _sizes_E(self) -> np.ndarray:
        return np.array([sum(stop - start for start, stop in row) for row in self.rows], np.int64)

    def _work(self, members: Sequence[int]) -> Work:
        spans = [span for i in members for span in self.rows[i]]
        work = documents_work([stop - start for start, stop in spans])
        if self.answer is None:
            return work
        # A document's first token has no predecessor, whoever wrote it.
        scored = [np.flatnonzero(self.answer[start + 1 : stop]) for start, stop in spans]
        needed = sum(int(at[-1] - at[0]) + 1 for at in scored if len(at))
        return dataclasses.replace(work, needed=needed, scored=sum(map(len, scored)))


@dataclass(frozen=True)
class PairLengths:
    """Pairs of dDPO: prompt, chosen and rejected tokens after the recipe's truncation.

    max_length: tokens of the longest prompt and answer that may come.
    """

    lengths_E3: np.ndarray  # int64
    max_length: int
    source: str
    is_estimate: bool = False

    @property
    def n_examples(self) -> int:
        """See `Lengths`."""
        return len(self.lengths_E3)

    @property
    def total_tokens(self) -> int:
        """See `Lengths`."""
        return int(self.lengths_E3.sum())

    def works(self, budget: int, order: Order, sample: int = SAMPLE) -> Works:
        """See `Lengths`."""
        steps, heaviest = _cut(self._sizes_E, budget, order, sample)
        cut = tuple(tuple(self._work(members) for members in micros) for micros in steps)
        return Works(cut, self._work(heaviest))

    def bound(self, budget: int, batch: int | None = None) -> Work:
        """See `Lengths`."""
        # A prompt of one token and answers that leave room for no more: nothing has more tokens.
        answer = self.max_length - 1
        size = 1 + 2 * answer
        tokens = max(budget, size) if batch is None else min(max(budget, size), batch * size)
        full, rest = divmod(tokens, size)
        pairs = [(1, answer, answer)] * full
        if rest:
            pairs.append((1, rest // 2, rest - 1 - rest // 2))
        return pairs_work(pairs)

    @cached_property
    def _sizes_E(self) -> np.ndarray:
        return self.lengths_E3.sum(1)

    def _work(self, members: Sequence[int]) -> Work:
        return pairs_work((p, c, r) for p, c, r in self.lengths_E3[list(members)].tolist())


def documents_of(documents: Documents, settings: Sft, source: str | None = None) -> DocumentLengths:
    """Lengths of tokenised dialogues, packed as the recipe packs them."""
    rows = pack(documents, settings)
    return DocumentLengths(
        rows=rows,
        max_length=settings.max_length,
        source=source or f"{len(documents):,} dialogues of this run in {len(rows):,} rows",
        answer=documents.answer if settings.loss_on == "assistant" else None,
    )


def pairs_of(pairs: Sequence[EncodedPair], source: str | None = None) -> PairLengths:
    """Lengths of tokenised pairs."""
    lengths = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
    lengths_E3 = np.array(lengths, np.int64).reshape(-1, 3)
    longest = lengths_E3[:, 0] + lengths_E3[:, 1:].max(1)
    source = source or f"{len(pairs):,} pairs of this run"
    return PairLengths(lengths_E3, int(longest.max(initial=1)), source)


def pack(documents: Documents, settings: Sft) -> list[Row]:
    """The rows that dSFT trains on; only the documents' offsets are read."""
    how = pack_wrapped if settings.packing == "wrapped" else pack_masked
    return how(documents, settings.max_length)


def heaviest(sizes_E: np.ndarray, budget: int, order: Order) -> list[int]:
    """Examples of the micro-batch with the most tokens of all steps; of several the first.

    Args: sizes_E: tokens of every example, int64.
    """
    return _cut(sizes_E, budget, order, sample=0)[1]


Members = list[int]
"""Examples of one micro-batch."""


def _cut(
    sizes_E: np.ndarray, budget: int, order: Order, sample: int
) -> tuple[list[list[Members]], Members]:
    """Micro-batches of evenly spaced steps, and the one of all steps with the most tokens."""
    if order.n_examples != len(sizes_E) or not order.total_steps:
        raise ValueError(f"an order of {order.n_examples} examples for {len(sizes_E)}")
    evenly = np.linspace(0, order.total_steps - 1, min(sample, order.total_steps))
    wanted = set(np.round(evenly).astype(int).tolist())
    steps: list[list[Members]] = []
    heaviest: Members = []
    most = 0
    for step, members, limit in _steps(sizes_E, budget, order):
        if limit <= most and step not in wanted:
            continue
        sizes = sizes_E[members]
        micros = fill(sizes.tolist(), budget)
        tokens = [int(sizes[micro].sum()) for micro in micros]
        if max(tokens) > most:
            most, heaviest = max(tokens), members[micros[tokens.index(max(tokens))]].tolist()
        if step in wanted:
            steps.append([members[micro].tolist() for micro in micros])
    return steps, heaviest


def _steps(sizes_E: np.ndarray, budget: int, order: Order) -> Iterator[tuple[int, np.ndarray, int]]:
    """(step, its examples, most tokens that a micro-batch of it may have) of every step.

    Each epoch's permutation is drawn once. A micro-batch has at most the tokens of its step, and no
    more than the budget, unless it is one longer example.
    """
    for first in range(0, order.total_steps, order.steps_per_epoch):
        members = order.epoch(first // order.steps_per_epoch)
        starts = np.arange(0, len(members), order.batch_size)
        totals = np.add.reduceat(sizes_E[members], starts)
        longest = np.maximum.reduceat(sizes_E[members], starts)
        limits = np.maximum(np.minimum(totals, budget), longest).tolist()
        for at in range(min(order.steps_per_epoch, order.total_steps - first)):
            start = at * order.batch_size
            yield first + at, members[start : start + order.batch_size], limits[at]
