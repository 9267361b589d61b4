"""One pass over the trained model for all files that are made of it.

Each tensor is read, folded and checked once, given to every target that lacks it, and forgotten.
Targets keep what they have on the disk, so a pass that was stopped goes on where each of them
stopped, and computes nothing that all of them have.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from zephyr_lite.errors import MachineError
from zephyr_lite.export.weights.fold import FoldedModel


class Target(Protocol):
    """One artefact in the making. It has its final name only after `commit`."""

    @property
    def label(self) -> str:
        """What it is, for progress and report: "q4_k_m", "merged", "w4a16"."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the disk when complete; known before anything is computed."""
        ...

    @property
    def part(self) -> Path:
        """The file or folder as it is until `commit`: what verification reads."""
        ...

    def begin(self) -> None:
        """Check that it can be made; open it, or resume it."""
        ...

    def has(self, name: str) -> bool:
        """Whether the tensor of this Hugging Face name is stored already."""
        ...

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Store an fp32 tensor by its Hugging Face name; `weight` is not changed."""
        ...

    def finish(self) -> dict[str, Any]:
        """Read back what was written and return its entry of the report."""
        ...

    def commit(self) -> None:
        """Give it its final name."""
        ...

    def close(self) -> None:
        """Let go of files and locks; what is written stays, for the next `begin`."""
        ...


def stream(
    model: FoldedModel,
    targets: Sequence[Target],
    on_tensor: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Write every target, complete and read back, under its `.part` name.

    Args: on_tensor: called with (tensors done, tensors in all).
    Returns: each target's entry of the report. The caller verifies, then commits (or closes) them.
    Raises: MachineError before a byte is written when a disk is too small for all of them; what
        model and targets raise. Whatever ends it, every target is closed and can be resumed.
    Memory: less than twice the largest tensor in fp32.
    """
    try:
        _check_disks(targets)
        for target in targets:
            target.begin()
        names = model.names()
        for done, name in enumerate(names, start=1):
            _give(model, name, targets)
            if on_tensor is not None:
                on_tensor(done, len(names))
        return [target.finish() for target in targets]
    except BaseException:
        for target in targets:
            target.close()
        raise


def _give(model: FoldedModel, name: str, targets: Sequence[Target]) -> None:
    # A function of its own, so that one tensor is gone before the next is read.
    lacking = [target for target in targets if not target.has(name)]
    if lacking:
        weight = model.tensor(name)
        for target in lacking:
            target.add(name, weight)


def _check_disks(targets: Sequence[Target]) -> None:
    """Sum per file system what is still to be written."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for target in targets:
        folder = _existing(target.part.parent)
        device = folder.stat().st_dev
        folders.setdefault(device, folder)
        missing = max(target.nbytes - _size(target.part), 0)
        needed[device] = needed.get(device, 0) + missing
    for device, nbytes in needed.items():
        free = shutil.disk_usage(folders[device]).free
        if free < nbytes:
            raise MachineError(
                f"{folders[device]}: {free / 2**30:.2f} GiB free, the export still needs "
                f"{nbytes / 2**30:.2f} GiB",
                hint="free some space, or export fewer files at once",
            )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 where there is none."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        os.stat(os.path.join(folder, name)).st_size
        for folder, _, names in os.walk(path)
        for name in names
    )
