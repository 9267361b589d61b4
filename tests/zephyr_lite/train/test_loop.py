"""The loop: what a step computes, exact resume, divergence, checkpoints, metrics, signals."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from zephyr_lite.data.layout import Order
from zephyr_lite.errors import DivergedError, Stopped, StorageError
from zephyr_lite.recipe import Sft
from zephyr_lite.storage import is_sealed
from zephyr_lite.train.loop import Job
from zephyr_lite.train.optimizer import learning_rate

TIMING = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")
Gradients = list[dict[str, torch.Tensor]]


@pytest.fixture
def gradients() -> Iterator[Callable[[Job], Gradients]]:
    """`gradients(job)` runs a job and gives the gradients that each step handed its optimizer."""
    taken: list[list[torch.Tensor]] = []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        taken.append([p.grad.clone() for p in parameters])

    def run(job: Job) -> Gradients:
        taken.clear()
        job.run()
        names = list(job.policy.trainable())
        return [dict(zip(names, step, strict=True)) for step in taken]

    handle = register_optimizer_step_pre_hook(take)
    yield run
    handle.remove()


def lines(job: Job) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measures."""
    text = (job.folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found]


def weights(job: Job) -> dict[str, bytes]:
    """The trained tensors, byte for byte."""
    return {n: p.detach().numpy().tobytes() for n, p in job.policy.trainable().items()}


def newest(job: Job) -> Path:
    """The newest checkpoint's folder."""
    return sorted((job.folder / "checkpoints").glob("step-*"))[-1]


def state(job: Job) -> dict[str, bytes]:
    """Weights and optimizer state of the newest checkpoint, byte for byte."""
    return {f.name: f.read_bytes() for f in newest(job).glob("*.safetensors")}


@pytest.mark.parametrize("kind", ["sft", "sft-assistant", "dpo", "dpo-ipo-sft"])
def test_gradient_does_not_depend_on_how_a_step_is_cut(
    kind, sft_job, dpo_job, gradients, tmp_path, tolerance
) -> None:
    """Batch x accumulation: one example a micro-batch, two, or all in one."""
    make, settings = {
        "sft": (sft_job, {}),
        "sft-assistant": (sft_job, {"loss_on": "assistant"}),
        "dpo": (dpo_job, {}),
        "dpo-ipo-sft": (dpo_job, {"loss": "ipo", "sft_weight": 0.5}),
    }[kind]
    common = {"max_steps": 1, "warmup_ratio": 0, "max_grad_norm": 1e6, **settings}
    whole_job = make(tmp_path / "whole", **common)
    (whole,) = gradients(whole_job)
    for tokens in (8, 45):
        job = make(tmp_path / str(tokens), tokens=tokens, **common)
        micros, _ = job.objective.step(range(3))
        assert len(micros) > 1
        (cut,) = gradients(job)
        for name, gradient in whole.items():
            if "lora_A" in name:  # B is 0 at the first step, so A gets no gradient
                assert not gradient.any()
                continue
            error = (cut[name] - gradient).norm() / gradient.norm()
            assert error < tolerance.gradient, f"{name}: {error:.2g}"
        # With B = 0 a reward is the rounding between two cuts, and accuracy would be its sign.
        other = ("step", "epoch", "learning_rate", "rewards/accuracies")
        same = [k for k in lines(job)[0] if k not in other]
        for key in same:
            assert lines(job)[0][key] == pytest.approx(lines(whole_job)[0][key], rel=1e-4, abs=1e-6)


def test_several_updates_do_not_depend_on_how_a_step_is_cut(
    dpo_job, gradients, tmp_path, tolerance
) -> None:
    """Later steps too, where both halves of the adapter move."""
    common = {"max_steps": 3, "max_grad_norm": 1e6, "learning_rate": 1e-4}
    whole = gradients(dpo_job(tmp_path / "whole", **common))
    cut = gradients(dpo_job(tmp_path / "cut", tokens=8, **common))
    for name, gradient in whole[2].items():
        assert gradient.any()
        assert (cut[2][name] - gradient).norm() < tolerance.gradient * gradient.norm(), name


def test_step_0_of_dpo_is_ln_2(dpo_job, tmp_path, tolerance) -> None:
    job = dpo_job(tmp_path, max_steps=1)
    job.run()
    first = lines(job)[0]
    assert abs(first["loss"] - math.log(2)) < tolerance.ln2
    assert abs(first["rewards/margins"]) < tolerance.ln2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_stopped_and_resumed_is_uninterrupted(
    optimizer, dropout, sft_job, watcher, tmp_path
) -> None:
    """r = 64 makes tensors large enough for real 8-bit state; step 3 is in the second epoch."""
    common = {"optimizer": optimizer, "dropout": dropout, "r": 64, "epochs": 3, "warmup_ratio": 0.3}
    whole = sft_job(tmp_path / "whole", **common)
    whole.run()
    stopped = sft_job(tmp_path / "cut", watcher(signal_at=(3, signal.SIGTERM)), **common)
    with pytest.raises(Stopped), stopped.stop.installed():
        stopped.run()
    again = sft_job(tmp_path / "cut", listener := watcher(), **common)
    again.run()
    assert listener.done == 3
    assert weights(again) == weights(whole)
    assert state(again) == state(whole)
    assert lines(again) == lines(whole)
    assert weights(stopped) != weights(whole)
    if "8bit" in optimizer:
        stored = load_file(newest(whole) / "optimizer.safetensors")
        assert torch.uint8 in {t.dtype for t in stored.values()}


def test_killed_three_times_is_uninterrupted(dpo_job, watcher, tmp_path) -> None:
    """Without any warning, once in each epoch; evaluations in between change nothing."""
    common = {"epochs": 3, "dropout": 0.1, "tokens": 40, "optimizer": "adamw_8bit"}
    whole = dpo_job(tmp_path / "whole", **common)
    whole.run()
    watched = {**common, "checkpoint_every": 2, "eval_every": 2}
    for crash_at in (3, 5, 8):
        with pytest.raises(RuntimeError):
            dpo_job(tmp_path / "cut", watcher(crash_at=crash_at), **watched).run()
    again = dpo_job(tmp_path / "cut", **watched)
    again.run()
    assert weights(again) == weights(whole)
    assert [line["step"] for line in lines(again)] == [*range(1, 10), 9]
    for ours, theirs in zip(lines(again), lines(whole), strict=True):
        assert {k: v for k, v in ours.items() if k in theirs} == theirs


def test_dropout_is_drawn_anew_at_every_step(sft_job, shake, tmp_path) -> None:
    """The same row three times with weights that stand still."""
    still = {"batch_size": 1, "epochs": 3, "learning_rate": 1e-30, "warmup_ratio": 0}
    losses = {}
    for dropout in (0.0, 0.5):
        job = sft_job(tmp_path / str(dropout), dropout=dropout, **still)
        shake(job.policy.model, "sft")
        job.objective.rows = job.objective.rows[:1]
        job.run()
        losses[dropout] = {line["loss"] for line in lines(job) if "loss" in line}
    assert len(losses[0.0]) == 1
    assert len(losses[0.5]) == 3


def test_gradients_are_clipped_to_the_norm(sft_job, gradients, tmp_path) -> None:
    job = sft_job(tmp_path, max_steps=1, max_grad_norm=0.01)
    (clipped,) = gradients(job)
    norm = torch.stack([g.norm() for g in clipped.values()]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert lines(job)[0]["grad_norm"] > 0.1, "the norm before clipping is what is logged"


def test_another_seed_trains_another_model(sft_job, tmp_path) -> None:
    one, two = sft_job(tmp_path / "1", max_steps=2), sft_job(tmp_path / "2", max_steps=2)
    two.seed = 12
    one.run()
    two.run()
    assert weights(one) != weights(two)


def test_metrics_of_lost_steps_are_dropped_and_none_is_written_twice(
    sft_job, watcher, tmp_path
) -> None:
    common = {"epochs": 3, "checkpoint_every": 2}
    whole = sft_job(tmp_path / "whole", **common)
    whole.run()
    with pytest.raises(RuntimeError):
        sft_job(tmp_path / "cut", watcher(crash_at=3), **common).run()
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 4, "lo')
    again = sft_job(tmp_path / "cut", **common)
    again.run()
    assert lines(again) == lines(whole)
    sft_job(tmp_path / "cut", **common).run()  # everything was done; only the seal was missing
    assert lines(again) == lines(whole)


def test_a_fresh_training_begins_a_fresh_log(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, max_steps=1)
    job.folder.mkdir(exist_ok=True)
    (job.folder / "metrics.jsonl").write_text('{"step": 1, "loss": 9}\n')
    job.run()
    assert [line["step"] for line in lines(job)] == [1, 1]


def test_every_evaluation_reaches_the_log(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, epochs=3, log_every=4, eval_every=3)
    job.run()
    assert [line["step"] for line in lines(job) if "eval_loss" in line] == [3, 6]
    assert [line["step"] for line in lines(job) if "loss" in line] == [3, 4, 6]


def test_nan_in_a_weight_stops_before_the_update(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path)
    next(iter(job.policy.trainable().values())).data[0, 0] = torch.nan
    before = weights(job)
    with pytest.raises(DivergedError, match="sft: the loss is not finite at step 1") as caught:
        job.run()
    assert "packed row" in str(caught.value)
    assert weights(job) == before
    assert not (tmp_path / "checkpoints").exists()


def test_nan_in_the_reference_names_the_pair_and_keeps_the_checkpoint(dpo_job, tmp_path) -> None:
    """One pair a micro-batch, so that the pair itself is named and no other."""
    job = dpo_job(tmp_path, tokens=8, checkpoint_every=1)
    bad = Order(7, 3, 1, job.seed).step(2)[0]
    job.objective.reference.chosen_P[bad] = np.nan
    with pytest.raises(DivergedError) as caught:
        job.run()
    assert f"not finite at step 3; rows: pair-{bad}" in str(caught.value)
    assert str(caught.value).count("pair-") == 1
    assert caught.value.exit_code == 4
    assert newest(job).name == "step-0000002"
    assert is_sealed(newest(job))
    kept = load_file(newest(job) / "weights.safetensors")
    assert all(torch.equal(kept[n], p) for n, p in job.policy.trainable().items())


def test_an_infinite_gradient_stops_before_the_update(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path)
    parameter = next(iter(job.policy.trainable().values()))
    parameter.register_hook(lambda gradient: gradient + torch.inf)
    before = weights(job)
    with pytest.raises(DivergedError, match="the gradient is not finite at step 1"):
        job.run()
    assert weights(job) == before


@pytest.mark.parametrize("total", [1, 7, 40])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.1, 0.33])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_is_transformers(schedule, warmup_ratio, total) -> None:
    warmup = math.ceil(warmup_ratio * total)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs: Any = {
        "cosine": lambda: get_cosine_schedule_with_warmup(optimizer, warmup, total),
        "linear": lambda: get_linear_schedule_with_warmup(optimizer, warmup, total),
        "constant": lambda: get_constant_schedule_with_warmup(optimizer, warmup),
    }[schedule]()
    settings = Sft.model_validate(
        {"learning_rate": 0.3, "schedule": schedule, "warmup_ratio": warmup_ratio}
    )
    for step in range(total):
        assert learning_rate(settings, step, total) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_the_schedule_reaches_the_optimizer(sft_job, gradients, tmp_path) -> None:
    job = sft_job(tmp_path, epochs=3, warmup_ratio=0.3)
    first = weights(job)
    gradients(job)
    rates = [line["learning_rate"] for line in lines(job) if "loss" in line]
    assert rates == [learning_rate(job.settings, s, 6) for s in range(6)]
    still = sft_job(tmp_path / "still", max_steps=1, warmup_ratio=0.5)
    still.run()  # the first step of a warm-up has rate 0
    assert weights(still) == first


def damage(folder: Path) -> None:
    """One flipped bit in the weights."""
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(content)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    sft_job, watcher, tmp_path
) -> None:
    common = {"epochs": 3, "checkpoint_every": 2}
    whole = sft_job(tmp_path / "whole", **common)
    whole.run()
    with pytest.raises(RuntimeError):
        sft_job(tmp_path / "cut", watcher(crash_at=5), **common).run()
    damage(tmp_path / "cut" / "checkpoints" / "step-0000004")
    again = sft_job(tmp_path / "cut", listener := watcher(), **common)
    again.run()
    assert listener.done == 2
    assert any("step-0000004" in note and "damaged" in note for note in listener.notes)
    assert weights(again) == weights(whole)


def test_a_damaged_checkpoint_does_not_displace_a_whole_one(sft_job, watcher, tmp_path) -> None:
    """Pruning keeps the newest: a damaged one of a later step must not count as that."""
    common = {"epochs": 3, "checkpoint_every": 2, "checkpoint_keep": 1}
    stopped = sft_job(tmp_path, watcher(signal_at=(5, signal.SIGINT)), **common)
    with pytest.raises(Stopped), stopped.stop.installed():
        stopped.run()
    damage(newest(stopped))
    with pytest.raises(RuntimeError):
        sft_job(tmp_path, watcher(crash_at=3), **common).run()
    sft_job(tmp_path, listener := watcher(), **common).run()
    assert listener.done == 2, "the work of the second attempt was lost"


def test_a_checkpoint_of_another_adapter_is_refused(sft_job, dpo_job, tmp_path) -> None:
    sft_job(tmp_path, max_steps=1).run()
    with pytest.raises(StorageError, match="other tensors than the ones that train"):
        dpo_job(tmp_path).run()


def test_only_the_last_checkpoints_are_kept(sft_job, tmp_path) -> None:
    job = sft_job(tmp_path, epochs=3, checkpoint_every=1, checkpoint_keep=2)
    job.run()
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000005", "step-0000006"]
    job.checkpoints().remove()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_stops(number, code, sft_job, watcher, tmp_path) -> None:
    job = sft_job(tmp_path, watcher(signal_at=(2, number)), epochs=3)
    before = signal.getsignal(number)
    message = "stopped after step 2; state is saved"
    with pytest.raises(Stopped, match=message) as caught, job.stop.installed():
        job.run()
    assert caught.value.exit_code == code
    assert newest(job).name == "step-0000002"
    assert signal.getsignal(number) == before


def test_tokens_are_weighed_alike_however_rows_are_filled(sft_job, tmp_path) -> None:
    """The loss of a step is its mean over tokens, not the mean of its rows' means."""
    job = sft_job(tmp_path, tokens=8)
    micros, divisor = job.objective.step(range(4))
    per_token = [job.policy.log_probs(m.layout) for m in micros]
    assert len({len(p) for p in per_token}) > 1
    total = sum(job.objective.loss(p, m)[0] for p, m in zip(per_token, micros, strict=True))
    assert (total / divisor).item() == pytest.approx(-torch.cat(per_token).mean().item(), rel=1e-6)
