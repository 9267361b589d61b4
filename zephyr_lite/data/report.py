"""What became of every row that was read: kept, or dropped for a named reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError, VerificationError

OnFault = Literal["stop", "drop"]
# Reasons that no data owner has to repair: the row is sound, the rule has no use for it.
NOT_FAULTS = ("tie", "duplicate")
WAY_OUT = "repair the row, or set data.on_fault=drop to leave such rows out, counted"


@dataclass
class Report:
    """Counts per file. `rows_read[f] == kept[f] + sum(dropped[f].values())` always: see `check`.

    `noted` counts what changes no sum: answers that were not considered (`answer_unrated`, ...) and
    kept rows worth knowing of (`tie_kept`). `dropped_rows`: {file, line, reason} of each.
    """

    on_fault: OnFault = "stop"
    rows_read: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)
    noted: dict[str, Counter[str]] = field(default_factory=dict)
    dropped_rows: list[dict[str, Any]] = field(default_factory=list)

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
        self.dropped_rows.append({"file": row.file, "line": row.line, "reason": reason})

    def note(self, row: Row, what: str) -> None:
        """Count something about a row that decides nothing."""
        self.noted.setdefault(row.file, Counter())[what] += 1

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

    def reasons(self) -> dict[str, int]:
        """Rows dropped by reason, over all files."""
        return dict(sum(self.dropped.values(), Counter()))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON: totals, `files`, `dropped_rows`."""
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
            "files": files,
            "dropped_rows": self.dropped_rows,
        }
