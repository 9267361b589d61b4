"""metrics.jsonl: one line per logged step or evaluation, under TRL's names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import psutil
import torch

GIB = 1 << 30


class MetricsLog:
    """Appends lines; on resume, drops the lines of steps that will be run again.

    Args:
        path: the file. step: the step the training continues from (0 for a fresh one).
    """

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A line without a loss is the final evaluation's; who comes here evaluates again.
        kept = [line for line in _lines(path) if line["step"] <= step and "loss" in line]
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(part, path)
        self._handle = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append one line."""
        self._handle.write(json.dumps(record) + "\n")
        self._handle.flush()

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a log; a last line cut by a kill is dropped."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far: allocated on a GPU, resident set on a CPU, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource  # not on Windows, where there is no CPU path to measure

    return max(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
        psutil.Process().memory_info().rss / GIB,
    )
