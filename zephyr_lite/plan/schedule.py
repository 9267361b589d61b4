"""Schedule: how a training's work is cut so that it fits a budget of memory and is done soonest.

Three things may be chosen, none of which changes what is computed: tokens of a micro-batch (more of
them share a dequantisation), how many layers keep their activations (each one saves most of another
forward of its own), and, where that does not do, layers' inputs and optimizer states in host
memory. Each token budget gets as many kept layers as fit its heaviest micro-batch; the fastest of
those is the plan. Predicted bytes are `memory.peak`'s, predicted seconds `roofline`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from zephyr_lite.data.layout import Order
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import Gpu
from zephyr_lite.plan.lengths import Lengths, Works
from zephyr_lite.plan.memory import HostParts, Parts, host, peak
from zephyr_lite.plan.roofline import micro_batch_seconds, step_seconds
from zephyr_lite.plan.setting import Cut, Place, Rest, Setting
from zephyr_lite.plan.work import Work
from zephyr_lite.recipe import Memory

TOKENS = (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
ALTERNATIVES = 2
HOST_PENALTY = 1.02  # what host memory must buy at least; its copies were never timed


@dataclass(frozen=True)
class Candidate:
    """A cut, its bytes at the peak, and its seconds an optimizer step. layers: of the model."""

    cut: Cut
    parts: Parts
    host: HostParts
    step_seconds: float
    micro_batches: float
    layers: int

    @property
    def memory(self) -> dict[str, int | str]:
        """The recipe's `memory` fields that ask for this cut."""
        return {
            "tokens_per_micro_batch": self.cut.tokens,
            "checkpointing": "full" if self.cut.rest == "lean" else "offload",
            "keep_layers": self.cut.keep,
            "head_rows": self.cut.head_rows,
            "optimizer": self.cut.place,
        }

    def record(self) -> dict[str, Any]:
        """As the manifest and `plan --json` have it.

        `checkpointing` is what happens: `none` where all layers keep, whatever others would do.
        """
        again = {"checkpointing": "none"} if self.cut.keep == self.layers else {}
        return {
            **self.memory,
            **again,
            "bytes": asdict(self.parts) | {"total": self.parts.total},
            "host_bytes": asdict(self.host),
            "step_seconds_projected": self.step_seconds,
        }


@dataclass(frozen=True)
class Training:
    """What is cut: a model's geometry, a training's settings, its data and order.

    gpu: whose rates tell the seconds.
    """

    geometry: Geometry
    setting: Setting
    lengths: Lengths
    order: Order
    gpu: Gpu

    def candidate(self, cut: Cut, works: Works) -> Candidate:
        """Bytes and seconds of one cut."""
        seconds = [
            sum(
                micro_batch_seconds(self.geometry, self.setting, cut, work, self.gpu)
                for work in step
            )
            for step in works.steps
        ]
        once = step_seconds(self.geometry, self.setting, cut, self.gpu)
        return Candidate(
            cut,
            self.peak(cut, works),
            host(self.geometry, self.setting, cut, works.heaviest),
            once + sum(seconds) / len(seconds),
            sum(map(len, works.steps)) / len(works.steps),
            self.geometry.layers,
        )

    def peak(self, cut: Cut, works: Works) -> Parts:
        """Bytes of the heaviest micro-batch."""
        return peak(self.geometry, self.setting, cut, works.heaviest)

    def words(self, cut: Cut) -> str:
        """A cut, for a person."""
        layers = self.geometry.layers
        kept = "all layers keep" if cut.keep == layers else f"{cut.keep} of {layers} layers keep"
        waits = cut.rest == "offload" and cut.keep < layers
        rest = ", the others wait in host memory" if waits else ""
        states = ", optimizer states on the host" if cut.place == "host" else ""
        return f"{cut.tokens} tokens a micro-batch, {kept} activations{rest}{states}"


@dataclass(frozen=True)
class Schedule:
    """What was chosen and what else would do.

    chosen: None when nothing fits; `least` is then the cut that takes the least.
    """

    budget: int
    chosen: Candidate | None
    alternatives: tuple[Candidate, ...]
    least: Candidate

    def record(self) -> dict[str, Any]:
        """As the manifest and `plan --json` have it."""
        chosen = None if self.chosen is None else self.chosen.record()
        others = [candidate.record() for candidate in self.alternatives]
        return {"budget_bytes": self.budget, "chosen": chosen, "alternatives": others}


def choose(training: Training, budget: int, memory: Memory) -> Schedule:
    """The fastest cut that fits `budget` bytes, among those that the recipe's `memory` allows."""
    found: list[Candidate] = []
    least: Candidate | None = None
    for tokens, works in _token_budgets(training, memory):
        for rest, place in _places(training.setting, memory):
            cut = Cut(tokens, 0, rest, place, memory.head_rows)
            fitting = _most_kept(training, cut, works, budget, memory)
            if fitting is not None:
                found.append(training.candidate(fitting, works))
            leanest = replace(cut, keep=_fixed_keep(training, memory) or 0)
            candidate = training.candidate(leanest, works)
            if least is None or candidate.parts.total < least.parts.total:
                least = candidate
    if least is None:
        raise ValueError("no token budget was tried")
    found.sort(key=_rank)
    others = _distinct(found[1:], found[:1])
    return Schedule(budget, found[0] if found else None, tuple(others[:ALTERNATIVES]), least)


def fits(training: Training, budget: int, memory: Memory, longest: Work | None = None) -> bool:
    """Whether the leanest cut of a training fits, of a micro-batch no larger than it must be.

    Args: longest: an example of the greatest length; default: the heaviest micro-batch of the data.
    """
    tokens = memory.tokens if memory.tokens_per_micro_batch != "auto" else TOKENS[0]
    work = longest or training.lengths.works(tokens, training.order, sample=1).heaviest
    keep = _fixed_keep(training, memory) or 0
    cuts = (
        Cut(tokens, keep, rest, place, memory.head_rows)
        for rest, place in _places(training.setting, memory)
    )
    return any(peak(training.geometry, training.setting, cut, work).total <= budget for cut in cuts)


def _token_budgets(training: Training, memory: Memory) -> Iterator[tuple[int, Works]]:
    """Those worth trying, and their micro-batches.

    Of several that cut alike the largest: small ones do where every example goes alone, large ones
    where a step is one micro-batch.
    """
    fixed = memory.tokens_per_micro_batch != "auto"
    budgets = (memory.tokens,) if fixed else TOKENS
    cuts = [(tokens, training.lengths.works(tokens, training.order)) for tokens in budgets]
    for (tokens, works), (_, after) in zip(cuts, [*cuts[1:], (0, None)], strict=True):
        if works != after:
            yield tokens, works


def _places(setting: Setting, memory: Memory) -> Iterator[tuple[Rest, Place]]:
    """What the layers that do not keep all may do, and where optimizer states may live."""
    rests: list[Rest] = ["lean", "offload"]
    if memory.checkpointing != "auto":
        rests = ["offload" if memory.checkpointing == "offload" else "lean"]
    places: list[Place] = ["device"]
    if memory.optimizer == "host":
        places = ["host"]
    elif memory.optimizer == "auto" and setting.optimizer == "adamw" and setting.device == "cuda":
        places = ["device", "host"]
    return ((rest, place) for place in places for rest in rests)


def _fixed_keep(training: Training, memory: Memory) -> int | None:
    """Layers that keep everything where the recipe says how many; None where it is chosen."""
    layers = training.geometry.layers
    if memory.checkpointing == "auto":
        return None
    return layers if memory.checkpointing == "none" else min(layers, memory.keep_layers or 0)


def _most_kept(
    training: Training, cut: Cut, works: Works, budget: int, memory: Memory
) -> Cut | None:
    """The cut with as many kept layers as fit; None where not even the fewest do."""

    def fits(keep: int) -> bool:
        return training.peak(replace(cut, keep=keep), works).total <= budget

    fixed = _fixed_keep(training, memory)
    if fixed is not None:
        return replace(cut, keep=fixed) if fits(fixed) else None
    if not fits(0):
        return None
    low, high = 0, training.geometry.layers  # `low` fits
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return replace(cut, keep=low)


def _distinct(candidates: list[Candidate], seen: list[Candidate]) -> list[Candidate]:
    """Without those that only name otherwise what an earlier one does: nothing is left to a `rest`
    where every layer keeps all."""
    known = {_substance(c) for c in seen}
    found = []
    for candidate in candidates:
        if (key := _substance(candidate)) not in known:
            known.add(key)
            found.append(candidate)
    return found


def _substance(candidate: Candidate) -> tuple[float, str, int]:
    return candidate.step_seconds, candidate.cut.place, candidate.parts.total


def _rank(candidate: Candidate) -> tuple[float, int]:
    """Soonest first; host memory and the bus are taken only where they buy more than a little."""
    is_alone = candidate.host.pinned == 0
    return candidate.step_seconds * (1 if is_alone else HOST_PENALTY), candidate.parts.total
