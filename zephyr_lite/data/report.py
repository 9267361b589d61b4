"""What became of every row that was read: kept, or dropped for a named reason at a named step."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError, VerificationError
from zephyr_lite.storage import write_text

OnFault = Literal["stop", "drop"]
WAY_OUT = "repair the row, or set data.on_fault=drop to leave such rows out, counted"
# The steps in the order in which rows pass them: the reasons for which each drops a row, and the
# notes that say what it changed. A reason that stands nowhere here is a fault: soundness finds it.
SOUNDNESS = "soundness"
STEPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "mixture": (("not_sampled", "excluded_source"), ("repeated",)),
    SOUNDNESS: ((), ()),
    "refusals": (("refusal",), ()),
    "decontamination": (("contaminated",), ()),
    "pairs": (("tie", "duplicate"), ("tie_kept",)),
    "truecasing": ((), ("truecased_turns",)),
}
# Reasons that no data owner has to repair: the row is sound, the rule has no use for it.
NOT_FAULTS = tuple(reason for reasons, _ in STEPS.values() for reason in reasons)
_STEP_OF = {reason: step for step, (reasons, _) in STEPS.items() for reason in reasons}


class _Rejected:
    """Places of dropped rows in 16 bytes each: a seeded half of a big source is many rows."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, str, str], int] = {}
        self._kind_of, self._lines = array("Q"), array("Q")

    def add(self, row: Row, reason: str, detail: str) -> None:
        kind = self._kinds.setdefault((row.file, reason, detail), len(self._kinds))
        self._kind_of.append(kind)
        self._lines.append(row.line)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kinds = list(self._kinds)
        for kind, line in zip(self._kind_of, self._lines, strict=True):
            file, reason, detail = kinds[kind]
            entry = {"file": file, "line": line, "reason": reason}
            yield entry | ({"detail": detail} if detail else {})


@dataclass
class Report:
    """Counts per file. `rows_read[f] == kept[f] + sum(dropped[f].values())` always: see `check`.

    `noted` counts what changes no sum: answers that were not considered (`answer_unrated`, ...),
    kept rows worth knowing of (`tie_kept`), what was changed (`truecased_turns`, `repeated`).
    `steps_on`: steps that are listed even when they drop nothing. `benchmarks`: what the rows were
    compared with, benchmark -> prompts read from it.
    """

    on_fault: OnFault = "stop"
    rows_read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    noted: dict[str, Counter[str]] = field(default_factory=dict)
    steps_on: set[str] = field(default_factory=lambda: {SOUNDNESS})
    benchmarks: dict[str, int] = field(default_factory=dict)
    _rejected: _Rejected = field(default_factory=_Rejected, repr=False, compare=False)

    def read(self, row: Row) -> None:
        """Count a row as read; `keep` or `drop` must follow."""
        self.rows_read[row.file] += 1

    def keep(self, row: Row) -> None:
        """Count a row as kept."""
        self.kept[row.file] += 1

    def drop(self, row: Row, reason: str, detail: str = "", *, hint: str = WAY_OUT) -> None:
        """Count a row as dropped; under `on_fault="stop"` raise DataError if it is a fault."""
        self.refuse(row, reason, detail, hint=hint)
        self.dropped.setdefault(row.file, Counter())[reason] += 1
        self._rejected.add(row, reason, detail)

    def note(self, row: Row, what: str, times: int = 1) -> None:
        """Count something about a row that decides nothing."""
        self.noted.setdefault(row.file, Counter())[what] += times

    def refuse(self, row: Row, reason: str, detail: str = "", *, hint: str = WAY_OUT) -> None:
        """Raise DataError for a fault under `on_fault="stop"`; else do nothing."""
        if self.on_fault == "stop" and reason not in NOT_FAULTS:
            message = f"{reason}: {detail}" if detail else reason
            raise DataError(message, file=row.file, line=row.line, hint=hint)

    def check(self) -> None:
        """Raises: VerificationError where a file's rows do not add up (a bug of ours)."""
        for file, rows in self.rows_read.items():
            dropped = self.dropped.get(file, Counter()).total()
            if rows != self.kept[file] + dropped:
                sums = f"{rows} rows read, {self.kept[file]} kept, {dropped} dropped"
                raise VerificationError(f"{file}: rows do not add up: {sums}")
        if self.steps()[-1]["after"] != self.kept.total():
            raise VerificationError(f"steps do not end at {self.kept.total()} kept: {self.steps()}")
        if len(self._rejected) != sum(self.reasons().values()):
            raise VerificationError(f"{len(self._rejected)} rejected rows, not {self.reasons()}")

    def reasons(self) -> dict[str, int]:
        """Rows dropped by reason, over all files."""
        return dict(sum(self.dropped.values(), Counter()))

    def steps(self) -> list[dict[str, Any]]:
        """{step, before, after} in order, for steps that were on or dropped or changed something.

        `changed`, where there is any: what the step changed, by name; `benchmarks`: as above.
        """
        lost: Counter[str] = Counter()
        for reason, rows in self.reasons().items():
            lost[_STEP_OF.get(reason, SOUNDNESS)] += rows
        noted = sum(self.noted.values(), Counter())
        found, before = [], self.rows_read.total()
        for step, (_, notes) in STEPS.items():
            after = before - lost[step]
            changed = {note: noted[note] for note in notes if noted[note]}
            if step in self.steps_on or after != before or changed:
                entry: dict[str, Any] = {"step": step, "before": before, "after": after}
                if step == "decontamination" and self.benchmarks:
                    entry["benchmarks"] = self.benchmarks
                found.append(entry | ({"changed": changed} if changed else {}))
            before = after
        return found

    @property
    def dropped_rows(self) -> list[dict[str, Any]]:
        """{file, line, reason[, detail]} of each dropped row, in the order of reading."""
        return list(self._rejected)

    def write_rejected(self, path: Path) -> None:
        """Write `dropped_rows` as JSON lines, atomically; an empty file when there are none.

        Raises: StorageError; an older file is then untouched.
        """
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self._rejected)
        write_text(path, "".join(lines))

    def as_dict(self) -> dict[str, Any]:
        """Counts as plain JSON: totals, `steps`, `files`. The rows are `write_rejected`'s."""
        files = {
            file: {
                "rows_read": rows,
                "kept": self.kept[file],
                "dropped": dict(self.dropped.get(file, {})),
                "noted": dict(self.noted.get(file, {})),
            }
            for file, rows in self.rows_read.items()
        }
        return {
            "on_fault": self.on_fault,
            "rows_read": self.rows_read.total(),
            "kept": self.kept.total(),
            "dropped": self.reasons(),
            "steps": self.steps(),
            "files": files,
        }
