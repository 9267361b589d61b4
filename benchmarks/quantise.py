"""Quantising a weight: our torch code, llama.cpp's and the gguf package's, side by side.

    python benchmarks/quantise.py                          16 M weights, 5 rounds; minutes
    python benchmarks/quantise.py --rows 256 --rounds 1    a trial

Every round takes each type by each route in turn, so what else runs on the machine meets all of
them. A row holds medians over rounds; seconds of CPU (of all threads) stand beside the wall clock
and are to be read where `load` was high. `identical_blocks` and the errors are relative to the
same weights: values of a Student distribution with 5 degrees of freedom, tails like a model's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from rows.provenance import installed_version, read_commit
from zephyr_lite.export.quants import ggml, quantise

ROOT = Path(__file__).resolve().parent.parent
SEED, COLUMNS = 1, 4096
VERSIONS = ("torch", "numpy", "gguf", "xllamacpp")
Side = Callable[[torch.Tensor, Kind], np.ndarray]


def main() -> None:
    """Measure, append the rows, print them."""
    parser = argparse.ArgumentParser(description="Weights per second by type and route.")
    parser.add_argument("--rows", type=int, default=4096, help=f"of {COLUMNS} weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/quantise.jsonl")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    drawn = np.random.default_rng(SEED).standard_t(5, (arguments.rows, COLUMNS))
    weight = torch.from_numpy(drawn.astype(np.float32)) * 0.02
    rows = measure(weight, arguments.rounds, arguments.threads)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


def measure(weight: torch.Tensor, rounds: int, threads: int) -> list[dict[str, Any]]:
    """One row per type and side; a first round is thrown away."""
    cases = [(kind, name) for kind in quantise.KINDS for name in sides(kind, threads)]
    wall: dict[tuple[Kind, str], list[float]] = {case: [] for case in cases}
    cpu: dict[tuple[Kind, str], list[float]] = {case: [] for case in cases}
    stored: dict[tuple[Kind, str], np.ndarray] = {}
    for number in range(rounds + 1):
        for kind, name in cases:
            began, began_cpu = time.perf_counter(), time.process_time()
            found = sides(kind, threads)[name](weight, kind)
            if number:
                wall[kind, name].append(time.perf_counter() - began)
                cpu[kind, name].append(time.process_time() - began_cpu)
            else:
                stored[kind, name] = found
    stamp = describe(weight, rounds, threads)
    rows = []
    for kind, name in cases:
        seconds, cpu_seconds = median(wall[kind, name]), median(cpu[kind, name])
        row = {
            "kind": kind.name,
            "side": name,
            "seconds": round(seconds, 5),
            "cpu_seconds": round(cpu_seconds, 5),
            "slowest_seconds": round(max(wall[kind, name]), 5),
            "weights_per_second": round(weight.numel() / seconds),
            "weights_per_cpu_second": round(weight.numel() / cpu_seconds),
            "speed_to_torch": round(median(wall[kind, "torch"]) / seconds, 3),
            "cpu_to_torch": round(median(cpu[kind, "torch"]) / cpu_seconds, 3),
            "relative_error": _relative_error(stored[kind, name], kind, weight),
            "identical_blocks": _identical(stored[kind, name], stored[kind, "torch"], kind),
        }
        rows.append(stamp | row)
    return rows


def sides(kind: Kind, threads: int) -> dict[str, Side]:
    """Who can encode this type here: torch, ggml, gguf (numpy, one thread)."""
    found: dict[str, Side] = {"torch": lambda w, k: quantise.encode(w, k, threads=threads)}
    if kind in ggml.DIGESTS and ggml.why_not() is None:
        found["ggml"] = lambda w, k: quantise.encode(w, k, route="ggml", threads=threads)
    if kind != Kind.F32 and not kind.name.endswith("_K"):  # it hands fp32 back as it is
        found["gguf"] = lambda w, k: gguf.quants.quantize(w.numpy(), k)
    return found


def _relative_error(stored: np.ndarray, kind: Kind, weight: torch.Tensor) -> float:
    """RMSE over RMS, of what the gguf package reads."""
    rows = stored.view(np.uint8).reshape(len(weight), -1)
    values = gguf.quants.dequantize(rows, kind).reshape(weight.shape)
    error = np.square(values - weight.numpy()).mean(dtype=np.float64)
    return float(f"{np.sqrt(error / np.square(weight.numpy()).mean(dtype=np.float64)):.6g}")


def _identical(stored: np.ndarray, ours: np.ndarray, kind: Kind) -> float:
    """Share of blocks whose bytes are those of the torch route."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    blocks = [side.view(np.uint8).reshape(-1, size) for side in (stored, ours)]
    return round(float((blocks[0] == blocks[1]).all(axis=1).mean()), 6)


def describe(weight: torch.Tensor, rounds: int, threads: int) -> dict[str, Any]:
    """What is the same in all rows of a run."""
    return {
        "benchmark": "quantise",
        "weights": weight.numel(),
        "rounds": rounds,
        "threads": threads,
        "chunk": quantise.CHUNK,
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in VERSIONS},
        "ggml": ggml.why_not() or "ok",
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "commit": read_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal of 80 columns; M weights per second."""
    lines = [f"{'':12}{'M/s':>9}{'M/CPU s':>9}{'to torch':>9}{'by CPU':>8}{'error':>10}{'same':>9}"]
    for row in rows:
        lines.append(
            f"{row['kind']:6}{row['side']:6}{row['weights_per_second'] / 1e6:9.1f}"
            f"{row['weights_per_cpu_second'] / 1e6:9.1f}{row['speed_to_torch']:9.2f}"
            f"{row['cpu_to_torch']:8.2f}{row['relative_error']:10.3g}{row['identical_blocks']:9.4f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
