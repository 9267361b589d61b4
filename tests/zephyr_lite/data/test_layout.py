"""Layouts checked by hand, and against the meaning they must have; packing; data order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import (
    Documents,
    Layout,
    Order,
    document_layout,
    fill,
    join_documents,
    pack_masked,
    pack_wrapped,
    pair_layout,
)


def segments(layout: Layout) -> list[tuple[int, ...]]:
    """(q_start, q_len, c_start, c_len) of each segment."""
    columns = (layout.q_start_S, layout.q_len_S, layout.c_start_S, layout.c_len_S)
    return [tuple(row) for row in np.stack(columns, 1).tolist()]


def visible(layout: Layout, row: int) -> list[int]:
    """Rows that a row's query sees, nearest last, by the definition of a segment."""
    for q_start, q_len, c_start, c_len in segments(layout):
        if q_start <= row < q_start + q_len:
            return [*range(c_start, c_start + c_len), *range(q_start, row + 1)]
    raise AssertionError(f"row {row} is in no segment")


def stream(*lengths: int) -> Documents:
    """Documents of these lengths whose ids are their places in the stream."""
    ends = np.cumsum(lengths)
    spans = [np.arange(end - n, end) for n, end in zip(lengths, ends, strict=True)]
    return join_documents([(ids, ids % 2 == 0) for ids in spans])


def test_documents_by_hand() -> None:
    documents = [
        (np.array([5, 6, 7]), np.array([False, False, True])),
        (np.array([8]), np.array([True])),
        (np.array([9, 10]), np.array([True, False])),
    ]
    layout = document_layout(documents)
    assert layout.ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert layout.positions_T.tolist() == [0, 1, 2, 0, 0, 1]
    assert segments(layout) == [(0, 3, 0, 0), (3, 1, 0, 0), (4, 2, 0, 0)]
    assert layout.rows_N.tolist() == [0, 1, 4]
    assert layout.targets_N.tolist() == [6, 7, 10]
    assert layout.sequence_N.tolist() == [0, 0, 2]
    assert layout.answer_N.tolist() == [False, True, False]
    assert (layout.n_sequences, layout.n_tokens) == (3, 6)


def test_only_answers_carry_loss_when_asked() -> None:
    documents = [
        (np.array([5, 6, 7, 8]), np.array([False, True, False, True])),
        (np.array([9, 10]), np.array([True, False])),  # a first token is never predicted
    ]
    layout = document_layout(documents, "assistant")
    assert layout.rows_N.tolist() == [0, 2]
    assert layout.targets_N.tolist() == [6, 8]
    assert layout.sequence_N.tolist() == [0, 0]
    assert layout.answer_N.all()


PAIRS = [
    EncodedPair(np.array([1, 2, 3]), np.array([4, 5]), np.array([6, 7, 8])),
    EncodedPair(np.array([9]), np.array([10]), np.array([11])),
]


def test_shared_prompt_by_hand() -> None:
    layout = pair_layout(PAIRS)
    assert layout.ids_T.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert layout.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 1]
    assert segments(layout) == [(0, 5, 0, 0), (5, 3, 0, 3), (8, 2, 0, 0), (10, 1, 8, 1)]
    assert layout.rows_N.tolist() == [2, 3, 2, 5, 6, 8, 8]
    assert layout.targets_N.tolist() == [4, 5, 6, 7, 8, 10, 11]
    assert layout.sequence_N.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert layout.answer_N.all()
    assert layout.n_sequences == 4


def test_two_sequences_by_hand() -> None:
    layout = pair_layout(PAIRS[:1], share_prompt=False)
    assert layout.ids_T.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8]
    assert layout.positions_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert segments(layout) == [(0, 5, 0, 0), (5, 6, 0, 0)]
    assert layout.rows_N.tolist() == [2, 3, 7, 8, 9]
    assert layout.targets_N.tolist() == [4, 5, 6, 7, 8]
    assert layout.sequence_N.tolist() == [0, 0, 1, 1, 1]


lengths_of_pairs = st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=5)


@given(lengths_of_pairs, st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_target_is_predicted_from_its_prompt_and_its_own_past(
    sizes: list[tuple[int, int, int]], share_prompt: bool
) -> None:
    ids = iter(range(10_000))  # every token is another number, so a mix-up shows
    pairs = [EncodedPair(*(np.array([next(ids) for _ in range(n)]) for n in row)) for row in sizes]
    layout = pair_layout(pairs, share_prompt)
    truth = [
        (2 * p + side, [*pair.prompt, *answer[:n]], int(answer[n]))
        for p, pair in enumerate(pairs)
        for side, answer in enumerate((pair.chosen, pair.rejected))
        for n in range(len(answer))
    ]
    found = []
    for row, target, sequence in zip(
        layout.rows_N, layout.targets_N, layout.sequence_N, strict=True
    ):
        seen = visible(layout, row)
        assert layout.positions_T[seen].tolist() == list(range(len(seen)))
        found.append((int(sequence), layout.ids_T[seen].tolist(), int(target)))
    assert found == truth


documents_and_row = st.tuples(
    st.lists(st.integers(1, 70), min_size=1, max_size=60), st.integers(1, 40)
)


@given(documents_and_row)
@settings(max_examples=100, deadline=None)
def test_masked_packing_loses_no_token_and_is_best_fit(case: tuple[list[int], int]) -> None:
    lengths, max_length = case
    documents = stream(*lengths)
    rows = pack_masked(documents, max_length)
    sizes = [sum(stop - start for start, stop in row) for row in rows]
    assert max(sizes) <= max_length
    spans = sorted(span for row in rows for span in row)
    assert [t for start, stop in spans for t in range(start, stop)] == list(range(sum(lengths)))
    starts = np.asarray([start for start, _ in spans])
    first = np.searchsorted(documents.offsets, starts, side="right")
    assert all(stop <= documents.offsets[d] for (_, stop), d in zip(spans, first, strict=True))
    assert len(spans) == sum(-(-n // max_length) for n in lengths)  # cut only where it must be
    assert sorted(sizes) == _best_fit([stop - start for start, stop in spans], max_length)


def _best_fit(sizes: list[int], max_length: int) -> list[int]:
    """Row sizes of best-fit decreasing, written from its definition."""
    rows: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, used in enumerate(rows) if used + size <= max_length]
        if fitting:
            rows[max(fitting, key=lambda i: rows[i])] += size
        else:
            rows.append(size)
    return sorted(rows)


def test_wrapped_packing_cuts_one_stream() -> None:
    assert pack_wrapped(stream(5, 1, 6), 5) == [[(0, 5)], [(5, 10)], [(10, 12)]]
    assert pack_wrapped(stream(4, 4), 4) == [[(0, 4)], [(4, 8)]]


def test_documents_keep_their_tokens_and_answers() -> None:
    documents = stream(3, 2)
    assert len(documents) == 2
    ids, answer = documents.span(*documents.offsets[1:3].tolist())
    assert ids.tolist() == [3, 4]
    assert answer.tolist() == [False, True]
    with pytest.raises(ValueError, match="no document"):
        join_documents([])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_fill_keeps_the_budget_and_every_item(sizes: list[int], budget: int) -> None:
    bins = fill(sizes, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    used = [sum(sizes[i] for i in members) for members in bins]
    assert all(u <= budget or len(members) == 1 for u, members in zip(used, bins, strict=True))
    for later in range(len(bins)):  # first fit: what opened a bin fitted into none before it
        assert all(u + sizes[bins[later][0]] > budget for u in used[:later])
    assert fill(list(sizes), budget) == bins


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_every_example_is_seen_once_an_epoch(n: int, batch: int, seed: int) -> None:
    order = Order(n, batch, 3, seed)
    assert order.total_steps == 3 * order.steps_per_epoch
    for epoch in range(3):
        first = epoch * order.steps_per_epoch
        steps = [order.step(s) for s in range(first, first + order.steps_per_epoch)]
        assert all(len(s) == batch for s in steps[:-1])
        assert sorted(i for s in steps for i in s) == list(range(n))


def test_order_is_a_pure_function_of_seed_epoch_and_position() -> None:
    forward = [Order(20, 3, 2, 7).step(s) for s in range(14)]
    one = Order(20, 3, 2, 7)
    assert [one.step(s) for s in reversed(range(14))] == forward[::-1]
    assert forward[:7] != forward[7:], "epochs must differ"
    assert forward[0] != Order(20, 3, 2, 8).step(0), "seeds must differ"
    assert Order(20, 5, 9, 7).epoch(1).tolist() == [i for s in forward[7:] for i in s]


def test_order_is_pinned() -> None:
    """A change of these numbers breaks the resume of every run there is."""
    order = Order(10, 4, 1, 42)
    assert [order.step(s) for s in range(3)] == [[7, 1, 6, 4], [3, 5, 9, 0], [2, 8]]
    assert Order(10, 4, 1, 0).step(3) == [5, 3, 7, 8]


@pytest.mark.parametrize(
    ("epochs", "max_steps", "total"),
    [(1, None, 4), (1.5, None, 6), (0.25, None, 1), (0.01, None, 1), (3, 5, 5), (1, 99, 4)],
)
def test_steps_of_a_training(epochs: float, max_steps: int | None, total: int) -> None:
    assert Order(10, 3, epochs, 0, max_steps).total_steps == total
