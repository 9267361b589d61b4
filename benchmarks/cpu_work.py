"""What both sides of cpu_vs_trl.py work on: one folder, written once, read by every process.

    base/       config.json, model.safetensors: a small Mistral with random weights
    adapter/    a PEFT adapter with random weights in A and B
    ids.npz     token ids: pairs, documents, packed rows
    plan.json   which examples each optimizer step sees

B of the adapter is not 0, so the first loss is not ln 2 and depends on everything: ids, weights,
reference, beta. Only numpy is needed to read the folder: what a process imports beside that is its
side's own, and is what `imports` measures.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

GIB = 1 << 30
ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One measurement: what a fresh process is asked to do.

    task: dpo, sft, or imports (import what the side needs, report the memory, end).
    setting: examples of one forward under TRL, tokens of one forward on our side.
    engine: ours, `native` or `hf`; TRL has one.
    batch: pairs or packed rows of one optimizer step, the same on both sides.
    warmup: optimizer steps that are not timed. options: more arguments of TRL's config.
    """

    side: str
    task: str
    setting: int = 1
    batch: int = 8
    steps: int = 9
    warmup: int = 3
    threads: int = 1
    beta: float = 0.1
    learning_rate: float = 5e-5
    engine: str = "native"
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """Short name for tables and messages."""
        return f"{self.task} {self.engine if self.side == 'ours' else self.side} {self.setting}"


@dataclass(frozen=True)
class Pair:
    """int32 ids of a preference pair."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """The two sequences that a pair stands for."""
        return (
            np.concatenate([self.prompt, self.chosen]),
            np.concatenate([self.prompt, self.rejected]),
        )


@dataclass(frozen=True)
class Work:
    """The folder's token ids and plan.

    rows: spans (start, stop) of `ids` per packed row; every span is a document of its own.
    plan: task -> examples of each optimizer step, for as many steps as were planned.
    """

    folder: Path
    pairs: list[Pair]
    ids: np.ndarray
    rows: list[list[tuple[int, int]]]
    plan: dict[str, list[list[int]]]
    geometry: dict[str, Any]

    def documents(self, row: int) -> list[np.ndarray]:
        """The documents of a packed row."""
        return [self.ids[start:stop] for start, stop in self.rows[row]]

    def sequences(self, task: str, step: int) -> list[np.ndarray]:
        """Every sequence that an optimizer step trains on."""
        examples = self.plan[task][step]
        if task == "dpo":
            return [ids for i in examples for ids in self.pairs[i].sequences]
        return [ids for i in examples for ids in self.documents(i)]


def write_work(
    folder: Path,
    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    ids: np.ndarray,
    rows: Sequence[Sequence[tuple[int, int]]],
    plan: dict[str, list[list[int]]],
    geometry: dict[str, Any],
) -> None:
    """Write ids.npz and plan.json; see `Work`."""
    flat = [part for pair in pairs for part in pair]
    np.savez(
        folder / "ids.npz",
        pair_ids=np.concatenate(flat),
        pair_lengths=np.array([len(part) for part in flat]),
        ids=ids,
        spans=np.array([span for row in rows for span in row]),
        row_lengths=np.array([len(row) for row in rows]),
    )
    text = json.dumps({"plan": plan, "geometry": geometry})
    (folder / "plan.json").write_text(text, encoding="utf-8")


def read_work(folder: Path) -> Work:
    """Read what `write_work` wrote."""
    with np.load(folder / "ids.npz") as stored:
        cuts = np.cumsum(stored["pair_lengths"])[:-1]
        parts = np.split(stored["pair_ids"], cuts)
        spans = [(int(a), int(b)) for a, b in stored["spans"]]
        ends = np.cumsum(stored["row_lengths"]).tolist()
        ids = stored["ids"]
    pairs = [Pair(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    rows = [spans[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    text = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return Work(folder, pairs, ids, rows, text["plan"], text["geometry"])


def digest(sequences: Iterable[np.ndarray]) -> str:
    """SHA-256 over a step's sequences in any order."""
    each = sorted(hashlib.sha256(np.asarray(s, np.int32).tobytes()).hexdigest() for s in sequences)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def now() -> tuple[float, float]:
    """Wall-clock and CPU seconds of this process, all threads."""
    return time.perf_counter(), time.process_time()


def durations(moments: Sequence[tuple[float, float]], prefix: str = "") -> dict[str, list[float]]:
    """Wall-clock and CPU seconds between neighbouring moments."""
    wall, cpu = np.diff(np.array(moments), axis=0).T
    return {f"{prefix}seconds": wall.tolist(), f"{prefix}cpu_seconds": cpu.tolist()}


def resident_gib(field_name: str) -> float:
    """`VmRSS` (now) or `VmHWM` (its highest so far) of this process by the kernel's count, GiB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field_name + ":"):
            return int(line.split()[1]) * 1024 / GIB
    raise ValueError(f"the kernel reports no {field_name}")


def serve(tasks: dict[str, Callable[[Case, Path], dict[str, Any]]]) -> None:
    """What a side's process does: read a case and the folder from the command line, do it, and
    write the result, with the memory it took, to the file named last.
    """
    case, folder, out = Case(**json.loads(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3])
    result = {} if case.task == "imports" else tasks[case.task](case, folder)
    result |= {"rss_gib": resident_gib("VmRSS"), "peak_rss_gib": resident_gib("VmHWM")}
    out.write_text(json.dumps(result), encoding="utf-8")


def command(case: Case, folder: Path, out: Path) -> tuple[list[str], dict[str, str]]:
    """Command line and environment of the process that does `case`."""
    script = Path(__file__).with_name(f"cpu_{case.side}.py")
    threads = str(case.threads)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    line = [sys.executable, str(script), json.dumps(asdict(case)), str(folder), str(out)]
    return line, environment
