"""Checkpoints: everything a training needs to go on as if it had never stopped.

Weights, optimizer state and position. No random state: dropout is seeded from (seed, step,
micro-batch), data order is a function of (seed, epoch, position). Sealed folders of safetensors
and JSON; nothing is ever unpickled. A damaged checkpoint is reported and the one before it used.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import StorageError
from zephyr_lite.storage import open_sealed, sealed_folder, sweep
from zephyr_lite.train.optimizer import load_state_tensors, state_tensors


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
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
    ) -> Path:
        """Write the state after `step` optimizer steps; prune only after it verifies."""
        final = self.folder / f"step-{step:07d}"
        with sealed_folder(final, meta | {"step": step}) as part:
            weights = {n: p.detach().cpu().contiguous() for n, p in parameters.items()}
            save_file(weights, part / "weights.safetensors")
            save_file(state_tensors(optimizer, parameters), part / "optimizer.safetensors")
        open_sealed(final)
        for old in self._all()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def restore(
        self, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
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
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(weights[name])
            load_state_tensors(optimizer, parameters, load_file(path / "optimizer.safetensors"))
            return meta
        return None

    def remove(self) -> None:
        """Delete all checkpoints; call once the stage's result is sealed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*"))
