"""The rehearsal before the first step: what it finds, and that it leaves no trace.

Memory is real here: a budget sees every storage that is made, and raises as a GPU's allocator.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from job_files import lines, newest, weights

from zephyr_lite.data.layout import Documents, Order, join_documents
from zephyr_lite.errors import MachineError, Stopped
from zephyr_lite.recipe import Dpo, Sft
from zephyr_lite.train.fitting import missing_states
from zephyr_lite.train.loop import Job
from zephyr_lite.train.masters import make_masters
from zephyr_lite.train.objectives import LanguageModelling, Objective, Preference
from zephyr_lite.train.optimizer import state_tensors

CPU = torch.device("cpu")


# ---------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize(
    ("optimizer", "masters"), [("adamw", "device"), ("adamw", "host"), ("adamw_8bit", "device")]
)
def test_a_rehearsal_leaves_no_trace(
    before_micro_batch, optimizer, masters, sft_job, watcher, tmp_path
) -> None:
    """Also where a training goes on; r = 64 makes tensors large enough for real 8-bit state."""
    options = {"optimizer": optimizer, "dropout": 0.1, "r": 64, "tokens": 80, "epochs": 3}
    whole = sft_job(tmp_path / "whole", **options)
    whole.masters = masters
    figures = whole.run()
    forwards = []

    def noted(listener: Any) -> None:
        forwards.append(len(listener.records))

    for listener in (watcher(signal_at=(3, signal.SIGTERM)), watcher()):
        job = sft_job(tmp_path / "rehearsed", listener, **options)
        job.masters, job.rehearses = masters, True
        before_micro_batch(job, 1, partial(noted, listener))
        with job.stop.installed():
            found = run_unless_stopped(job)
        assert listener.notes == [] and job.notches == []
    assert forwards == [0, 0]
    assert found | {"seconds": 0} == figures | {"seconds": 0}
    assert weights(job) == weights(whole)
    assert newest(job) == newest(whole)
    assert lines(job) == lines(whole)


def run_unless_stopped(job: Job) -> dict[str, Any]:
    """The figures of a job; none when a signal stopped it."""
    try:
        return job.run()
    except Stopped:
        return {}


@dataclass
class AtStart:
    """A listener that notes a budget's peak, and what a rehearsal left, when the steps begin.

    drawn: torch's random state then. in_steps: the peak when the last step was done: the checkpoint
    that is saved after it copies states to host memory, which on a CPU is the budget's too.
    """

    budget: Any
    peak: int = 0
    live: int = 0
    steps: int = 0
    drawn: Any = None
    in_steps: int = 0

    def start(self, label: str, total: int, done: int) -> None:
        self.peak, self.live = self.budget.peak, self.budget.live
        self.drawn = torch.get_rng_state()

    def step(self, record: dict[str, Any]) -> None:
        self.steps += 1
        self.in_steps = self.budget.peak

    def note(self, text: str) -> None: ...

    def end(self) -> None: ...


@pytest.fixture
def two_steps(sft_job: Callable, random_documents: Callable) -> Callable[..., Job]:
    """`two_steps(folder, first, second, listener)`: rows of these lengths in the two steps."""

    def make(
        folder: Path, first: list[int], second: list[int], *others: Any, **options: Any
    ) -> Job:
        job = sft_job(folder, *others, epochs=1, r=64, **options)
        order, lengths = Order(8, 4, 1, job.seed), [0] * 8
        for place, length in zip(order.step(0) + order.step(1), first + second, strict=True):
            lengths[place] = length
        documents = job.objective.documents = join_documents(random_documents(lengths))
        job.objective.rows = [[span] for span in itertools.pairwise(documents.offsets.tolist())]
        job.policy.engine.keep = 0
        return job

    return make


@pytest.mark.parametrize(("tokens", "cut"), [(50, [42, 50]), (400, [92])])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_the_peak_of_a_rehearsal_is_that_of_the_training(
    allowed, optimizer, tokens, cut, two_steps, tmp_path
) -> None:
    """The heaviest micro-batch is the last step's second, beside gradients; or its only one."""
    seen = {}
    for rehearses in (False, True):
        seen[rehearses] = listener = AtStart(allowed())
        options = {"tokens": tokens, "optimizer": optimizer}
        lengths = [20, 8, 5, 5], [30, 25, 25, 12]
        job = two_steps(tmp_path / f"{rehearses}", *lengths, listener, **options)
        job.rehearses = rehearses
        micros, _ = job.objective.step(Order(8, 4, 1, job.seed).step(1))
        assert [m.layout.n_tokens for m in micros] == cut
        drawn = torch.get_rng_state()
        with listener.budget:
            job.run()
        assert torch.equal(listener.drawn, drawn)
    assert seen[True].peak == pytest.approx(seen[False].in_steps, rel=0.005)
    assert seen[True].in_steps == pytest.approx(seen[False].in_steps, rel=0.005)
    assert seen[True].live < 0.05 * seen[True].peak


def test_a_rehearsal_finds_what_would_fail_in_the_last_step(allowed, two_steps, tmp_path) -> None:
    def steps(cap: float, *, rehearses: bool) -> tuple[int, int]:
        """Steps done under a cap, and bytes at the peak."""
        folder = tmp_path / f"{cap:.0f}-{rehearses}"
        lengths, listener = ([20, 12, 33, 7], [55, 21, 18, 30]), AtStart(allowed(cap))
        job = two_steps(folder, *lengths, listener, tokens=8)  # no notch is left
        job.rehearses = rehearses
        with listener.budget:
            try:
                job.run()
            except MachineError as error:
                assert ("in the rehearsal of the longest micro-batch" in str(error)) == rehearses
                assert (folder / "metrics.jsonl").exists() != rehearses
        return listener.steps, listener.in_steps

    done, whole = steps(float("inf"), rehearses=False)
    assert done == 2
    assert steps(0.99 * whole, rehearses=False)[0] == 1
    assert steps(0.99 * whole, rehearses=True)[0] == 0


def test_states_that_do_not_fit_are_found_before_the_first_step(allowed, sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, r=64)
    job.rehearses = True
    count = sum(p.numel() for p in job.policy.trainable().values())
    with allowed(8 * count - 1), pytest.raises(MachineError) as caught:
        job.run()
    assert "sft: out of memory in the optimizer before the first step" in str(caught.value)


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_the_bytes_held_are_those_the_optimizer_takes(optimizer, sft_job, tmp_path) -> None:
    """Tensors of 2048 to 12288 weights: on both sides of where 8-bit states begin."""
    job = sft_job(tmp_path, r=64)
    parameters = job.policy.trainable()
    masters = make_masters(Sft(optimizer=optimizer), parameters, "device", torch.float32)
    told = missing_states(optimizer, masters, CPU)
    assert missing_states(optimizer, masters, torch.device("cuda")) == 0
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    masters.step(1e-3)
    states = state_tensors(masters.optimizer, parameters)
    each = {k: t for k, t in states.items() if k.split("/")[0][:4] not in ("step", "qmap")}
    assert told == sum(t.nbytes for t in each.values())
    assert missing_states(optimizer, masters, CPU) == 0


# ---------------------------------------------------------------- the longest micro-batch


@pytest.mark.parametrize("budget", [8, 45, 70, 400])
@pytest.mark.parametrize(("batch", "epochs", "steps"), [(4, 1, None), (3, 2.5, None), (5, 2, 3)])
def test_the_heaviest_is_one_that_a_step_makes(
    budget, batch, epochs, steps, random_documents, random_pairs
) -> None:
    rng = np.random.default_rng(budget + batch)
    documents = join_documents(random_documents(rng.integers(2, 40, 23).tolist()))
    rows = [[(int(a), int(b))] for a, b in itertools.pairwise(documents.offsets)]
    pairs = random_pairs([tuple(x) for x in rng.integers(1, 20, (23, 3)).tolist()])
    objectives: list[Objective] = [
        LanguageModelling(documents, rows, "assistant", budget),
        Preference(pairs, [], cast(Any, None), Dpo(), budget),
    ]
    for objective in objectives:
        order = Order(23, batch, epochs, 5, steps)
        made = [m for s in range(order.total_steps) for m in objective.step(order.step(s))[0]]
        heaviest = objective.heaviest(order)
        assert heaviest.layout.n_tokens == max(m.layout.n_tokens for m in made)
        same = next(m for m in made if list(m.examples) == list(heaviest.examples))
        for name, array in vars(same.layout).items():
            assert np.array_equal(array, getattr(heaviest.layout, name)), name
        assert objective.longest == max(
            objective.step([i])[0][0].layout.n_tokens for i in range(objective.n_examples)
        )


def test_the_heaviest_of_many_is_found_at_once() -> None:
    """A layout is built of what is found alone; an epoch's order is drawn once, not every step."""
    lengths = np.random.default_rng(0).integers(50, 2000, 200_000)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = [[(int(a), int(b))] for a, b in itertools.pairwise(offsets)]
    ids = np.broadcast_to(np.int32(7), int(offsets[-1]))
    documents = Documents(ids, np.broadcast_to(np.True_, ids.shape), offsets)
    objective = LanguageModelling(documents, rows, "all", 8192)
    began = time.monotonic()
    found = objective.heaviest(Order(200_000, 16, 1, 0))
    assert time.monotonic() - began < 20  # seen 0.4 s
    assert 8100 < found.layout.n_tokens <= 8192
