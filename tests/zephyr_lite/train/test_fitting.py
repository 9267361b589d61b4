"""A training whose memory runs out: what it gives up, and that nothing else changes.

Memory is real here: a budget sees every storage that is made, and raises as a GPU's allocator.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_files import lines, newest, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zephyr_lite.errors import MachineError, Stopped
from zephyr_lite.model.engines import make_engine
from zephyr_lite.train.fitting import PolicyLadder
from zephyr_lite.train.loop import Job


@pytest.fixture
def peak(allowed: Callable) -> Callable[[Job, int], int]:
    """`peak(job, keep)` runs a job; bytes at its peak, so many layers keeping activations."""

    def run(job: Job, keep: int) -> int:
        job.policy.engine.keep = keep
        with allowed() as seen:
            job.run()
        return seen.peak

    return run


@pytest.fixture
def between(peak: Callable) -> Callable[..., float]:
    """`between(make, folder, keep, **options)`: a cap under which `keep` layers may keep their
    activations, and no more."""

    def find(make: Callable[..., Job], folder: Path, keep: int, **options: Any) -> float:
        fits, too_many = (peak(make(folder / f"{n}", **options), n) for n in (keep, keep + 1))
        assert fits < too_many
        return (fits + too_many) / 2

    return find


# ---------------------------------------------------------------- a notch lower


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_with_fewer_layers_kept_it_ends_in_the_same_bits(
    allowed, between, kind, sft_job, dpo_job, watcher, tmp_path
) -> None:
    make = {"sft": sft_job, "dpo": dpo_job}[kind]
    options = {"dropout": 0.1, "tokens": 80, "epochs": 2}
    cap = between(make, tmp_path, 2, **options)
    whole = make(tmp_path / "whole", **options)
    figures = whole.run()
    job = make(tmp_path / "capped", seen := watcher(), **options)
    with allowed(cap) as budget:
        found = job.run()
    kept = job.policy.engine.keep
    assert 0 <= kept <= 2 and budget.refusals == 4 - kept
    assert job.notches == [
        f"fewer layers keep their activations ({n} -> {n - 1})" for n in range(4, kept, -1)
    ]
    assert [note.partition("; ")[2] for note in seen.notes] == job.notches
    assert seen.notes[0].startswith(f"{kind}: out of memory at step ")
    assert weights(job) == weights(whole)
    assert newest(job) == newest(whole)
    assert lines(job) == lines(whole)
    assert found | {"seconds": 0} == figures | {"seconds": 0}
    assert whole.notches == []


@pytest.mark.parametrize("masters", ["device", "host"])
def test_gradients_from_before_the_failure_do_not_count_twice(
    before_micro_batch, allowed, masters, sft_job, tmp_path
) -> None:
    """Memory goes away between the two micro-batches of the third step."""
    options = {"dropout": 0.1, "tokens": 80, "epochs": 2}
    whole, job = (sft_job(tmp_path / name, **options) for name in ("whole", "capped"))
    whole.masters = job.masters = masters
    whole.run()
    assert [len(job.objective.step(s)[0]) for s in ([0, 1, 2, 3], [4, 5])] == [2, 1]
    parameters = job.policy.trainable().values()

    def shrink() -> None:
        assert any(p.grad is not None and p.grad.any() for p in parameters)
        budget.cap = budget.live + 1000

    def widen(_: str) -> None:
        budget.cap = float("inf")

    job.listener.note = widen
    before_micro_batch(job, 5, shrink)
    with allowed() as budget:
        job.run()
    assert budget.refusals == len(job.notches) == 1
    assert weights(job) == weights(whole)
    assert lines(job) == lines(whole)


def test_what_failed_is_let_go_before_the_next_attempt(
    allowed, between, sft_job, monkeypatch, tmp_path
) -> None:
    cap = between(sft_job, tmp_path, 2)
    held, down = [], PolicyLadder.down

    def measured(self: PolicyLadder) -> str | None:
        held.append(budget.live)
        assert all(p.grad is None for p in job.policy.trainable().values())
        return down(self)

    monkeypatch.setattr(PolicyLadder, "down", measured)
    job = sft_job(tmp_path / "capped")
    with allowed(cap) as budget:
        job.run()
    assert len(held) >= 2
    assert max(held) < 0.05 * cap


def test_smaller_micro_batches_are_the_same_step(allowed, peak, sft_job, watcher, tmp_path) -> None:
    """The last notch: nothing is left out of a step, and its loss is divided by the same."""
    options = {"max_steps": 2, "warmup_ratio": 0}
    small = peak(sft_job(tmp_path / "small", tokens=80, **options), 0)
    large = peak(sft_job(tmp_path / "large", **options), 0)
    whole = sft_job(tmp_path / "whole", **options)
    whole.run()
    job = sft_job(tmp_path / "capped", seen := watcher(), **options)
    with allowed((small + large) / 2):
        job.run()
    assert job.policy.engine.keep == 0
    assert job.objective.tokens_per_micro_batch == 128
    assert "(256 -> 128 tokens); results are the same but for rounding" in seen.notes[-1]
    for ours, theirs in zip(lines(job), lines(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_stopped_after_a_notch_and_resumed_is_uninterrupted(
    allowed, between, sft_job, watcher, tmp_path
) -> None:
    options = {"dropout": 0.1, "epochs": 3}
    cap = between(sft_job, tmp_path, 2, **options)
    whole = sft_job(tmp_path / "whole", **options)
    whole.run()
    stopped, resumed = (
        sft_job(tmp_path / "capped", listener, **options)
        for listener in (watcher(signal_at=(3, signal.SIGTERM)), watcher())
    )
    stopped.rehearses = resumed.rehearses = True
    with allowed(cap), stopped.stop.installed(), pytest.raises(Stopped):
        stopped.run()
    with allowed(cap):
        resumed.run()
    assert stopped.notches and resumed.notches
    assert weights(resumed) == weights(whole)
    assert lines(resumed) == lines(whole)


# ---------------------------------------------------------------- nothing left to give up


def test_where_no_notch_is_left_the_way_out_is_named(allowed, sft_job, tmp_path) -> None:
    job = sft_job(tmp_path)
    before = weights(job)
    with allowed(50_000), pytest.raises(MachineError) as caught:
        job.run()
    assert caught.value.exit_code == 3
    message = "sft: out of memory at step 1, and nothing is left to give up: "
    assert str(caught.value).startswith(message) and "second line" not in str(caught.value)
    for way in ("tokens_per_micro_batch", "max_length", "lora.r", "adamw_8bit"):
        assert way in (caught.value.hint or "")
    assert job.objective.tokens_per_micro_batch == job.objective.longest == 40
    assert weights(job) == before
    assert not any((tmp_path / "checkpoints").glob("*"))


def test_a_checkpoint_survives_memory_that_goes_away(
    before_micro_batch, allowed, sft_job, tmp_path
) -> None:
    options = {"epochs": 3, "checkpoint_every": 2, "dropout": 0.1}
    whole = sft_job(tmp_path / "whole", **options)
    whole.run()
    job = sft_job(tmp_path / "capped", **options)

    def shrink() -> None:
        budget.cap = budget.live + 50_000

    before_micro_batch(job, 4, shrink)
    with allowed() as budget, pytest.raises(MachineError, match="out of memory at step 4"):
        job.run()
    again = sft_job(tmp_path / "capped", **options)
    again.run()
    assert weights(again) == weights(whole)
    assert lines(again) == lines(whole)


def test_an_update_that_does_not_fit_is_not_done_again(allowed, sft_job, tmp_path) -> None:
    job, calls = sft_job(tmp_path), []

    def shrink(*_: Any) -> None:
        calls.append(1)
        budget.cap = budget.live + 1000

    handle = register_optimizer_step_pre_hook(shrink)
    try:
        with allowed() as budget, pytest.raises(MachineError) as caught:
            job.run()
    finally:
        handle.remove()
    assert str(caught.value).startswith("sft: out of memory in the optimizer at step 1: ")
    assert "memory.optimizer=host" in (caught.value.hint or "")
    assert caught.value.exit_code == 3
    assert len(calls) == 1 and job.notches == []


# ---------------------------------------------------------------- the ladder


def to_the_ground(ladder: PolicyLadder) -> list[str]:
    """All notches, in words."""
    return list(iter(ladder.down, None))


def test_notches_come_in_order(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, tokens=100)
    policy, engine = job.policy, job.policy.engine
    engine.layers = engine.layers * 8
    engine.keep, policy.chunk_rows, policy.device = 9, 200, torch.device("cuda")
    rounded = "results are the same but for rounding"
    assert to_the_ground(PolicyLadder(policy, job.objective)) == [
        "fewer layers keep their activations (9 -> 5)",
        "fewer layers keep their activations (5 -> 1)",
        "fewer layers keep their activations (1 -> 0)",
        "inputs of the layers wait in host memory (lean -> offload)",
        f"fewer rows of logits at once (200 -> 100); {rounded}",
        f"fewer rows of logits at once (100 -> 64); {rounded}",
        f"smaller micro-batches (100 -> 50 tokens); {rounded} and dropout's draw",
        f"smaller micro-batches (50 -> 40 tokens); {rounded} and dropout's draw",
    ]
    assert (engine.keep, engine.rest, policy.chunk_rows) == (0, "offload", 64)
    assert job.objective.tokens_per_micro_batch == job.objective.longest == 40


def test_engine_hf_gives_up_head_rows_and_tokens(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, tokens=60)
    job.policy.engine = make_engine("hf", job.policy.model, torch.float32, "none")
    job.policy.chunk_rows = 128
    first, second = to_the_ground(PolicyLadder(job.policy, job.objective))
    assert "(128 -> 64)" in first and "(60 -> 40 tokens)" in second
    job.policy.engine.undo()


def test_a_head_that_trains_is_not_cut(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, tokens=8)
    job.policy.engine.keep, job.policy.chunk_rows = 0, 128
    job.policy.head_VD = torch.nn.Parameter(job.policy.head_VD)
    assert to_the_ground(PolicyLadder(job.policy, job.objective)) == []
