"""A training whose memory runs out: what it gives up, and that nothing else changes.

Memory is real here: a budget sees every storage that is made, and raises as a GPU's allocator.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from job_files import lines, newest, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from zephyr_lite.errors import MachineError, Stopped, is_out_of_memory
from zephyr_lite.model.engines import make_engine
from zephyr_lite.storage import seal
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
    with allowed(cap) as budget:
        resumed.run()
    assert budget.refusals == 0, "it does not run out of memory again"
    assert stopped.notches and resumed.notches == stopped.notches
    assert resumed.policy.engine.keep == stopped.policy.engine.keep
    (note,) = resumed.listener.notes
    words = f"fewer layers keep their activations (4 -> {stopped.policy.engine.keep})"
    assert note == f"sft: resumed as it stood after memory had run out: {words}"
    assert weights(resumed) == weights(whole)
    assert newest(resumed) == newest(whole)
    assert lines(resumed) == lines(whole)


def test_resumed_after_smaller_micro_batches_it_is_the_uninterrupted_one(
    before_micro_batch, allowed, peak, sft_job, watcher, tmp_path
) -> None:
    """These notches round otherwise: from the plan again, a resumed training had other bits."""
    options = {"epochs": 3, "warmup_ratio": 0}
    small = peak(sft_job(tmp_path / "small", tokens=80, max_steps=2), 0)
    large = peak(sft_job(tmp_path / "large", max_steps=2), 0)

    def shrink() -> None:
        budget.cap = (small + large) / 2

    found = {}
    for name, listener in (("whole", watcher()), ("cut", watcher(signal_at=(4, signal.SIGTERM)))):
        found[name] = job = sft_job(tmp_path / name, listener, **options)
        job.policy.engine.keep = 0
        before_micro_batch(job, 3, shrink)
        with allowed() as budget, job.stop.installed():
            if name == "whole":
                job.run()
            else:
                with pytest.raises(Stopped):
                    job.run()
    again = sft_job(tmp_path / "cut", **options)
    again.policy.engine.keep = 0
    again.run()
    assert again.objective.tokens_per_micro_batch < 4096
    assert again.notches == found["whole"].notches == found["cut"].notches
    assert weights(again) == weights(found["whole"])
    assert lines(again) == lines(found["whole"])


def test_a_checkpoint_that_knows_no_notches_resumes_by_the_plan(sft_job, watcher, tmp_path) -> None:
    """As versions before this one sealed them; and as one that gave nothing up does."""
    options = {"epochs": 3, "checkpoint_every": 1}
    stopped = sft_job(tmp_path, watcher(signal_at=(3, signal.SIGTERM)), **options)
    stopped.notches.append("a layer")
    with pytest.raises(Stopped), stopped.stop.installed():
        stopped.run()
    folder = tmp_path / "checkpoints" / "step-0000003"
    meta = json.loads((folder / "MANIFEST.json").read_text())["meta"]
    assert meta.pop("notches") == {"words": ["a layer"], "levels": {}}
    seal(folder, meta)
    resumed = sft_job(tmp_path, seen := watcher(), **options)
    resumed.run()
    assert (seen.done, seen.notes, resumed.notches) == (3, [], [])
    assert resumed.policy.engine.keep == 4
    (newer,) = (tmp_path / "checkpoints").glob("step-*6")
    assert "notches" not in json.loads((newer / "MANIFEST.json").read_text())["meta"]


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


def test_a_ladder_goes_down_to_where_another_stands(sft_job, tmp_path) -> None:
    """Never up: a plan that gives less already stays, and what was not given up is not touched."""
    first, again = (sft_job(tmp_path / name, tokens=100) for name in ("first", "again"))
    for job, keep, rows in ((first, 1, 200), (again, 3, 120)):
        job.policy.engine.keep, job.policy.chunk_rows = keep, rows
    ladder = PolicyLadder(first.policy, first.objective)
    assert [ladder.down() is None for _ in range(2)] == [False, False]
    assert ladder.levels == {"keep_layers": 0, "head_rows": 100}
    lower = PolicyLadder(again.policy, again.objective)
    again.policy.chunk_rows = 80
    assert lower.down_to(ladder.levels) == ["fewer layers keep their activations (3 -> 0)"]
    assert (again.policy.engine.keep, again.policy.chunk_rows) == (0, 80)
    assert again.objective.tokens_per_micro_batch == 100
    assert lower.levels == ladder.levels, "and so it is said to the next checkpoint"


# ---------------------------------------------------------------- what running out looks like

AT_A_LAUNCH = (
    "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in https://docs.nvidia.com/"
    "cuda/cuda-runtime-api/group__CUDART__TYPES.html for more information.\nCUDA kernel errors "
    "might be asynchronously reported at some other API call"
)
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError(AT_A_LAUNCH),
        torch.AcceleratorError("cudaErrorMemoryAllocation"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError(CUBLAS),
    ],
    ids=["torch's own", "at a launch", "by its name", "by its text", "cuBLAS"],
)
def test_a_step_is_done_again_whatever_says_that_memory_ran_out(
    before_micro_batch, error, sft_job, watcher, tmp_path
) -> None:
    whole, job = sft_job(tmp_path / "whole"), sft_job(tmp_path / "cut", seen := watcher())
    whole.run()

    def fail() -> None:
        raise error

    before_micro_batch(job, 2, fail)
    job.run()
    (notch,) = job.notches
    assert seen.notes == [f"sft: out of memory at step 2; {notch}"]
    assert weights(job) == weights(whole)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
        RuntimeError("out of memory"),
        RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"),
        MachineError(f"another part said: {CUBLAS}"),
        ValueError(CUBLAS),
    ],
    ids=["illegal access", "cuBLAS otherwise", "no GPU's", "shapes", "ours", "another class"],
)
def test_no_other_error_is_taken_for_it(before_micro_batch, error, sft_job, tmp_path) -> None:
    assert not is_out_of_memory(error)
    job = sft_job(tmp_path)

    def fail() -> None:
        raise error

    before_micro_batch(job, 2, fail)
    with pytest.raises(type(error)) as caught:
        job.run()
    assert caught.value is error
    assert job.notches == []


def test_an_update_that_a_launch_had_no_memory_for_is_not_done_again(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path)

    def fail(*_: Any) -> None:
        raise torch.AcceleratorError(AT_A_LAUNCH)

    handle = register_optimizer_step_pre_hook(fail)
    try:
        with pytest.raises(MachineError) as caught:
            job.run()
    finally:
        handle.remove()
    message = "sft: out of memory in the optimizer at step 1: CUDA error: out of memory"
    assert str(caught.value) == message and job.notches == []
