"""The weights that are kept: those of the best evaluation, through any number of kills."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zephyr_lite.train.checkpoint import Best
from zephyr_lite.train.loop import Job

# (accuracy, loss) of the evaluations after steps 2, 4, 6, 8 and at the end (9).
HELD_OUT = {2: (0.5, 0.7), 4: (0.8, 0.6), 6: (0.8, 0.5), 8: (0.8, 0.5), 9: (0.75, 0.4)}
COMMON = {"epochs": 3, "dropout": 0.1, "eval_every": 2, "optimizer": "adamw_8bit"}


def by_accuracy(figures: dict[str, float]) -> tuple[float, ...]:
    return figures["accuracy"], -figures["loss"]


@pytest.fixture
def ranked(dpo_job: Callable) -> Callable[..., Job]:
    """`ranked(folder, watcher, **settings)`: a job whose evaluations are HELD_OUT, by step."""

    def make(folder: Path, *watcher: Any, held_out: Any = None, **settings: Any) -> Job:
        job = dpo_job(folder, *watcher, **{**COMMON, **settings})
        table, steps = held_out or HELD_OUT, [0]
        step = job._step

        def counted(number: int, *rest: Any) -> dict[str, Any]:
            steps[0] = number + 1
            return step(number, *rest)

        def evaluate() -> dict[str, float]:
            accuracy, loss = table[steps[0] or 9]  # a training that was over only evaluates
            return {"accuracy": accuracy, "loss": loss}

        job._step, job.evaluate, job.rank = counted, evaluate, by_accuracy
        return job

    return make


def weights(job: Job) -> dict[str, bytes]:
    return {n: p.detach().numpy().tobytes() for n, p in job.policy.trainable().items()}


@pytest.fixture
def after(dpo_job: Callable, watcher: Callable, tmp_path: Path) -> Callable[[int], dict]:
    """`after(n)`: the weights of a plain training after its first n steps."""

    def run(step: int) -> dict[str, bytes]:
        job = dpo_job(tmp_path / f"first-{step}", watcher(crash_at=step), **COMMON)
        with pytest.raises(RuntimeError):
            job.run()
        return weights(job)

    return run


def test_the_best_weights_are_kept_with_their_figures(ranked, after, tmp_path) -> None:
    """Step 6 has step 4's accuracy and a lower loss, step 8 ties with it and is later."""
    job = ranked(tmp_path / "whole")
    figures = job.run()
    assert weights(job) == after(6)
    assert (figures["step"], figures["accuracy"], figures["loss"]) == (6, 0.8, 0.5)
    assert figures["last"] == {"accuracy": 0.75, "loss": 0.4}
    assert figures["steps"] == 9


def test_without_a_rank_the_last_weights_are_kept(ranked, after, tmp_path) -> None:
    job = ranked(tmp_path / "whole")
    job.rank = None
    figures = job.run()
    assert weights(job) == after(9)
    assert "last" not in figures
    assert not list(tmp_path.rglob("best.safetensors"))


def test_the_last_step_can_be_the_best(ranked, after, tmp_path) -> None:
    job = ranked(tmp_path / "whole", held_out=HELD_OUT | {9: (0.9, 0.4)})
    assert job.run()["step"] == 9
    assert weights(job) == after(9)


@pytest.mark.parametrize("crashes", [(5, 7), (7, 9), (2, 4, 8)], ids=str)
def test_killed_between_is_uninterrupted(crashes, ranked, watcher, tmp_path) -> None:
    """The best is found before and after a checkpoint; a kill loses it, and finds it again."""
    whole = ranked(tmp_path / "whole", checkpoint_every=3)
    figures = whole.run()
    for crash_at in crashes:
        job = ranked(tmp_path / "cut", watcher(crash_at=crash_at), checkpoint_every=3)
        with pytest.raises(RuntimeError):
            job.run()
    again = ranked(tmp_path / "cut", checkpoint_every=3)
    repeated = again.run()
    assert weights(again) == weights(whole)
    assert {k: v for k, v in repeated.items() if k != "seconds"} == {
        k: v for k, v in figures.items() if k != "seconds"
    }


def test_a_finished_training_gives_its_best_again(ranked, tmp_path) -> None:
    """Only the seal of the stage was missing: the last checkpoint has the best in it."""
    whole = ranked(tmp_path / "one")
    whole.run()
    again = ranked(tmp_path / "one")
    assert again.run()["step"] == 6
    assert weights(again) == weights(whole)


def test_an_older_checkpoint_has_the_best_of_its_own_past(ranked, watcher, tmp_path) -> None:
    """Step 8's checkpoint is damaged: from step 3's the best so far is step 2's, not a later."""
    with pytest.raises(RuntimeError):
        ranked(tmp_path, watcher(crash_at=7), checkpoint_every=3).run()
    first, second = sorted((tmp_path / "checkpoints").iterdir())
    kept = load_file(first / "best.safetensors")
    later = load_file(second / "best.safetensors")
    assert any(not torch.equal(kept[n], later[n]) for n in kept)
    (second / "best.safetensors").write_bytes(b"")
    listener = watcher()
    job = ranked(tmp_path, listener, checkpoint_every=3)
    figures = job.run()
    assert listener.done == 3
    assert any("best.safetensors" in note for note in listener.notes)
    assert figures["step"] == 6


def test_a_loss_that_is_no_number_never_displaces_a_best() -> None:
    best = Best(by_accuracy)
    parameter = torch.nn.Parameter(torch.zeros(1))
    best.offer(1, {"accuracy": 0.5, "loss": 0.3}, {"w": parameter})
    parameter.data += 1
    best.offer(2, {"accuracy": 0.5, "loss": float("nan")}, {"w": parameter})
    assert best.step == 1
    assert best.weights["w"].item() == 0, "a copy, not the model's own tensor"
