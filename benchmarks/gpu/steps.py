"""Optimizer steps of a 7B under a memory cap: time, memory, and the share of what the card can do.

A step is the training loop's own: micro-batches, head, loss, backward, clipping, 8-bit AdamW whose
state stays on the GPU, or AdamW whose state is on the host. Running out of memory is a row. Where a
step reaches less than 70 % of the roofline (zephyr_lite/plan/roofline.py), a profile says where the
time went.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.bench import Bench, Case
from gpu.rig import GIB, Rig, Setting
from gpu.rows import Measure, absent, failed, figure
from zephyr_lite.data.layout import Order
from zephyr_lite.errors import MachineError
from zephyr_lite.model.adapters import set_dropout
from zephyr_lite.model.engines import choose_gemm
from zephyr_lite.model.gemm_probe import probe
from zephyr_lite.model.policy import Policy
from zephyr_lite.plan.roofline import least_seconds
from zephyr_lite.plan.work import work_of
from zephyr_lite.stopping import Stop
from zephyr_lite.train.fitting import Fitting
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import MicroBatch

PROFILE_BELOW = 70.0  # percent of the roofline
PROFILE_LINES = 12


def step_cases(bench: Bench, rig: Rig, settings: list[Setting]) -> Iterator[Case]:
    """The engine's own proof on this model, then a case per setting."""
    size = {"layers": rig.geometry.layers, "hidden": rig.geometry.hidden}
    task = {"task": rig.task.name, "ranks": list(rig.task.adapters.values())}
    proof = {**task, **size, "name": "self_test", "gemm": "exact"}
    yield Case(proof, lambda: [_self_test(rig, settings[0])])
    for setting in settings:
        yield Case({**task, **size, **asdict(setting)}, lambda s=setting: _measure(rig, s))


def _self_test(rig: Rig, setting: Setting) -> Measure:
    """Native against transformers on random weights, all adapters active."""
    try:
        policy = rig.policy(replace(setting, engine="native"))
        set_dropout(policy.model, None)
        with torch.no_grad(), policy.autocast():
            error = policy.engine.self_test(rig.bench.device)
    except MachineError as refusal:
        return failed("self_test", str(refusal), status="wrong")
    finally:
        rig.release()
    return figure("self_test", "1", error)


def _measure(rig: Rig, setting: Setting) -> list[Measure]:
    _ = rig.model
    rig.release()
    rig.cap(setting.cap_gib)
    try:
        return list(_train(rig, setting))
    except torch.OutOfMemoryError as error:
        reason = f"out of memory: {error}"
    except (_NotHere, MachineError) as refusal:
        reason = str(refusal)
    finally:
        rig.cap(None)
    # Behind the except block: the exception's traceback held the step's tensors.
    rig.release()
    return [absent("step", reason)]


def _train(rig: Rig, setting: Setting) -> Iterator[Measure]:
    bench, task = rig.bench, rig.task
    policy = _policy(rig, setting)
    objective = task.make_objective(setting)
    settings = task.settings_for(setting.place)
    order = Order(objective.n_examples, settings.batch_size, 1000, 0, None)
    masters = rig.masters(setting, policy)
    values = list(policy.trainable().values())
    fitting = Fitting(task.name, _NoWayDown(), values, bench.device, _Quiet().note)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(task.name, policy, objective, settings, Path(folder), 0, _Quiet(), Stop(), dict)

        def step(number: int) -> float:
            """Seconds of one step of the loop; `run` would also write checkpoints."""
            bench.synchronize()
            began = time.perf_counter()
            job._step(number, order, masters, fitting)
            bench.synchronize()
            return time.perf_counter() - began

        for number in range(rig.warmup):
            step(number)
        retries = _reset_peaks(bench)
        timed = range(rig.warmup, rig.warmup + rig.steps)
        seconds = [step(number) for number in timed]
        work = [objective.step(order.step(number))[0] for number in timed]
        row = _row(rig, setting, seconds, work)
        yield row
        yield from _memory(bench, retries)
        if row.derived["percent_of_roofline"] < PROFILE_BELOW and setting.is_profiled:
            # Where the profiler is refused the card's counters, the step's rows still count.
            yield bench.probe("profile", lambda: _profile(bench, lambda: step(timed[-1])))


class _NoWayDown:
    """A ladder without notches: what does not fit as it was set is a row that says so."""

    def down(self) -> str | None:
        """See `Ladder`."""
        return None


class _NotHere(Exception):
    """This machine refuses the setting."""


def _policy(rig: Rig, setting: Setting) -> Policy:
    """The rig's, its `gemm` asked of this card as a training asks it.

    Raises: _NotHere with the refusal.
    """
    try:
        choose_gemm(setting.gemm, setting.engine, rig.bench.device)
        policy = rig.policy(setting)
        if setting.gemm != "exact":
            probe(policy.engine, setting.tokens)
    except MachineError as refusal:
        raise _NotHere(str(refusal)) from None
    return policy


def _row(rig: Rig, setting: Setting, seconds: list[float], work: list[list[MicroBatch]]) -> Measure:
    """Milliseconds of a step, and the rates over all timed steps."""
    bench, task = rig.bench, rig.task
    total = sum(seconds)
    tokens = sum(micro.layout.n_tokens for step in work for micro in step)
    examples = sum(len(micro.examples) for step in work for micro in step)
    least = sum(
        least_seconds(
            rig.geometry,
            task.planned,
            [work_of(micro.layout) for micro in step],
            setting.recomputed,
            matmul_tflops=bench.matmul_tflops,
            copy_gb_per_s=bench.copy_gb_per_s,
        )
        for step in work
    )
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    return Measure(
        "step", "ms", 1e3 * cuts[0], 1e3 * statistics.median(seconds), 1e3 * cuts[3], len(seconds),
        derived={
            "tokens_per_second": tokens / total,
            f"{task.unit}_per_second": examples / total,
            "percent_of_roofline": 100 * least / total,
            "roofline_tokens_per_second": tokens / least,
            "matmul_tflops": bench.matmul_tflops,
            "copy_gb_per_s": bench.copy_gb_per_s,
            "recomputed": setting.recomputed,
            "micro_batches": sum(map(len, work)) / len(work),
            "optimizer": task.settings_for(setting.place).optimizer,
        },
    )  # fmt: skip


def _reset_peaks(bench: Bench) -> int:
    """Begin new peaks; returns how often the allocator has had to start over so far."""
    if not bench.on_gpu:
        return 0
    torch.cuda.reset_peak_memory_stats(bench.device)
    return torch.cuda.memory_stats(bench.device)["num_alloc_retries"]


def _memory(bench: Bench, retries: int) -> Iterator[Measure]:
    if not bench.on_gpu:
        yield absent("peak_allocated", "a CPU keeps no statistics of its allocator")
        return
    stats = torch.cuda.memory_stats(bench.device)
    allocated = stats["allocated_bytes.all.peak"] / GIB
    reserved = stats["reserved_bytes.all.peak"] / GIB
    yield figure("peak_allocated", "GiB", allocated, retries=stats["num_alloc_retries"] - retries)
    yield figure("peak_reserved", "GiB", reserved)


def _profile(bench: Bench, step: Callable[[], float]) -> Measure:
    """The kernels of one step by time, twelve lines, and how much of the step they are busy."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    with profile(activities=activities) as recorded:
        seconds = step()
    where = "CUDA" if bench.on_gpu else "CPU"
    spent = [
        (
            (e.self_device_time_total if bench.on_gpu else e.self_cpu_time_total) / 1e3,
            e.count,
            e.key,
        )
        for e in recorded.key_averages()
        if e.device_type.name == where
    ]
    if not spent:
        return absent("profile", "the profiler saw no kernel")
    spent.sort(reverse=True)
    busy = sum(ms for ms, _, _ in spent)
    lines = [
        f"{ms:9.3f} ms {100 * ms / busy:5.1f} % {count:6d} x  {name[:90]}"
        for ms, count, name in spent[:PROFILE_LINES]
    ]
    share = 100 * busy / (1e3 * seconds)
    return figure("profile", "ms", busy, busy_percent_of_step=share, top=lines)


class _Quiet:
    """A listener that nothing is told to: steps are timed from outside."""

    def start(self, label: str, total: int, done: int) -> None:
        """See `Listener`."""

    def step(self, record: dict[str, Any]) -> None:
        """See `Listener`."""

    def note(self, text: str) -> None:
        """See `Listener`."""

    def end(self) -> None:
        """See `Listener`."""
