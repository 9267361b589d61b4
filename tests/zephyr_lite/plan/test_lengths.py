"""Lengths: the micro-batches of a training without its ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from zephyr_lite.data.layout import Documents, Order, join_documents
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.plan.estimates import (
    estimated_pairs,
)
from zephyr_lite.plan.lengths import DocumentLengths, PairLengths, documents_of, pack, pairs_of
from zephyr_lite.plan.work import Work, work_of
from zephyr_lite.recipe import Dpo, Sft
from zephyr_lite.train.objectives import LanguageModelling, Objective, Preference

BUDGETS = [1, 30, 64, 100, 1000]


def _all_works(objective: Objective, order: Order) -> tuple[tuple[Work, ...], ...]:
    """The truth: every step cut and laid out by the objective itself."""
    return tuple(
        tuple(work_of(micro.layout) for micro in objective.step(order.step(step))[0])
        for step in range(order.total_steps)
    )


def _check(lengths: Any, objective: Objective, order: Order, budget: int) -> None:
    truth = _all_works(objective, order)
    found = lengths.works(budget, order, sample=order.total_steps)
    assert found.steps == truth
    flat = [work for step in truth for work in step]
    assert found.heaviest == max(flat, key=lambda work: work.tokens)  # of several the first
    assert lengths.works(budget, order, sample=3).heaviest == found.heaviest
    bound = lengths.bound(budget, order.batch_size)
    for count in ("tokens", "scored", "longest"):
        assert getattr(bound, count) >= max(getattr(work, count) for work in flat)
    assert bound.tokens <= lengths.bound(budget).tokens


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("packing", ["masked", "wrapped"])
@pytest.mark.parametrize("loss_on", ["all", "assistant"])
def test_documents_are_cut_as_in_training(
    random_documents: Callable, budget: int, packing: str, loss_on: str
):
    fields = {"packing": packing, "loss_on": loss_on, "max_length": 40}
    settings = Sft.model_validate(fields)
    sizes = np.random.default_rng(1).integers(1, 90, 37).tolist()
    documents = join_documents(random_documents(sizes))
    lengths = documents_of(documents, settings)
    assert lengths.total_tokens == sum(sizes)
    objective = LanguageModelling(documents, pack(documents, settings), loss_on, budget)
    order = Order(lengths.n_examples, batch_size=4, epochs=1.6, seed=3)
    _check(lengths, objective, order, budget)


def test_a_document_without_an_answer_scores_nothing():
    ids, answer = np.arange(9, dtype=np.int32), np.zeros(9, bool)
    answer[0] = True  # a first token is predicted by nothing
    documents = join_documents([(ids, answer)])
    settings = Sft.model_validate({"loss_on": "assistant", "max_length": 16})
    work = documents_of(documents, settings).works(64, Order(1, 1, 1, 0)).heaviest
    assert (work.tokens, work.scored, work.needed) == (9, 0, 0)


@pytest.mark.parametrize("budget", BUDGETS)
def test_pairs_are_cut_as_in_training(random_pairs: Callable, budget: int):
    sizes = np.random.default_rng(2).integers(1, 40, (41, 3)).tolist()
    pairs = random_pairs([tuple(size) for size in sizes])
    lengths = pairs_of(pairs)
    assert (lengths.n_examples, lengths.total_tokens) == (41, np.sum(sizes))
    assert not lengths.is_estimate and "41 pairs" in lengths.source
    nothing = np.zeros(len(pairs))
    reference = ReferenceLogProbs(nothing, nothing, nothing, nothing)
    objective = Preference(pairs, [""] * len(pairs), reference, Dpo(), budget)
    _check(lengths, objective, Order(41, batch_size=6, epochs=2, seed=5, max_steps=12), budget)


def test_only_steps_that_are_taken_count():
    """The longest pair lies in a step behind max_steps."""
    order = Order(40, batch_size=4, epochs=1, seed=0, max_steps=5)
    lengths_E3 = np.full((40, 3), 5, np.int64)
    lengths_E3[order.epoch(0)[-1]] = 500
    lengths = PairLengths(lengths_E3, 1000, "")
    assert lengths.works(10, order).heaviest.tokens == 15
    whole = Order(40, batch_size=4, epochs=1, seed=0)
    assert lengths.works(10, whole).heaviest.tokens == 1500


def test_sampled_steps_are_spread_over_the_training():
    lengths = PairLengths(np.arange(300, dtype=np.int64).reshape(100, 3) + 1, 598, "")
    order = Order(100, batch_size=1, epochs=1, seed=0)
    steps = lengths.works(10_000, order, sample=5).steps
    sizes = lengths.lengths_E3.sum(1)
    assert [step[0].tokens for step in steps] == [
        sizes[order.step(s)[0]] for s in (0, 25, 50, 74, 99)
    ]


def test_an_order_of_other_data_is_refused():
    lengths = PairLengths(np.ones((5, 3), np.int64), 2, "")
    with pytest.raises(ValueError, match="an order of 4 examples for 5"):
        lengths.works(10, Order(4, 2, 1, 0))


def test_the_bound_is_a_budget_of_the_longest():
    rows = DocumentLengths([], 2048, "")
    assert rows.bound(5000).queries == (2048, 2048, 904)
    assert rows.bound(1000).queries == (2048,)
    assert rows.bound(5000, batch=1).queries == (2048,)
    pairs = estimated_pairs(10, Dpo())
    assert pairs.bound(512).tokens == 2047
    assert pairs.bound(4096).tokens == 4096
    assert pairs.bound(2048).tokens == 2048


def test_ids_are_never_read():
    """Offsets alone: the memory map of a token store is not paged in."""
    offsets = np.array([0, 30, 75, 100], np.int64)
    empty = Documents(np.empty(0, np.int32), np.empty(0, bool), offsets)
    lengths = documents_of(empty, Sft.model_validate({"max_length": 50}))
    assert lengths.total_tokens == 100
    assert lengths.works(64, Order(lengths.n_examples, 2, 1, 0)).heaviest.tokens <= 64
