"""What `zephyr-lite plan` says: a page of 80 columns, or one JSON object."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from zephyr_lite.plan.checkpoint import Checkpoint
from zephyr_lite.plan.costs import Machine, StagePlan
from zephyr_lite.recipe import Recipe
from zephyr_lite.report import plan_table, quantities
from zephyr_lite.report.plan_table import Column, Duration


def lines(
    recipe: Recipe,
    machine: Machine,
    checkpoint: Checkpoint,
    plans: list[StagePlan],
    disk: dict[str, int],
) -> list[str]:
    """The page. Args: disk: what -> bytes, see `plan.disk`."""
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
    return [*lines, *(f"  {p.name} data: {p.training.lengths.source}" for p in plans)]


def _column(plan: StagePlan) -> Column:
    schedule, training = plan.schedule, plan.training
    if schedule.chosen is None:
        words = f"does not fit; the least is {training.words(schedule.least.cut)}"
        return Column(plan.stage, schedule.least.parts, words, ())
    others = tuple(
        plan_table.alternative(other, schedule.chosen, training.words(other.cut))
        for other in schedule.alternatives
    )
    words = training.words(schedule.chosen.cut)
    return Column(plan.stage, schedule.chosen.parts, words, others)


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
        yield Duration(plan.name, f"{plan.steps:,} steps{each}", whole)


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
            lines.append(f"host memory of {plan.name}: {whole}, {pinned} of it pinned")
    return lines


def as_json(
    recipe: Recipe,
    machine: Machine,
    checkpoint: Checkpoint,
    plans: list[StagePlan],
    disk: dict[str, int],
) -> dict[str, Any]:
    """The same for a program: bytes and seconds, None where they are not known."""
    stages: dict[str, Any] = {}
    for plan in plans:
        tells = machine.gpu is not None or plan.factor is not None
        lengths = plan.training.lengths
        stages[plan.stage] = {
            "fits": plan.schedule.chosen is not None,
            **plan.schedule.record(),
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
