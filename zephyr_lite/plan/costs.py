"""Costs: one training, planned for one machine; what `zephyr-lite plan` prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from zephyr_lite.plan.gpus import CPU, UNKNOWN, Gpu
from zephyr_lite.plan.roofline import reference_seconds
from zephyr_lite.plan.schedule import Schedule, Training


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
        return self.gpu or (CPU if self.kind == "cpu" else UNKNOWN)


@dataclass
class StagePlan:
    """One training, planned. factor: measured seconds over projected ones; None: not measured."""

    stage: Literal["sft", "dpo"]
    training: Training
    schedule: Schedule
    factor: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As people write it."""
        return {"sft": "dSFT", "dpo": "dDPO"}[self.stage]

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
