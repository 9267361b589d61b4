"""A recipe's training, planned for a smaller card and run under its cap, as `zephyr-lite run` does.

The base is random and the rows are random ids of real lengths, so losses mean nothing. The plan,
the rehearsal, the loop and what it gives up when memory runs out are the product's. The budget is
what a card of that class leaves one process, its CUDA context included, and the allocator may
reserve the budget less that context. Optimizers whose states the system pages are run unpaged.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from gpu.bench import Bench
from gpu.examples import documents, pairs
from gpu.model import compute_dtype
from gpu.rig import GIB, Shared, card
from gpu.rows import Measure, absent, failed, figure
from plans.rig import Enough
from zephyr_lite.data.layout import Order
from zephyr_lite.errors import MachineError
from zephyr_lite.model.policy import make_policy
from zephyr_lite.plan.lengths import Lengths
from zephyr_lite.plan.memory import CONTEXT_BYTES
from zephyr_lite.plan.schedule import Candidate, Schedule, Training, choose
from zephyr_lite.plan.setting import setting_of
from zephyr_lite.recipe import Recipe
from zephyr_lite.recipe_file import load
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import Objective

UNPAGED = {"paged_adamw_32bit": "adamw", "paged_adamw_8bit": "adamw_8bit"}
SKIPPED = 2  # first steps, whose time is not counted: they load kernels
TOY_VALUES = (
    "sft.max_length=32", "sft.batch_size=2", "sft.lora.r=4", "sft.lora.alpha=4",
    "dpo.max_length=24", "dpo.max_prompt_length=8", "dpo.batch_size=2",
    "dpo.lora.r=4", "dpo.lora.alpha=4",
)  # fmt: skip


@dataclass(frozen=True)
class PlannedRun:
    """One case. cap_gib: what a card of the class leaves one process, context included."""

    cap_gib: float
    recipe: str
    stage: Literal["sft", "dpo"]
    steps: int
    gemm: Literal["exact"] = "exact"

    @property
    def budget(self) -> int:
        """Bytes."""
        return int(self.cap_gib * GIB)


@dataclass
class _Watch:
    """A listener that times steps and ends the training after the last one asked for."""

    bench: Bench
    steps: int
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    rehearsal: int | None = None  # most bytes allocated before the first step
    has_begun: bool = False
    _at: float = 0.0

    def start(self, label: str, total: int, done: int) -> None:
        """See `Listener`: the rehearsal is over."""
        self.rehearsal = _peak(self.bench, "allocated")
        if self.bench.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        self.has_begun, self._at = True, time.perf_counter()

    def step(self, record: dict[str, Any]) -> None:
        """See `Listener`. Raises: Enough, after the last step."""
        self.bench.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._at)
        self._at = now
        if len(self.seconds) == self.steps:
            raise Enough

    def note(self, text: str) -> None:
        """See `Listener`: what was given up, and when."""
        (self.late if self.has_begun else self.notes).append(text)

    def end(self) -> None:
        """See `Listener`."""


def measure(shared: Shared, case: PlannedRun) -> list[Measure]:
    """Plan, then run: rows that say whether it fits, what was given up, bytes and seconds."""
    bench = shared.bench
    _ = shared.base  # whose ceilings the plan ranks by
    recipe = recipe_of(bench, case)
    training, objective = _work(bench, shared, recipe, case)
    schedule = choose(training, case.budget, recipe.memory)
    if schedule.chosen is None:
        least = schedule.least.parts.total / GIB
        return [failed("fits", f"takes at least {least:.2f} GiB", status="wrong")]
    watch = _Watch(bench, case.steps)
    rows = [_fits(schedule, schedule.chosen)]
    try:
        _run(shared, recipe, case, schedule.chosen, objective, watch)
    except (MachineError, torch.OutOfMemoryError) as error:
        done = f"after {len(watch.seconds)} steps: {error}"  # last: a note is cut at its head
        rows.append(failed("run", f"{watch.notes + watch.late}; {done}", status="wrong"))
    else:
        rows += [_step(training, schedule.chosen, watch), *_memory(bench, schedule.chosen, watch)]
    finally:
        shared.cap(None)
    shared.release()
    return [*rows, _notches(watch)]


def recipe_of(bench: Bench, case: PlannedRun) -> Recipe:
    """The recipe, its products exact and its optimizers unpaged. Raises: RecipeError."""
    values = (f"gemm={case.gemm}", *bench.pick((), TOY_VALUES))
    recipe = load(case.recipe, values)
    for stage in ("sft", "dpo"):
        settings = getattr(recipe, stage)
        if settings.optimizer in UNPAGED:
            values += (f"{stage}.optimizer={UNPAGED[settings.optimizer]}",)
    return load(case.recipe, values)


def _work(
    bench: Bench, shared: Shared, recipe: Recipe, case: PlannedRun
) -> tuple[Training, Objective]:
    """What is planned and what is trained, of the same rows; tokens are set by the plan."""
    settings: Any = getattr(recipe, case.stage)
    objective: Objective
    lengths: Lengths
    if case.stage == "sft":
        objective, lengths = documents(bench, shared.geometry.vocabulary, settings)
    else:
        objective, lengths = pairs(bench, shared.geometry.vocabulary, settings)
    element = 2 if bench.on_gpu else 4
    setting = setting_of(recipe, case.stage, "cuda" if bench.on_gpu else "cpu", element)
    epochs = _epochs(case, objective.n_examples, settings.batch_size)
    order = Order(objective.n_examples, settings.batch_size, epochs, recipe.seed, None)
    return Training(shared.geometry, setting, lengths, order, card(bench)), objective


def _epochs(case: PlannedRun, n_examples: int, batch: int) -> int:
    """So many that another step would follow the last one asked for."""
    return case.steps * batch // n_examples + 1


def _run(
    shared: Shared,
    recipe: Recipe,
    case: PlannedRun,
    chosen: Candidate,
    objective: Objective,
    watch: _Watch,
) -> None:
    """Rehearsal and steps, under the cap.

    Raises: MachineError when nothing is left to give up.
    """
    bench, settings = shared.bench, getattr(recipe, case.stage)
    adapters = {"sft": recipe.sft.lora.r} if recipe.sft else {}
    adapters |= {case.stage: settings.lora.r}
    model = shared.adapted(adapters, settings.lora.dropout)
    dtype = compute_dtype(bench)
    shared.cap(case.budget - CONTEXT_BYTES)
    memory = recipe.memory.model_copy(update=chosen.memory)
    policy = make_policy(model, dtype, bench.device, memory, gemm=case.gemm, self_test=False)
    policy.use(list(adapters), case.stage)
    objective.tokens_per_micro_batch = chosen.cut.tokens
    epochs = _epochs(case, objective.n_examples, settings.batch_size)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            label=case.stage,
            policy=policy,
            objective=objective,
            settings=settings.model_copy(update={"epochs": epochs, "max_steps": None}),
            folder=Path(folder),
            seed=recipe.seed,
            listener=watch,
            stop=Stop(),
            evaluate=dict,
            masters=chosen.cut.place,
            rehearses=True,
        )
        try:
            job.run()
        except Enough:
            return
    raise RuntimeError(f"the training ended before {case.steps} steps")


def _fits(schedule: Schedule, chosen: Candidate) -> Measure:
    """What the plan says: its bytes of the budget, its cut, what else would do."""
    others = [asdict(candidate.cut) for candidate in schedule.alternatives]
    return figure(
        "fits", "GiB", chosen.parts.total / GIB,
        budget_gib=schedule.budget / GIB, cut=asdict(chosen.cut), bytes=asdict(chosen.parts),
        host_bytes=asdict(chosen.host), alternatives=others,
    )  # fmt: skip


def _step(training: Training, chosen: Candidate, watch: _Watch) -> Measure:
    """Milliseconds of the steps behind the first ones, beside what the roofline projects."""
    seconds = watch.seconds[SKIPPED:] or watch.seconds
    seconds = seconds if len(seconds) > 1 else seconds * 2  # quantiles want two
    cuts = statistics.quantiles(seconds, n=5, method="inclusive")
    p50, projected = statistics.median(seconds), chosen.step_seconds
    examples = training.setting.batch
    tokens = training.lengths.total_tokens / training.lengths.n_examples * examples
    return Measure(
        "step", "ms", 1e3 * cuts[0], 1e3 * p50, 1e3 * cuts[3], len(seconds),
        derived={
            "steps": len(watch.seconds),
            "projected_ms": 1e3 * projected,
            "percent_of_projected": 100 * projected / p50,
            "examples_per_second": examples / p50,
            "tokens_per_second": tokens / p50,
            "micro_batches": chosen.micro_batches,
            "optimizer": training.setting.optimizer,
        },
    )  # fmt: skip


def _memory(bench: Bench, chosen: Candidate, watch: _Watch) -> Iterator[Measure]:
    """Peaks of the steps, and of the rehearsal before them, beside the planned bytes."""
    if not bench.on_gpu or watch.rehearsal is None:
        yield absent("peak_allocated", "a CPU keeps no statistics of its allocator")
        return
    allocated, reserved = _peak(bench, "allocated") or 0, _peak(bench, "reserved") or 0
    planned = chosen.parts.live
    yield figure(
        "peak_allocated", "GiB", allocated / GIB, rehearsal_gib=watch.rehearsal / GIB,
        planned_gib=planned / GIB,
    )  # fmt: skip
    planned += chosen.parts.slack
    yield figure("peak_reserved", "GiB", reserved / GIB, planned_gib=planned / GIB)


def _notches(watch: _Watch) -> Measure:
    """What was given up; wrong where it was after the rehearsal, which should have found it."""
    if watch.late:
        words = "; ".join(watch.late)
        return failed("notches", f"late, after {len(watch.seconds)} steps: {words}", status="wrong")
    return figure("notches", "count", float(len(watch.notes)), in_rehearsal=watch.notes)


def _peak(bench: Bench, kind: Literal["allocated", "reserved"]) -> int | None:
    """Most bytes since the last reset; None where nothing counts them."""
    if not bench.on_gpu:
        return None
    return torch.cuda.memory_stats(bench.device)[f"{kind}_bytes.all.peak"]
