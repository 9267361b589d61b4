"""What `zephyr_lite.plan` says of a race: our side's memory, and the least time a step can take.

A race has no recipe and no run folder, so `stages/fit.py` cannot be asked; `memory: auto` is
settled by the same function, `plan.schedule.choose`, of the race's lengths, adapter and budget.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from races.work import SEED, Case, Work
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Order, Row, fill
from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.plan.checkpoint import read_checkpoint
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import CPU, GIB, Gpu, gpu_named
from zephyr_lite.plan.lengths import DocumentLengths, Lengths, pairs_of
from zephyr_lite.plan.memory import CONTEXT_BYTES
from zephyr_lite.plan.roofline import micro_batch_seconds, step_seconds
from zephyr_lite.plan.schedule import Training, choose
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import Work as Counts
from zephyr_lite.plan.work import documents_work, pairs_work
from zephyr_lite.recipe import Base, Memory

LARGE = 8192  # tokens of a micro-batch beyond which a dequantisation is spread thin enough


def settled(
    case: Case,
    work: Work,
    memory: Memory,
    examples: Sequence[EncodedPair] | Sequence[Row],
    *,
    budget: int | None = None,
) -> Memory:
    """`memory` as it is where nothing is planned, on a CPU or under engine hf; else as planned.

    Args: examples: pairs of a DPO race, packed rows of an SFT race. budget: bytes; default: the
        cap, or what is free on the GPU.
    Raises: MachineError when nothing fits.
    """
    if case.engine != "native" or (case.device == "cpu" and budget is None):
        return memory
    budget = budget or budget_of(case)
    schedule = choose(_training(case, work, examples), budget, memory)
    if schedule.chosen is None:
        least = schedule.least.parts.total / GIB
        raise MachineError(f"takes at least {least:.1f} GiB, {budget / GIB:.1f} GiB is there")
    return memory.model_copy(update=schedule.chosen.memory)


def budget_of(case: Case) -> int:
    """Bytes that the process may take on its GPU, its CUDA context among them."""
    if case.cap_gib is not None:
        return int(case.cap_gib * GIB) + CONTEXT_BYTES  # the cap is on what torch reserves
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() + CONTEXT_BYTES


def least_seconds(case: Case, work: Work, gpu: Gpu) -> list[float]:
    """Of each optimizer step on a card by its roofline: packed, prompts shared, nothing twice."""
    geometry, setting = _geometry(case), _setting(case, work)
    cut = Cut(LARGE, geometry.layers)
    once = step_seconds(geometry, setting, cut, gpu)
    return [
        once + sum(micro_batch_seconds(geometry, setting, cut, w, gpu) for w in _works(work, step))
        for step in work.plan[: case.steps]
    ]


def known_gpu() -> Gpu | None:
    """The card of this machine, None where its rates are not known."""
    total = torch.cuda.get_device_properties(0).total_memory
    try:
        return gpu_named(torch.cuda.get_device_name(0), total)
    except RecipeError:
        return None


def _works(work: Work, step: Sequence[int]) -> list[Counts]:
    if work.pairs:
        pairs = [work.pairs[i] for i in step]
        sizes = [(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]
        return [pairs_work([sizes[i] for i in m]) for m in fill([sum(s) for s in sizes], LARGE)]
    rows = [[len(document) for document in work.rows[i]] for i in step]
    bins = fill([sum(row) for row in rows], LARGE)
    return [documents_work([n for i in members for n in rows[i]]) for members in bins]


def _training(case: Case, work: Work, examples: Sequence[EncodedPair] | Sequence[Row]) -> Training:
    lengths: Lengths
    if work.pairs:
        lengths = pairs_of(examples)  # pyright: ignore[reportArgumentType] - pairs, then
    else:
        rows: Sequence[Row] = examples  # pyright: ignore[reportAssignmentType] - rows, then
        lengths = DocumentLengths(rows, work.sizes["row_length"], "this race")
    order = Order(lengths.n_examples, case.batch, 1000, SEED, case.steps)
    gpu = CPU if case.device == "cpu" else known_gpu() or gpu_named("3090")  # rates rank cuts only
    return Training(_geometry(case), _setting(case, work), lengths, order, gpu)


def _geometry(case: Case) -> Geometry:
    base = Base(model=case.base)  # pyright: ignore[reportCallIssue] - the rest has defaults
    return read_checkpoint(Path(case.base), base, device=_kind(case)).geometry


def _setting(case: Case, work: Work) -> Setting:
    config = json.loads((Path(case.base) / "config.json").read_text(encoding="utf-8"))
    return Setting(
        stage="dpo" if work.pairs else "sft",
        trained=work.sizes["rank"],
        frozen=0,
        dropout=case.dropout > 0,
        optimizer=case.optimizer,
        batch=case.batch,
        quantization="nf4" if "quantization_config" in config else "none",
        element=2 if case.device == "cuda" else 4,
        device=_kind(case),
    )


def _kind(case: Case) -> Literal["cpu", "cuda"]:
    return "cuda" if case.device == "cuda" else "cpu"
