"""`zephyr-lite plan`: what a recipe will take of memory, time and disk, before anything is loaded.

    headers of the base + lengths of the data + a card -> plan.schedule -> table, or JSON

Lengths are those of the data where this run has tokenised it, else estimates, and that is said.
Seconds are projected from the card's rates, or from two steps of the heaviest micro-batch that
`--probe` times on the GPU that is here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.token_store import known_tokens
from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.model.base import compute_dtype, find_folder
from zephyr_lite.plan.checkpoint import Checkpoint, find_checkpoint
from zephyr_lite.plan.disk import disk_bytes
from zephyr_lite.plan.estimates import estimate
from zephyr_lite.plan.gpus import Gpu, gpu_named, memory_bytes, usable_bytes
from zephyr_lite.plan.lengths import Lengths, documents_of, pairs_of
from zephyr_lite.plan.roofline import reference_seconds
from zephyr_lite.plan.schedule import Schedule, Training, choose
from zephyr_lite.plan.setting import order_of, setting_of
from zephyr_lite.recipe import Recipe
from zephyr_lite.report import plan_table, quantities
from zephyr_lite.report.plan_table import Column, Duration
from zephyr_lite.stages import fit, probe
from zephyr_lite.stages.context import Context
from zephyr_lite.stages.fit import GB, Stage, does_not_fit, in_words, record
from zephyr_lite.stages.reference import encoded_pairs
from zephyr_lite.stages.sft import corpus
from zephyr_lite.storage import cache_folder

LABELS = {"sft": "dSFT", "dpo": "dDPO"}


@dataclass(frozen=True)
class Machine:
    """What is planned for. name: for people. gpu: whose rates project seconds; None for none."""

    name: str
    kind: Literal["cpu", "cuda"]
    budget: int
    gpu: Gpu | None

    @property
    def rates(self) -> Gpu:
        """Those that rank cuts, where there are none that tell seconds."""
        return self.gpu or (fit.CPU if self.kind == "cpu" else fit.UNKNOWN)


@dataclass
class StagePlan:
    """One training, planned. factor: measured seconds over projected ones; None: not measured."""

    stage: Stage
    training: Training
    schedule: Schedule
    factor: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.training.order.total_steps

    @property
    def step_seconds(self) -> float | None:
        """Of one optimizer step; None where nothing fits."""
        chosen = self.schedule.chosen
        return None if chosen is None else chosen.step_seconds * (self.factor or 1.0)

    @cached_property
    def pass_seconds(self) -> float:
        """Of one forward over every example: the reference pass over pairs."""
        t = self.training
        chosen = self.schedule.chosen or self.schedule.least
        works = t.lengths.works(chosen.cut.tokens, t.order).steps
        each = [
            sum(reference_seconds(t.geometry, t.setting, work, t.gpu) for work in step)
            for step in works
        ]
        return sum(each) / len(each) * t.order.steps_per_epoch * (self.factor or 1.0)


def run(
    ctx: Context, *, vram: str | None, gpu: str | None, measure: bool, as_json: bool, pick: str
) -> None:
    """Plan every training of the recipe, print it, and raise where one does not fit.

    Args:
        vram: memory of the card, such as 24GB; gpu: its name; default: the GPU that is here.
        measure: time two steps of the heaviest micro-batch here.
        pick: the recipe as it was named, for the next command.
    Raises: MachineError (exit 3) when a training does not fit, with what would.
    """
    recipe, machine = ctx.recipe, machine_of(ctx, vram, gpu)
    checkpoint = find_checkpoint(recipe.base, offline=ctx.run.offline, device=machine.kind)
    plans = [_planned(ctx, stage, checkpoint, machine) for stage in _stages(recipe)]
    if not plans:
        raise RecipeError(f"recipe {recipe.name} trains nothing: there is nothing to plan")
    if measure:
        _measure(ctx, machine, plans)
    disk = disk_bytes(recipe, checkpoint, {p.stage: p.training.lengths for p in plans})
    if as_json:
        print(json.dumps(_as_json(recipe, machine, checkpoint, plans, disk), allow_nan=False))
    else:
        print("\n".join(_lines(recipe, machine, checkpoint, plans, disk)))
    sys.stdout.flush()
    for plan in plans:
        if plan.schedule.chosen is None:
            raise does_not_fit(plan.stage, plan.schedule, plan.training, recipe)
    ctx.listener.note(f"run it: zephyr-lite run {pick}")


def machine_of(ctx: Context, vram: str | None, gpu: str | None) -> Machine:
    """The card that was named, or what is here.

    Raises: MachineError where neither is; RecipeError for an unknown name or amount.
    """
    vram, reserve = vram or ctx.recipe.memory.budget, int(ctx.recipe.memory.reserve * GB)
    known = gpu_named(gpu) if gpu else None
    if vram:
        bytes_ = memory_bytes(vram)
        on_cpu = ctx.device.type == "cpu" and known is None and not _is_large(ctx)
        budget = (bytes_ if on_cpu else usable_bytes(bytes_)) - reserve
        name = f"{known.name} held to {vram}" if known else f"a card of {vram}"
        return Machine("this CPU" if on_cpu else name, "cpu" if on_cpu else "cuda", budget, known)
    if known:
        return Machine(known.name, "cuda", known.usable_bytes - reserve, known)
    if ctx.device.type == "cuda":
        name = torch.cuda.get_device_name(ctx.device)
        rates = fit.rates_of(ctx)
        here = None if rates is fit.UNKNOWN else rates
        return Machine(name, "cuda", fit.budget_of(ctx.recipe.memory, ctx.device), here)
    if _is_large(ctx):
        raise MachineError(
            "no CUDA GPU here to plan for",
            hint=f"name one: zephyr-lite plan {ctx.recipe.name} --gpu 4090, or --vram 24GB",
        )
    return Machine("this CPU", "cpu", psutil.virtual_memory().available - reserve, None)


def _is_large(ctx: Context) -> bool:
    """Whether the recipe's base is no model for a CPU."""
    return ctx.recipe.base.build is None and not Path(ctx.recipe.base.model).expanduser().is_dir()


def _stages(recipe: Recipe) -> Iterator[Stage]:
    if recipe.sft and not recipe.sft.start and recipe.data.dialogues:
        yield "sft"
    if recipe.dpo:
        yield "dpo"


def _planned(ctx: Context, stage: Stage, checkpoint: Checkpoint, machine: Machine) -> StagePlan:
    recipe = ctx.recipe
    lengths = _known_lengths(ctx, stage) or estimate(recipe, stage)
    dtype = compute_dtype(recipe.base, torch.device(machine.kind))
    setting = setting_of(recipe, stage, machine.kind, 4 if dtype == torch.float32 else 2)
    order = order_of(recipe, stage, lengths.n_examples)
    training = Training(checkpoint.geometry, setting, lengths, order, machine.rates)
    return StagePlan(stage, training, choose(training, machine.budget, recipe.memory))


def _known_lengths(ctx: Context, stage: Stage) -> Lengths | None:
    """Lengths of the data that this run, or one with the same dialogues, has tokenised.

    None where it has not, or where base or data are not on this machine: what is wrong with them,
    the estimate says.
    """
    base = ctx.recipe.base
    if base.build is not None:  # its tokenizer comes with the base, which is not made for a plan
        return None
    try:
        folder, _ = find_folder(base.model, base.revision, (), "base", offline=True)
        tokenizer = load_tokenizer(folder)
        if stage == "sft":
            return _known_documents(ctx, tokenizer)
        if ctx.run.path("aif", "pairs.parquet").is_file():
            return pairs_of(encoded_pairs(ctx, tokenizer, "train")[1])
    except (MachineError, RecipeError, DataError, StorageError):
        pass
    return None


def _known_documents(ctx: Context, tokenizer: ChatTokenizer) -> Lengths | None:
    sft, dialogues = ctx.recipe.sft, ctx.recipe.data.dialogues
    if sft is None or dialogues is None:
        return None
    # Nothing is asked of the hub for this: what is tokenised is in the cache.
    wanted = replace(corpus(ctx, dialogues, "train"), offline=True)
    found = known_tokens(wanted, tokenizer, cache_folder() / "tokens")
    return documents_of(found.documents, sft) if found and found.documents else None


def _measure(ctx: Context, machine: Machine, plans: list[StagePlan]) -> None:
    if machine.kind != ctx.device.type:
        raise MachineError("--probe times steps on a GPU, and there is none here")
    for plan in plans:
        if plan.schedule.chosen is not None:
            plan.factor, plan.measured = probe.run(ctx, plan.training, plan.schedule.chosen)


# ---------------------------------------------------------------- what is printed


def _lines(
    recipe: Recipe,
    machine: Machine,
    checkpoint: Checkpoint,
    plans: list[StagePlan],
    disk: dict[str, int],
) -> list[str]:
    columns = [_column(plan) for plan in plans]
    budget = quantities.memory(machine.budget)
    billions = checkpoint.parameters / 1e9
    size = f"{billions:.1f} B" if billions >= 1 else f"{1000 * billions:.1f} M"
    head = f"{recipe.name} on {machine.name}: {budget} may be used"
    lines = [head, f"  {recipe.base.model}, {size} parameters, {checkpoint.source}", ""]
    lines += [*plan_table.table(columns, machine.budget), ""]
    lines += [*plan_table.bars(columns, machine.budget), "", *plan_table.choices(columns), ""]
    lines += [_about_time(machine, plans), *plan_table.times(list(_durations(machine, plans)))]
    lines += ["", *_on_disk(disk), *_on_the_host(plans)]
    return [*lines, *(f"  {LABELS[p.stage]} data: {p.training.lengths.source}" for p in plans)]


def _column(plan: StagePlan) -> Column:
    schedule, training = plan.schedule, plan.training
    if schedule.chosen is None:
        words = f"does not fit; the least is {in_words(schedule.least, training)}"
        return Column(plan.stage, schedule.least.parts, words, (), None)
    others = tuple(
        plan_table.alternative(other, schedule.chosen, in_words(other, training))
        for other in schedule.alternatives
    )
    words = in_words(schedule.chosen, training)
    return Column(plan.stage, schedule.chosen.parts, words, others, schedule.chosen)


def _about_time(machine: Machine, plans: list[StagePlan]) -> str:
    if any(plan.measured for plan in plans):
        return "time, from two measured steps of the heaviest micro-batch"
    if machine.gpu is None:
        return "time: not known without --gpu NAME or --probe"
    return f"time, PROJECTED from the rates of the {machine.gpu.name}, not measured"


def _durations(machine: Machine, plans: list[StagePlan]) -> Iterator[Duration]:
    for plan in plans:
        tells = machine.gpu is not None or plan.factor is not None
        step = plan.step_seconds if tells else None
        if plan.stage == "dpo":
            work = f"{plan.training.lengths.n_examples:,} pairs"
            yield Duration("reference", work, plan.pass_seconds if tells else None)
        each = "" if step is None else f" of {step:.2g} s" if step < 10 else f" of {step:.0f} s"
        whole = None if step is None else step * plan.steps
        yield Duration(LABELS[plan.stage], f"{plan.steps:,} steps{each}", whole)


def _on_disk(disk: dict[str, int]) -> list[str]:
    parts = [f"{name} {quantities.disk(size)}" for name, size in disk.items()]
    return plan_table.indented("disk, about: ", ", ".join(parts) + _disk_sum(disk))


def _disk_sum(disk: dict[str, int]) -> str:
    return f"; in all {quantities.disk(sum(disk.values()))}"


def _on_the_host(plans: list[StagePlan]) -> list[str]:
    lines = []
    for plan in plans:
        host = (plan.schedule.chosen or plan.schedule.least).host
        if host.pinned or host.ordinary:
            whole = quantities.memory(host.pinned + host.ordinary)
            pinned = quantities.memory(host.pinned)
            lines.append(f"host memory of {LABELS[plan.stage]}: {whole}, {pinned} of it pinned")
    return lines


def _as_json(
    recipe: Recipe,
    machine: Machine,
    checkpoint: Checkpoint,
    plans: list[StagePlan],
    disk: dict[str, int],
) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for plan in plans:
        tells = machine.gpu is not None or plan.factor is not None
        lengths = plan.training.lengths
        stages[plan.stage] = {
            "fits": plan.schedule.chosen is not None,
            **record(plan.schedule),
            "least_bytes": plan.schedule.least.parts.total,
            "steps": plan.steps,
            "seconds": None
            if plan.step_seconds is None or not tells
            else plan.step_seconds * plan.steps,
            "is_measured": plan.factor is not None,
            "measured": plan.measured,
            "lengths": {"source": lengths.source, "is_estimate": lengths.is_estimate},
        }
        if plan.stage == "dpo":
            stages["dpo"]["reference_seconds"] = plan.pass_seconds if tells else None
    return {
        "recipe": recipe.name,
        "machine": machine.name,
        "budget_bytes": machine.budget,
        "gpu": None if machine.gpu is None else asdict(machine.gpu),
        "base": {"parameters": checkpoint.parameters, "source": checkpoint.source},
        "stages": stages,
        "disk_bytes": disk,
    }
