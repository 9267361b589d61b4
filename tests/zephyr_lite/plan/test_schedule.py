"""The schedule: the fastest cut that fits, found as an exhaustive search finds it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from zephyr_lite.data.layout import Order
from zephyr_lite.plan import schedule as schedule_module
from zephyr_lite.plan.checkpoint import known_base
from zephyr_lite.plan.estimates import estimated_documents, estimated_pairs
from zephyr_lite.plan.gpus import GIB, gpu_named
from zephyr_lite.plan.schedule import HOST_PENALTY, Candidate, Schedule, Training, choose, fits
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import documents_work, pairs_work
from zephyr_lite.recipe import Dpo, Memory, Sft

TOKENS = (512, 1024, 2048, 4096, 8192)
BASE = known_base("mistralai/Mistral-7B-v0.1")
AUTO = Memory()


def training(stage: str, gpu: str = "4090", **setting: object) -> Training:
    assert BASE is not None
    if stage == "sft":
        lengths = estimated_documents(3000, Sft(**{"from": "x"}))
        made = Setting("sft", 16, 0)
    else:
        lengths = estimated_pairs(2000, Dpo())
        made = Setting("dpo", 128, 16, batch=16)
    order = Order(lengths.n_examples, made.batch, 1, 42)
    made = replace(made, **setting)  # type: ignore[arg-type]
    return Training(BASE.geometry, made, lengths, order, gpu_named(gpu))


def small(found: Training) -> Training:
    """Of eight layers, so that all cuts can be tried."""
    return replace(found, geometry=replace(found.geometry, layers=8))


def exhaustive(found: Training, budget: int) -> float:
    """Seconds of the best of all cuts, host memory at its price."""
    best = np.inf
    for tokens in TOKENS:
        works = found.lengths.works(tokens, found.order)
        rests, places = ("lean", "offload"), ("device", "host")
        if found.setting.optimizer != "adamw":
            places = ("device",)
        for rest, place, keep in itertools.product(rests, places, range(9)):
            cut = Cut(tokens, keep, rest, place)  # type: ignore[arg-type]
            if found.peak(cut, works).total <= budget:
                candidate = found.candidate(cut, works)
                best = min(best, priced(candidate))
    return best


def priced(candidate: Candidate) -> float:
    return candidate.step_seconds * (HOST_PENALTY if candidate.host.pinned else 1)


def seconds(schedule: Schedule) -> float:
    assert schedule.chosen is not None
    return schedule.chosen.step_seconds


@pytest.mark.parametrize(
    ("stage", "gpu", "gib", "optimizer"),
    [
        ("sft", "4090", 5.0, "adamw_8bit"),
        ("sft", "4060", 3.2, "adamw_8bit"),
        ("dpo", "4060 Ti 16GB", 4.5, "adamw"),
        ("dpo", "3060", 3.6, "adamw"),
    ],
)
def test_what_is_chosen_is_what_a_search_of_all_cuts_finds(monkeypatch, stage, gpu, gib, optimizer):
    monkeypatch.setattr(schedule_module, "TOKENS", TOKENS)
    found = small(training(stage, gpu, optimizer=optimizer))
    budget = int(gib * GIB)
    schedule = choose(found, budget, AUTO)
    assert schedule.chosen is not None
    assert schedule.chosen.parts.total <= budget
    assert priced(schedule.chosen) == pytest.approx(exhaustive(found, budget), rel=1e-9)
    tokens = schedule.chosen.cut.tokens
    works = found.lengths.works(tokens, found.order)
    more = replace(schedule.chosen.cut, keep=schedule.chosen.cut.keep + 1)
    assert more.keep > 8 or found.peak(more, works).total > budget, "one more layer would have fit"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_more_memory_never_costs_time(stage):
    found, before = training(stage, optimizer="adamw"), np.inf
    for gib in (8.5, 14.5, 22.5):
        schedule = choose(found, int(gib * GIB), AUTO)
        if schedule.chosen is None:
            assert before == np.inf
            continue
        assert seconds(schedule) <= before * HOST_PENALTY
        before = seconds(schedule)
    assert before < np.inf


def test_what_the_recipe_fixes_stays():
    found, budget = training("sft"), int(22.5 * GIB)
    fixed = Memory(tokens_per_micro_batch=1024, checkpointing="full", keep_layers=5, head_rows=64)
    chosen = choose(found, budget, fixed).chosen
    assert chosen is not None
    assert chosen.cut == Cut(1024, 5, "lean", "device", 64)
    assert chosen.memory == {
        "tokens_per_micro_batch": 1024,
        "checkpointing": "full",
        "keep_layers": 5,
        "head_rows": 64,
        "optimizer": "device",
    }
    everything = choose(found, budget, Memory(checkpointing="none")).chosen
    assert everything is not None and everything.cut.keep == 32
    assert chosen.record()["checkpointing"] == "full"
    assert choose(found, int(8 * GIB), Memory(checkpointing="none")).chosen is None
    outside = choose(found, budget, Memory(checkpointing="offload")).chosen
    assert outside is not None and (outside.cut.rest, outside.cut.keep) == ("offload", 0)


@pytest.mark.parametrize("asked", ["auto", "none", "full", "offload"])
def test_where_all_layers_keep_the_record_says_that_nothing_is_computed_again(asked):
    """The engine is asked for the cut as before: what the rest does matters to a notch down."""
    keep = {"keep_layers": 32} if asked in ("full", "offload") else {}
    memory = Memory.model_validate({"checkpointing": asked, **keep})
    chosen = choose(training("sft"), int(22.5 * GIB), memory).chosen
    assert chosen is not None and chosen.cut.keep == 32
    record = chosen.record()
    assert (record["checkpointing"], record["keep_layers"]) == ("none", 32)
    assert chosen.memory["checkpointing"] == ("offload" if asked == "offload" else "full")
    tight = choose(training("sft"), int(8.0 * GIB), AUTO).chosen
    assert tight is not None and tight.cut.keep < 32
    assert tight.record()["checkpointing"] in ("full", "offload")


def test_states_go_to_the_host_only_where_they_must_and_may():
    budget = int(10.0 * GIB)
    assert choose(training("dpo", optimizer="paged_adamw_32bit"), budget, AUTO).chosen is None
    chosen = choose(training("dpo", optimizer="adamw"), budget, AUTO).chosen
    assert chosen is not None and chosen.cut.place == "host" and chosen.host.pinned
    roomy = choose(training("dpo", optimizer="adamw"), 60 * GIB, AUTO).chosen
    assert roomy is not None and roomy.cut.place == "device" and not roomy.host.pinned


def test_alternatives_are_others_and_slower():
    schedule = choose(training("dpo", optimizer="adamw"), int(14.5 * GIB), AUTO)
    assert schedule.chosen is not None and len(schedule.alternatives) == 2
    known = {(c.step_seconds, c.parts.total) for c in (schedule.chosen, *schedule.alternatives)}
    assert len(known) == 3
    for other in schedule.alternatives:
        assert other.step_seconds * HOST_PENALTY >= schedule.chosen.step_seconds
        assert other.parts.total <= schedule.budget


def test_where_nothing_fits_the_least_is_said_and_what_would_fit():
    found, budget = training("dpo", optimizer="paged_adamw_32bit"), int(10.0 * GIB)
    schedule = choose(found, budget, AUTO)
    assert schedule.chosen is None and schedule.least.parts.total > budget
    assert not fits(found, budget, AUTO)
    small = replace(found, setting=replace(found.setting, trained=16))
    assert fits(small, budget, AUTO)
    assert fits(replace(found, setting=replace(found.setting, optimizer="adamw")), budget, AUTO)
    long, short = (documents_work([n]) for n in (200_000, 512))
    dsft = training("sft")
    assert not fits(dsft, budget, AUTO, long) and fits(dsft, budget, AUTO, short)
    assert not fits(found, budget, AUTO, pairs_work([(1, 20_000, 20_000)]))
