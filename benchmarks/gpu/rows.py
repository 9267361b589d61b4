"""Rows of the GPU suite: what one measurement says, where it is kept, and when it counts as done.

One measurement is one JSON line. A row carries everything needed to doubt it later: the case, the
percentiles, the machine, the versions, the commit and the date. `Ledger` appends rows and knows
which cases need no second run.
"""

from __future__ import annotations

import itertools
import json
import platform
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rows.provenance import installed_version, read_commit, read_smi

# What changes the answer of a question that runs no code of ours.
ENVIRONMENT = ("device", "gpu", "toy", "torch", "cuda", "triton", "bitsandbytes")
DONE = ("ok", "not available")
NEEDED = ("part", "version", "case", "status", "date", "rows", "commit", *ENVIRONMENT)


@dataclass(frozen=True)
class Measure:
    """One metric of one case. `status`: ok | not available | wrong | error (see README.md).

    p20, p50, p80: in `unit`; all equal for a figure that was read once. n: samples behind them.
    derived: rates and ratios computed from the percentiles, each key with its unit in its name.
    """

    metric: str
    unit: str
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    n: int = 0
    status: str = "ok"
    note: str = ""
    derived: dict[str, Any] = field(default_factory=dict)


def figure(metric: str, unit: str, value: float, **derived: Any) -> Measure:
    """A figure that is read, not sampled: an error, a byte count, a number of tests."""
    return Measure(metric, unit, value, value, value, 1, derived=derived)


def absent(metric: str, reason: str) -> Measure:
    """The row that stands where a figure would be if this machine or library could give it."""
    return Measure(metric, "", status="not available", note=reason[:300])


def failed(metric: str, reason: str, *, status: str = "error") -> Measure:
    """A row that makes the suite exit 1: `error` (it broke) or `wrong` (it computed nonsense)."""
    return Measure(metric, "", status=status, note=reason[-2000:])


def describe_machine(device: torch.device, *, toy: bool) -> dict[str, Any]:
    """The part of a row that is the same for all rows of one run."""
    on_gpu = device.type == "cuda"
    driver = read_smi("driver_version") if on_gpu else None
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none",
        "driver": driver[0] if driver else "unknown" if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "triton": installed_version("triton"),
        "bitsandbytes": installed_version("bitsandbytes"),
        "transformers": installed_version("transformers"),
        "python": platform.python_version(),
        "commit": read_commit(),
        "toy": toy,
    }


@dataclass(frozen=True)
class Part:
    """Identity of a part. by_commit: the answer depends on this repository's code, not only on
    the versions around it, so a row counts for its own (clean) commit alone."""

    name: str
    version: int
    question: str
    by_commit: bool = False


class Ledger:
    """A JSONL file of rows, appended to one case at a time so that a kill costs one case."""

    def __init__(self, path: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = path, machine
        self._present: set[str] = set()
        self._tried: dict[str, str] = {}  # newest date of a case's rows, whatever they say
        for batch in _group_batches(load_rows(path)):
            self._learn(batch)

    @staticmethod
    def _identity(row: dict[str, Any]) -> str:
        keys = ("part", "version", *ENVIRONMENT)
        identity = [row.get(key) for key in keys] + [row["case"]]
        return json.dumps([*identity, row["commit"] if row.get("by_commit") else None])

    def _learn(self, batch: list[dict[str, Any]]) -> None:
        """A case is done when its newest batch is whole and holds no `wrong` and no `error`."""
        identity = self._identity(batch[0])
        self._tried[identity] = max(self._tried.get(identity, ""), batch[0]["date"])
        is_whole = len(batch) == batch[0]["rows"]
        if is_whole and all(row["status"] in DONE for row in batch):
            self._present.add(identity)
        else:
            self._present.discard(identity)

    def _stamp(self, part: Part, case: dict[str, Any]) -> dict[str, Any]:
        # Through JSON, so that a case compares equal to the one read back (tuples become lists).
        return {**asdict(part), "part": part.name, "case": json.loads(json.dumps(case))}

    def has(self, part: Part, case: dict[str, Any]) -> bool:
        """Whether the case was measured here before: same machine, versions and part version."""
        commit = self.machine["commit"]
        if part.by_commit and (commit == "unknown" or commit.endswith("+dirty")):
            return False
        return self._identity({**self._stamp(part, case), **self.machine}) in self._present

    def tried(self, part: Part, case: dict[str, Any]) -> str:
        """Date of the case's newest rows on this machine, "" where it has none."""
        return self._tried.get(self._identity({**self._stamp(part, case), **self.machine}), "")

    def append(self, part: Part, case: dict[str, Any], measures: list[Measure]) -> None:
        """Write all rows of one case in one go. Raises: ValueError for a figure not finite."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        stamp = {**self._stamp(part, case), **self.machine, "date": date, "rows": len(measures)}
        stamp.pop("name")
        batch = [{**stamp, **asdict(measure)} for measure in measures]
        lines = [json.dumps(row, allow_nan=False) for row in batch]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
        self._learn(batch)


def _group_batches(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that one `append` wrote: neighbours of one part, case and date."""

    def key(row: dict[str, Any]) -> str:
        return json.dumps([row["part"], row["case"], row["date"]])

    return [list(batch) for _, batch in itertools.groupby(rows, key)]


def load_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, [] where there is none. A last line cut short by a kill is removed.

    Rows of other benchmarks, which may share the file, are passed over.
    Raises: ValueError naming file:line for any other line that is no row.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    whole, newline, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + newline, encoding="utf-8")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            if "benchmark" in row:
                continue
            rows.append({**row, **{key: row[key] for key in NEEDED}})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: not a row of the GPU suite: {error!r}") from error
    return rows
