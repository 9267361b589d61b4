"""Checkpoints: everything a training needs to go on as if it had never stopped.

Weights, optimizer state, position, what was given up for memory (`fitting.Fitting.state`), and the
best weights so far where those are kept: in the same folder, so that whichever checkpoint a
training goes back to, its best is of its own past. No random state: dropout is seeded from (seed,
step, micro-batch), data order is a function of (seed, epoch, position). Sealed folders of
safetensors and JSON; nothing is ever unpickled. A damaged checkpoint is reported and the one before
it used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import StorageError
from zephyr_lite.storage import open_sealed, sealed_folder, sweep
from zephyr_lite.train.optimizer import load_state_tensors, state_tensors

Parameters = dict[str, torch.nn.Parameter]
Figures = dict[str, float]


@dataclass
class Best:
    """The weights of the evaluation that ranks highest so far, on the CPU.

    rank: what is compared of an evaluation's figures, more is better; None keeps no weights.
    """

    rank: Callable[[Figures], tuple[float, ...]] | None = None
    step: int = 0
    figures: Figures = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def offer(self, step: int, figures: Figures, parameters: Parameters) -> None:
        """Copy the weights when their figures rank higher; of two equals the earlier stays."""
        if self.rank is None:
            return
        if not self.weights or self.rank(figures) > self.rank(self.figures):
            self.step, self.figures = step, dict(figures)
            self.weights = {n: p.detach().to("cpu", copy=True) for n, p in parameters.items()}

    def put_back(self, parameters: Parameters) -> None:
        """Make the best weights the model's."""
        _copy(self.weights, parameters)


@dataclass
class Checkpoints:
    """The checkpoints of one training, newest last.

    folder: holds step-0000000/ folders. keep: how many stay. note: told about damaged ones.
    """

    folder: Path
    keep: int
    note: Callable[[str], None]

    def save(
        self,
        step: int,
        parameters: Parameters,
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
        best: Best,
    ) -> Path:
        """Write the state after `step` optimizer steps; prune only after it verifies."""
        final = self.folder / f"step-{step:07d}"
        if best.weights:
            meta = meta | {"best": {"step": best.step, "figures": best.figures}}
        with sealed_folder(final, meta | {"step": step}) as part:
            weights = {n: p.detach().cpu().contiguous() for n, p in parameters.items()}
            save_file(weights, part / "weights.safetensors")
            save_file(state_tensors(optimizer, parameters), part / "optimizer.safetensors")
            if best.weights:
                save_file(best.weights, part / "best.safetensors")
        open_sealed(final)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def restore(
        self, parameters: Parameters, optimizer: torch.optim.Optimizer, best: Best
    ) -> dict[str, Any] | None:
        """Load the newest whole checkpoint; its meta, or None when there is none."""
        if self.folder.exists():
            sweep(self.folder)
        for path in reversed(self._all()):
            try:
                meta = open_sealed(path)
            except StorageError as error:
                self.note(f"checkpoint set aside: {error}")
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)  # where it is, pruning would take it for the newest
                continue
            weights = load_file(path / "weights.safetensors")
            if weights.keys() != parameters.keys():
                raise StorageError(f"{path}: holds other tensors than the ones that train")
            _copy(weights, parameters)
            load_state_tensors(optimizer, parameters, load_file(path / "optimizer.safetensors"))
            if "best" in meta:
                best.step, best.figures = meta["best"]["step"], meta["best"]["figures"]
                best.weights = load_file(path / "best.safetensors")
            return meta
        return None

    def remove(self) -> None:
        """Delete all checkpoints; call once the stage's result is sealed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))


def _copy(weights: dict[str, torch.Tensor], parameters: Parameters) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
