"""The model of a step benchmark, and how a case asks it to train: engine, policy, memory cap.

The base is random NF4 (model.py), built once for all cases of a part. A cap limits what this
process may reserve, as a smaller card would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from gpu.bench import Bench
from gpu.model import MISTRAL_7B, TOY, build_model, compute_dtype
from zephyr_lite.errors import RecipeError
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import Gpu, gpu_named
from zephyr_lite.plan.roofline import COPY_SHARE, Recomputed
from zephyr_lite.plan.setting import Place
from zephyr_lite.plan.setting import Setting as Planned
from zephyr_lite.recipe import Lora, Memory, Training
from zephyr_lite.train.masters import Masters, make_masters
from zephyr_lite.train.objectives import Objective

GIB = 2**30
HEAD_ROWS = 1024  # as the 7B recipes have it
RECOMPUTED: dict[tuple[str, str], Recomputed] = {
    ("native", "full"): "all but down_proj",
    ("native", "offload"): "all but down_proj",
    ("hf", "full"): "all",
}


@dataclass(frozen=True)
class Setting:
    """One case.

    cap_gib: what the process may reserve, None for all. tokens: of a micro-batch. place: of masters
    and optimizer states; on the host the optimizer is adamw.
    """

    cap_gib: float | None
    engine: str
    checkpointing: str
    tokens: int
    dropout: float = 0.0
    gemm: Gemm = "exact"
    place: Place = "device"

    @property
    def recomputed(self) -> Recomputed:
        """What the policy computes a second time."""
        return RECOMPUTED.get((self.engine, self.checkpointing), "nothing")

    @property
    def is_profiled(self) -> bool:
        """Whether a slow step's profile is worth its seconds: ours, where nothing is recomputed."""
        return self.engine == "native" and self.checkpointing == "none"


@dataclass(frozen=True)
class Task:
    """What is trained. settings: how to train; unit: what an example is called in rates."""

    name: Literal["sft", "dpo"]
    unit: str
    adapters: dict[str, int]  # name -> rank; the last one trains, the others are frozen beside it
    settings: Training
    make_objective: Callable[[Setting], Objective]

    @property
    def trained(self) -> str:
        """The adapter that trains."""
        return list(self.adapters)[-1]

    def settings_for(self, place: Place) -> Training:
        """How to train where masters are there."""
        on_host = {"optimizer": "adamw"} if place == "host" else {}
        return self.settings.model_copy(update=on_host)

    @property
    def planned(self) -> Planned:
        """As the roofline counts it: dropout costs nothing there."""
        *frozen, trained = self.adapters.values()
        return Planned(self.name, trained, sum(frozen))


class Shared:
    """A base that all cases of a part share, built at the first one that is measured.

    Adapters come and go on it, and a cap holds the process to what a smaller card has.
    """

    def __init__(self, bench: Bench, geometry: Geometry) -> None:
        self.bench, self.geometry = bench, geometry
        self._base: Any = None
        self._adapted: Any = None

    def adapted(self, adapters: dict[str, int], dropout: float) -> Any:
        """The base with fresh adapters, name -> rank, their B not 0, in place of earlier ones.

        Args: dropout: of the last, which is the one that trains.
        """
        model = self.base if self._adapted is None else self._adapted.unload()
        self._adapted = None
        self.release()  # before there are others: a peak is not to have both
        for name, rank in adapters.items():
            rate = dropout if name == list(adapters)[-1] else 0.0
            lora = Lora(r=rank, alpha=rank, dropout=rate)
            model = add_adapter(model, name, lora, seed=1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.002)
        self._adapted = model
        return model

    @property
    def base(self) -> Any:
        """The base itself."""
        if self._base is None:
            # The ceilings first: their matrices need room that a cap may not leave.
            _ = self.bench.matmul_tflops, self.bench.copy_gb_per_s
            self._base = build_model(self.bench, self.geometry)
        return self._base

    def release(self) -> None:
        """Between cases: gradients; the engine's buffers go with it."""
        if self._adapted is not None:
            self._adapted.zero_grad(set_to_none=True)
        self.bench.release()

    def cap(self, limit: int | None) -> None:
        """Limit the bytes that this process may reserve. A CPU has no such limit."""
        if self.bench.on_gpu:
            total = torch.cuda.get_device_properties(self.bench.device).total_memory
            share = 1.0 if limit is None else min(1.0, limit / total)
            torch.cuda.set_per_process_memory_fraction(share)


class Rig:
    """The model of a part, built at the first case that is measured.

    Args: task; geometry; warmup and steps: optimizer steps not timed and timed.
    """

    def __init__(self, bench: Bench, task: Task, geometry: Geometry) -> None:
        self.bench, self.task, self.geometry = bench, task, geometry
        self.warmup, self.steps = bench.pick((2, 6), (1, 2))
        self._shared = Shared(bench, geometry)
        self._model: Any = None
        self._masters: Masters | None = None

    @property
    def model(self) -> Any:
        """The base with all adapters."""
        if self._model is None:
            self._model = self._shared.adapted(self.task.adapters, 0.05)
        return self._model

    def policy(self, setting: Setting) -> Policy:
        """A policy of this setting over the one model; dropout is a number that modules read."""
        model = self.model
        for layer in model.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = setting.dropout
        model.get_base_model().gradient_checkpointing_disable()
        memory = Memory.model_validate(
            {
                "tokens_per_micro_batch": setting.tokens,
                "checkpointing": setting.checkpointing,
                "head_rows": HEAD_ROWS,
            }
        )
        dtype, device = compute_dtype(self.bench), self.bench.device
        # Proven once, by the case of its own: not again for each setting.
        made = make_policy(
            model, dtype, device, memory,
            engine=setting.engine, gemm=setting.gemm, self_test=False,
        )  # fmt: skip
        made.use(list(self.task.adapters), self.task.trained)
        return made

    def masters(self, setting: Setting, policy: Policy) -> Masters:
        """Masters of what trains, until `release`."""
        settings, parameters = self.task.settings_for(setting.place), policy.trainable()
        try:
            self._masters = make_masters(settings, parameters, setting.place, policy.dtype)
        except torch.OutOfMemoryError:  # halfway: some parameters have their masters, some not
            self._model = None
            raise
        return self._masters

    def release(self) -> None:
        """See `Shared.release`; parameters whose masters were elsewhere are theirs again."""
        if self._masters is not None:
            self._masters.release()
            self._masters = None
        self._shared.release()

    def cap(self, gib: float | None) -> None:
        """See `Shared.cap`."""
        self._shared.cap(None if gib is None else int(gib * GIB))


def geometry_of(bench: Bench) -> Geometry:
    """Mistral-7B, or a toy."""
    return bench.pick(MISTRAL_7B, TOY)


def card(bench: Bench) -> Gpu:
    """This machine's card by the rates that this process measured; of the bus what is known."""
    bus = 25.0  # GB/s: sixteen lanes of the fourth generation
    if bench.on_gpu:
        with contextlib.suppress(RecipeError):
            bus = gpu_named(torch.cuda.get_device_name(bench.device)).pcie_gb_per_s
    copy = bench.copy_gb_per_s / COPY_SHARE
    return Gpu("this card", 0, bench.matmul_tflops, copy, bus, "measured", efficiency=1.0)


def optimizer_of(bench: Bench) -> str:
    """8-bit AdamW, nothing paged; on a CPU torch's own."""
    return "adamw_8bit" if bench.on_gpu else "adamw"
