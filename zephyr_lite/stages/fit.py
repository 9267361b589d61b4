"""How a training is cut to fit this machine: the plan, made when the lengths of its data are known.

    sizes of the base + lengths of the data + a budget -> plan.schedule.choose -> memory, no `auto`

On a GPU the budget is what is free, or `memory.budget`, less `memory.reserve`. Without a GPU and
without a budget nothing is planned, and the recipe's `memory` stands as it is.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any, Literal

import torch

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.plan.checkpoint import read_checkpoint
from zephyr_lite.plan.gpus import CPU, UNKNOWN, Gpu, gpu_named, memory_bytes, usable_bytes
from zephyr_lite.plan.lengths import Lengths
from zephyr_lite.plan.memory import CONTEXT_BYTES
from zephyr_lite.plan.schedule import Schedule, Training, choose, fits
from zephyr_lite.plan.setting import order_of, setting_of
from zephyr_lite.plan.work import Work, documents_work, pairs_work
from zephyr_lite.recipe import Memory, Recipe
from zephyr_lite.report import quantities
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import read_json
from zephyr_lite.train.loop import Job

Stage = Literal["sft", "dpo"]
GB = 10**9
SHORTER, LOWER = (1536, 1024, 768, 512), (64, 32, 16, 8)


def fitted(ctx: Context, stage: Stage, lengths: Lengths) -> tuple[Context, dict[str, Any]]:
    """The context with its memory planned for a training, and what the manifest says of the plan.

    Raises: MachineError (exit 3) when nothing fits, with what would.
    """
    memory, on_gpu = ctx.recipe.memory, ctx.device.type == "cuda"
    if not on_gpu and memory.budget is None:
        return ctx, {}
    own = copy(ctx)
    if ctx.engine != "native":
        again = "full" if memory.checkpointing == "auto" and on_gpu else memory.checkpointing
        own.planned = memory.model_copy(update={"checkpointing": again})
        ctx.listener.note(
            f"{stage}: memory is planned for engine native only, not for {ctx.engine}"
        )
        return own, {}
    budget = budget_of(memory, ctx.device)
    training = _training(ctx, stage, lengths)
    schedule = choose(training, budget, memory)
    if schedule.chosen is None:
        raise does_not_fit(stage, schedule, training, ctx.recipe)
    own.planned = memory.model_copy(update=schedule.chosen.memory)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(ctx.device)  # the peaks from here on are this training's
        if memory.budget is not None:
            _cap(budget, ctx.device)
    size = f"{quantities.memory(schedule.chosen.parts.total)} of {quantities.memory(budget)}"
    _say(ctx, stage, training.words(schedule.chosen.cut), f"plans with {size}")
    return own, {"plan": schedule.record()}


def _say(ctx: Context, stage: Stage, cut: str, size: str) -> None:
    """Note a plan, once where the reference pass has planned dDPO's training before it.

    Each of them says it where it runs alone, and dDPO where held-out pairs, which are the reference
    pass's too, have made another cut.
    """
    if ctx.plans_said.get(stage) != cut:
        ctx.plans_said[stage] = cut
        ctx.listener.note(f"{stage}: {cut}; {size}")


def outcome(ctx: Context, job: Job) -> dict[str, Any]:
    """What the manifest says of a finished training's memory: its peak, and what was given up."""
    found: dict[str, Any] = {}
    if ctx.device.type == "cuda":
        found["peak_bytes"] = {
            "allocated": torch.cuda.max_memory_allocated(ctx.device),
            "reserved": torch.cuda.max_memory_reserved(ctx.device),
        }
    return found | ({"notches": job.notches} if job.notches else {})


def budget_of(memory: Memory, device: torch.device) -> int:
    """Bytes that a training may take on the device, its CUDA context among them."""
    reserve, limits = int(memory.reserve * GB), []
    if memory.budget is not None:
        asked = memory_bytes(memory.budget)
        limits.append(usable_bytes(asked) if device.type == "cuda" else asked)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        limits.append(free + torch.cuda.memory_reserved(device) + CONTEXT_BYTES)
    return min(limits) - reserve


def does_not_fit(
    stage: str, schedule: Schedule, training: Training, recipe: Recipe
) -> MachineError:
    """What is short, and which changes of the recipe would do."""
    found: dict[str, str] = {}
    for name, (changed, longest) in _changes(stage, training, recipe).items():
        key = name.partition("=")[0]  # the least of a change that does is enough
        if key not in found and fits(changed, schedule.budget, recipe.memory, longest):
            found[key] = f"{name} fits"
    hint = "; ".join(found.values())
    least = quantities.memory(schedule.least.parts.total)
    return MachineError(
        f"{stage} takes at least {least}, and {quantities.memory(schedule.budget)} may be used",
        hint=hint or "no single change of length, rank or optimizer fits: take a smaller base",
    )


def _changes(
    stage: str, training: Training, recipe: Recipe
) -> dict[str, tuple[Training, Work | None]]:
    """What a person could change, each by itself: the training with it, and its longest example."""
    settings = getattr(recipe, stage)
    changes: dict[str, tuple[Training, Work | None]] = {}
    for length in (n for n in SHORTER if n < settings.max_length):
        pair = (1, length - 1, length - 1)  # no prompt is shorter, and no pair longer
        work = documents_work([length]) if stage == "sft" else pairs_work([pair])
        changes[f"{stage}.max_length={length}"] = training, work
    setting = training.setting
    others = {f"lora.r={r}": replace(setting, trained=r) for r in LOWER if r < setting.trained}
    if setting.optimizer != "adamw_8bit":
        others["optimizer=adamw_8bit"] = replace(setting, optimizer="adamw_8bit")
    if setting.optimizer != "adamw":
        others["optimizer=adamw"] = replace(setting, optimizer="adamw")
    for name, changed in others.items():
        changes[f"{stage}.{name}"] = replace(training, setting=changed), None
    return changes


def _training(ctx: Context, stage: Stage, lengths: Lengths) -> Training:
    kind: Literal["cpu", "cuda"] = "cuda" if ctx.device.type == "cuda" else "cpu"
    checkpoint = read_checkpoint(ctx.base.folder, ctx.base_settings, device=kind)
    element: Literal[2, 4] = 4 if ctx.dtype == torch.float32 else 2
    setting = setting_of(ctx.recipe, stage, kind, element, _sft_rank(ctx))
    order = order_of(ctx.recipe, stage, lengths.n_examples)
    return Training(checkpoint.geometry, setting, lengths, order, rates_of(ctx))


def _sft_rank(ctx: Context) -> int:
    """Rank of the SFT adapter over the base, 0 where there is none."""
    folder = ctx.adapter("sft")
    if folder is None:
        return 0
    config = folder / "adapter_config.json"
    if config.is_file():
        return int(read_json(config)["r"])
    return ctx.recipe.sft.lora.r if ctx.recipe.sft else 0


def rates_of(ctx: Context) -> Gpu:
    """The GPU's own rates where they are known; a plan needs them to rank cuts only."""
    if ctx.device.type == "cpu":
        return CPU
    name = torch.cuda.get_device_name(ctx.device)
    total = torch.cuda.get_device_properties(ctx.device).total_memory
    try:
        return gpu_named(name, total)
    except RecipeError:
        ctx.listener.note(f"plan: rates of {name} are not known; those of {UNKNOWN.name} rank cuts")
        return UNKNOWN


def _cap(budget: int, device: torch.device) -> None:
    """Hold this process to a budget below what the card has: beyond it, torch's own error."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = (budget - CONTEXT_BYTES) / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
