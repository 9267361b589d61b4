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
from dataclasses import replace
from typing import Literal

import psutil
import torch

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.token_store import known_tokens
from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.model.adapters import CONFIG
from zephyr_lite.model.base import compute_dtype, find_folder
from zephyr_lite.model.native import FAMILIES
from zephyr_lite.model.starting_point import find_start
from zephyr_lite.plan.checkpoint import Checkpoint, find_checkpoint
from zephyr_lite.plan.costs import Machine, StagePlan
from zephyr_lite.plan.disk import disk_bytes
from zephyr_lite.plan.estimates import estimate
from zephyr_lite.plan.gpus import UNKNOWN, gpu_named, memory_bytes, usable_bytes
from zephyr_lite.plan.lengths import Lengths, documents_of, pairs_of
from zephyr_lite.plan.schedule import Training, choose
from zephyr_lite.plan.setting import order_of, setting_of
from zephyr_lite.recipe import Recipe, is_large
from zephyr_lite.report import plan_page
from zephyr_lite.stages import fit, probe
from zephyr_lite.stages.context import Context
from zephyr_lite.stages.fit import GB, Stage, does_not_fit
from zephyr_lite.stages.reference import encoded_pairs
from zephyr_lite.stages.sft import corpus
from zephyr_lite.storage import cache_folder, read_json


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
    if machine.budget <= 0:
        raise MachineError(
            f"{machine.name}: nothing is left of it to plan with",
            hint="give more by --vram, or a smaller memory.reserve; a card keeps 1 to 1.5 GiB",
        )
    checkpoint = find_checkpoint(recipe.base, offline=ctx.run.offline, device=machine.kind)
    rank = _rank_or_note(ctx) if recipe.dpo else None
    plans = [_planned(ctx, stage, checkpoint, machine, rank) for stage in _stages(recipe)]
    if not plans:
        raise RecipeError(f"recipe {recipe.name} trains nothing: there is nothing to plan")
    if measure:
        _measure(ctx, machine, plans)
    disk = disk_bytes(recipe, checkpoint, {p.stage: p.training.lengths for p in plans})
    if departure := _other_engine(recipe, checkpoint):
        ctx.listener.note(departure)
    if as_json:
        found = plan_page.as_json(recipe, machine, checkpoint, plans, disk)
        print(json.dumps(found, allow_nan=False))
    else:
        print("\n".join(plan_page.lines(recipe, machine, checkpoint, plans, disk)))
    sys.stdout.flush()
    for plan in plans:
        if plan.schedule.chosen is None:
            raise does_not_fit(plan.stage, plan.schedule, plan.training, recipe)
    ctx.listener.note(f"run it: zephyr-lite run {pick}")


def check_inputs(ctx: Context) -> None:
    """Refuse a run whose trainings do not all fit, before the first one begins.

    By estimates where data is not tokenised yet; each training plans again by its own lengths. What
    cannot be known beforehand (a base, data or an adapter to start from that is not here yet) is
    left to that.
    Raises: MachineError (exit 3) with what would fit.
    """
    recipe = ctx.recipe
    if recipe.engine == "hf" or (ctx.device.type == "cpu" and recipe.memory.budget is None):
        return
    kind: Literal["cpu", "cuda"] = "cuda" if ctx.device.type == "cuda" else "cpu"
    machine = Machine("", kind, fit.budget_of(recipe.memory, ctx.device), fit.rates_of(ctx))
    for stage in _stages(recipe):
        if ctx.run.manifest["stages"].get(stage, {}).get("finished"):
            continue
        try:
            checkpoint = find_checkpoint(recipe.base, offline=True, device=kind)
            rank = _start_rank(recipe) if stage == "dpo" else None
            plan = _planned(ctx, stage, checkpoint, machine, rank)
        except (DataError, MachineError, RecipeError, StorageError):
            continue
        if plan.schedule.chosen is None and checkpoint.geometry.family in FAMILIES:
            raise does_not_fit(stage, plan.schedule, plan.training, recipe)


def machine_of(ctx: Context, vram: str | None, gpu: str | None) -> Machine:
    """The card that was named, or what is here.

    Raises: MachineError where neither is; RecipeError for an unknown name or amount.
    """
    vram, reserve = vram or ctx.recipe.memory.budget, int(ctx.recipe.memory.reserve * GB)
    known, base = gpu_named(gpu) if gpu else None, ctx.recipe.base
    needs_gpu = base.build is None and is_large(base.model)
    if vram:
        bytes_ = memory_bytes(vram)
        on_cpu = ctx.device.type == "cpu" and known is None and not needs_gpu
        budget = (bytes_ if on_cpu else usable_bytes(bytes_)) - reserve
        name = f"{known.name} held to {vram}" if known else f"a card of {vram}"
        return Machine("this CPU" if on_cpu else name, "cpu" if on_cpu else "cuda", budget, known)
    if known:
        return Machine(known.name, "cuda", known.usable_bytes - reserve, known)
    if ctx.device.type == "cuda":
        name = torch.cuda.get_device_name(ctx.device)
        rates = fit.rates_of(ctx)
        here = None if rates is UNKNOWN else rates
        return Machine(name, "cuda", fit.budget_of(ctx.recipe.memory, ctx.device), here)
    if needs_gpu:
        raise MachineError(
            "no CUDA GPU here to plan for",
            hint=f"name one: zephyr-lite plan {ctx.recipe.name} --gpu 4090, or --vram 24GB",
        )
    return Machine("this CPU", "cpu", psutil.virtual_memory().available - reserve, None)


def _other_engine(recipe: Recipe, checkpoint: Checkpoint) -> str | None:
    """A sentence where the training will not run on the engine whose memory is planned."""
    family = checkpoint.geometry.family
    reason = f"{family} is not one of {', '.join(FAMILIES)}" if family not in FAMILIES else None
    if recipe.engine == "hf" or reason:
        why = reason or "the recipe says engine: hf"
        return f"the plan is engine native's, and this will run on hf ({why}): it takes more"
    if "unsloth" in (recipe.engine, recipe.sft.engine if recipe.sft else None):
        return "the plan of dSFT is engine native's; Unsloth plans its own"
    return None


def _stages(recipe: Recipe) -> Iterator[Stage]:
    if recipe.sft and not recipe.sft.start and recipe.data.dialogues:
        yield "sft"
    if recipe.dpo:
        yield "dpo"


def _start_rank(recipe: Recipe) -> int | None:
    """Rank of the SFT adapter that `sft.from` names, 0 for a model; None: dSFT trains the recipe's.

    Nothing is downloaded for it.
    Raises: as `find_start`, where that is not here or is refused, as one with a rank_pattern is.
    """
    start = recipe.sft.start if recipe.sft else None
    if start is None:
        return None
    found = find_start(start, offline=True)
    if found.kind == "model":
        return 0
    config = read_json(found.folder / CONFIG)
    rank = config.get("r") if isinstance(config, dict) else None
    if not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"{found.key}: r in its {CONFIG} is {rank!r}, not a rank")
    return rank


def _rank_or_note(ctx: Context) -> int | None:
    """The same; None, and that is said, where the file cannot be read and the recipe's must do."""
    sft = ctx.recipe.sft
    try:
        return _start_rank(ctx.recipe)
    except MachineError:
        reason = f"sft.from: {sft.start if sft else None} is not on this machine"
    except (DataError, RecipeError, StorageError) as error:
        reason = str(error)
    rank = sft.lora.r if sft else 0
    ctx.listener.note(f"{reason}; its rank is taken to be the recipe's, sft.lora.r={rank}")
    return None


def _planned(
    ctx: Context, stage: Stage, checkpoint: Checkpoint, machine: Machine, sft_rank: int | None
) -> StagePlan:
    """Args: sft_rank: of the adapter under dDPO's; None: the recipe's."""
    recipe = ctx.recipe
    lengths = _known_lengths(ctx, stage) or estimate(recipe, stage)
    dtype = compute_dtype(recipe.base, torch.device(machine.kind))
    element: Literal[2, 4] = 4 if dtype == torch.float32 else 2
    setting = setting_of(recipe, stage, machine.kind, element, sft_rank)
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
