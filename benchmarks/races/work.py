"""What every side of a race works on: one folder, written once, read by every process.

    base/        a checkpoint: fp32, or NF4 as bitsandbytes stores it
    adapter/     a PEFT adapter with random weights in A and B
    ids.npz      token ids of the examples
    plan.json    task, which examples each optimizer step sees, sizes

B of the adapter is not 0, so the first loss hangs on everything: ids, weights, reference, beta.
This module needs numpy alone, and no side_*.py that a rival runs imports zephyr_lite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ADAPTER_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEED = 42  # of weights, ids and the data's order


@dataclass(frozen=True)
class Case:
    """One measurement: what a fresh process is asked to do.

    side: ours, plain, trl, liger or unsloth; engine: ours, `native` or `hf`.
    setting: `default` or `best`; options: what that means, see sides.py.
    batch: pairs or packed rows of one optimizer step, the same on all sides.
    warmup: optimizer steps that are not timed. base: folder of the checkpoint.
    dropout: of the adapter, from the second step on: the first one is compared exactly.
    """

    side: str
    task: str
    setting: str
    options: dict[str, Any] = field(hash=False)
    engine: str | None = None
    batch: int = 8
    steps: int = 9
    warmup: int = 3
    threads: int = 1
    device: str = "cpu"
    cap_gib: float | None = None
    base: str = ""
    beta: float = 0.1
    learning_rate: float = 5e-5
    optimizer: str = "adamw"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        """Identity within a race, for tables, messages and rows."""
        said = {k: v for k, v in self.options.items() if v not in (None, "auto")}
        options = " ".join(f"{k}={_short(v)}" for k, v in said.items())
        return " ".join(filter(None, (self.task, self.side, self.engine, self.setting, options)))

    @property
    def label(self) -> str:
        """Who ran: two labels are two programs."""
        return f"{self.side} {self.engine}" if self.engine else self.side


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

    pairs: of a DPO race. rows: of an SFT race, the documents (int32 ids) of each packed row.
    plan: examples of each optimizer step. sizes: r, alpha, seed and the like, see prepare.py.
    """

    folder: Path
    pairs: list[Pair]
    rows: list[list[np.ndarray]]
    plan: list[list[int]]
    sizes: dict[str, Any]

    def sequences(self, step: int) -> list[np.ndarray]:
        """Every sequence that an optimizer step trains on."""
        if self.pairs:
            return [ids for i in self.plan[step] for ids in self.pairs[i].sequences]
        return [ids for i in self.plan[step] for ids in self.rows[i]]

    def by_length(self, step: int) -> list[int]:
        """The pairs of a step, ordered so that neighbours pad each other least."""
        longest = {i: max(map(len, self.pairs[i].sequences)) for i in self.plan[step]}
        return sorted(self.plan[step], key=longest.__getitem__)


def write_work(
    folder: Path,
    pairs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    rows: Sequence[Sequence[np.ndarray]],
    plan: list[list[int]],
    sizes: dict[str, Any],
) -> None:
    """Write ids.npz and plan.json of one task: either pairs or rows."""
    parts = [part for group in (*pairs, *rows) for part in group]
    np.savez(
        folder / "ids.npz",
        ids=np.concatenate(parts).astype(np.int32),
        lengths=np.array([len(part) for part in parts]),
        row_lengths=np.array([len(row) for row in rows], np.int64),
    )
    text = json.dumps({"plan": plan, "sizes": sizes})
    (folder / "plan.json").write_text(text, encoding="utf-8")


def read_work(folder: Path) -> Work:
    """Read what `write_work` wrote."""
    with np.load(folder / "ids.npz") as stored:
        parts = np.split(stored["ids"], np.cumsum(stored["lengths"])[:-1])
        ends = np.cumsum(stored["row_lengths"]).tolist()
    rows = [parts[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends else []
    pairs = [] if ends else [Pair(*parts[i : i + 3]) for i in range(0, len(parts), 3)]
    text = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    return Work(folder, pairs, rows, text["plan"], text["sizes"])


def digest(sequences: Iterable[np.ndarray]) -> str:
    """SHA-256 over a step's sequences in any order."""
    each = sorted(hashlib.sha256(np.asarray(s, np.int32).tobytes()).hexdigest() for s in sequences)
    return hashlib.sha256("".join(each).encode()).hexdigest()


def cut(items: Sequence[int], size: int) -> list[list[int]]:
    """The items in groups of `size`, as they come."""
    return [list(items[at : at + size]) for at in range(0, len(items), size)]


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
