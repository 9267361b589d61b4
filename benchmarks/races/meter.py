"""What a worker process measures of itself: time, memory, energy; and how it reports.

Nothing but the standard library and, once a GPU is used, torch; pynvml where it is installed.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from races.work import Case

GIB = 1 << 30
PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "liger-kernel", "kernels",
    "unsloth", "unsloth_zoo", "flash-attn", "xformers", "triton",
)  # fmt: skip


class Meter:
    """Moments of a training, and what the process took.

    marks: wall-clock and CPU seconds at the start and after each optimizer step. A figure that is
    not to be had is None.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.began = time.perf_counter()
        self.imports_gib = resident_gib("VmRSS")
        self.marks: list[tuple[float, float]] = []
        self.reference: list[tuple[float, float]] = []  # both ends of a pass over all pairs
        self._energy: list[int | None] = []
        self._nvml: Any = None
        if case.device == "cuda":
            self._cap()
            self._nvml = _open_nvml()

    def loaded(self) -> None:
        """Model and data are there; peaks of a GPU begin anew."""
        self.load_seconds = time.perf_counter() - self.began
        if self.case.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def moment(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds, all that was asked of a GPU done."""
        if self.case.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def step(self) -> None:
        """The first step begins, or a step ended."""
        self.marks.append(self.moment())
        if len(self.marks) - 1 in (self.case.warmup, self.case.steps):
            self._energy.append(_joules_read(self._nvml))

    def report(self) -> dict[str, Any]:
        """All figures, by the names that rows.py reads."""
        seconds, cpu_seconds = np.diff(np.array(self.marks), axis=0).T.tolist()
        result = {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "load_seconds": self.load_seconds,
            "imports_rss_gib": self.imports_gib,
            "peak_rss_gib": resident_gib("VmHWM"),
            "energy_joules": self._joules(),
            "versions": versions(),
            **self._peaks(),
        }
        if self.reference:
            (a, cpu_a), (b, cpu_b) = self.reference[0], self.reference[-1]
            result |= {"reference_seconds": b - a, "reference_cpu_seconds": cpu_b - cpu_a}
        return result

    def _cap(self) -> None:
        import torch

        if self.case.cap_gib is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.case.cap_gib * GIB / total))

    def _peaks(self) -> dict[str, float]:
        if self.case.device != "cuda":
            return {}
        import torch

        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated() / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / GIB,
        }

    def _joules(self) -> float | None:
        """Of the timed steps."""
        read = [value for value in self._energy if value is not None]
        return (read[1] - read[0]) / 1e3 if len(read) == 2 else None


def serve(tasks: dict[str, Callable[[Case, Path, Meter], dict[str, Any]]]) -> None:
    """What a worker does: read CASE FOLDER OUT from the command line, do the task, write OUT.

    What a library prints goes to standard error; whoever started the process reads the file.
    """
    case, folder, out = Case(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    meter = Meter(case)
    result = tasks[case.task](case, folder, meter) | meter.report()
    out.write_text(json.dumps(result), encoding="utf-8")


def resident_gib(field_name: str) -> float:
    """`VmRSS` (now) or `VmHWM` (its highest so far) of this process by the kernel's count, GiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024 / GIB
    raise ValueError(f"the kernel reports no {field_name}")


def versions() -> dict[str, str]:
    """Version of each package that can matter and is installed here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _open_nvml() -> Any:
    """A function that reads the GPU's counter in millijoules; None without pynvml or counter."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def _joules_read(read: Callable[[], int] | None) -> int | None:
    return None if read is None else read()
