"""How much memory does the caching allocator lose when micro-batches change size every step?

50 micro-batches of random size under a cap of 22.5 GiB (a 24 GB card less its context), planned to
fill 90, 95 and 98 % of it, with the default allocator and with expandable segments. The plan adds
up bytes; what the allocator reserves beyond them, and whether it runs out, is the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from gpu.bench import Bench, Case
from gpu.rows import Measure, Part, absent, failed, figure
from rows.provenance import REPO

PART = Part("fragmentation", 1, "Allocator: reserved above allocated at 22.5 GiB, OOMs, by mode?")
CAP_BYTES = int(22.5 * 2**30)
SETTINGS = {"default": "expandable_segments:False", "expandable": "expandable_segments:True"}


def cases(bench: Bench) -> Iterator[Case]:
    """Three planned fills, two allocator settings; one process each."""
    for fill in bench.pick((0.90, 0.95, 0.98), (0.95,)):
        for setting in SETTINGS:
            shape = {"fill": fill, "allocator": setting, "cap_bytes": _cap(bench)}
            yield Case(shape, lambda s=shape: _measure(bench, s))


def _cap(bench: Bench) -> int:
    if not bench.on_gpu or bench.toy:
        return 1 << 26
    return min(CAP_BYTES, torch.cuda.get_device_properties(bench.device).total_memory)


def _measure(bench: Bench, shape: dict[str, Any]) -> Iterator[Measure]:
    plan = {"cap_bytes": shape["cap_bytes"], "fill": shape["fill"], "device": bench.device.type}
    plan |= bench.pick({}, {"layers": 2, "steps": 5, "scale": 1000})
    command = [sys.executable, "benchmarks/gpu/allocator.py", json.dumps(plan)]
    done = bench.run_limited(command, cwd=REPO, PYTORCH_ALLOC_CONF=SETTINGS[shape["allocator"]])
    if done.code != 0:
        yield failed("allocator", f"exit {done.code}: {done.output[-1500:]}")
        return
    report = json.loads(done.output.strip().splitlines()[-1])
    yield figure("seconds", "s", report["seconds"], max_tokens=report["max_tokens"])
    yield figure("out_of_memory", "micro-batches", report["out_of_memory"])
    if "peak_reserved" not in report:
        yield absent("peak_reserved", "no allocator statistics on a CPU")
        return
    if report["is_expandable"] != (shape["allocator"] == "expandable"):
        yield absent("peak_reserved", f"PYTORCH_ALLOC_CONF took no effect: {report}")
        return
    allocated, reserved = report["peak_allocated"], report["peak_reserved"]
    lost = 100 * (reserved - allocated) / allocated
    yield figure("peak_allocated", "bytes", allocated)
    yield figure("peak_reserved", "bytes", reserved, percent_above_allocated=lost)
    yield figure("retries", "count", report["retries"])
