"""Rows of `bench.jsonl` as a page and an issue need them: read, newest first, figures or none.

Three kinds: of races (`race.py`), of the GPU suite (`gpu_suite.py`: they have a `part`), of exports
(`export_cost.py`); others are counted and left out. A figure exists only where the row's status is
`ok`: a side that computes something else, failed or is not installed has no speed, whatever stands
in its row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SIDES = {
    "ours": "zephyr-lite",
    "plain": "transformers + PEFT",
    "trl": "TRL",
    "liger": "TRL + Liger",
    "unsloth": "Unsloth",
}
ENGINES, SETTINGS = ("native", "hf"), ("default", "best")
# Races that are equal in these are one race done again: the newest counts.
SAME_RACE = ("task", "toy", "geometry", "gpu", "cpu", "threads", "cap_gib", "dropout")


class RowsError(Exception):
    """A file of rows cannot be read; the message names file and line."""


@dataclass(frozen=True)
class Race:
    """One task on one machine: a row for each side and setting, and the ratios between them."""

    sides: list[Row]
    ratios: list[Row]

    @property
    def shared(self) -> Row:
        """A row with what all have in common."""
        return self.sides[0]

    def measured(self) -> list[Row]:
        """The sides that have figures."""
        return [row for row in self.sides if row["status"] == "ok"]

    def fastest(self, key: str) -> list[Row]:
        """A row for each side, engine and setting: of those tried under it the one with most."""
        best: dict[str, Row] = {}
        for row in self.sides:
            held = best.setdefault(side_name(row), row)
            if (figure(row, key) or 0) > (figure(held, key) or 0):
                best[side_name(row)] = row
        return list(best.values())


def read(files: Iterable[Path]) -> list[Row]:
    """All rows of some files, in order. A last line that a kill cut short is passed over.

    Raises: RowsError for a file that is not there or a line that is no row.
    """
    rows: list[Row] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "is not UTF-8"
            raise RowsError(f"{file}: {reason}") from None
        whole, _, _ = text.rpartition("\n")
        for number, line in enumerate(whole.splitlines(), start=1):
            rows.append(_parsed(line, f"{file}:{number}"))
    return rows


def _parsed(line: str, place: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise RowsError(f"{place}: not a row of a benchmark")
    needed = ("task", "row", "kind", "date") if row.get("benchmark") == "race" else ()
    needed = ("case", "metric", "status", "date") if "part" in row else needed
    if missing := [key for key in needed if key not in row]:
        raise RowsError(f"{place}: the row lacks {', '.join(missing)}")
    return row


def races(rows: Sequence[Row]) -> list[Race]:
    """What each command measured, sides of ours first; of races done again the newest."""
    runs: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("benchmark") == "race":
            runs.setdefault(str(row.get("race", row["date"])), []).append(row)
    newest: dict[str, Race] = {}
    for run in runs.values():
        sides = sorted(({"status": "failed"} | r for r in run if r["kind"] == "side"), key=_order)
        if not sides:
            continue
        key = json.dumps([sides[0].get(name) for name in SAME_RACE])
        if key not in newest or newest[key].shared["date"] <= sides[0]["date"]:
            newest[key] = Race(sides, [row for row in run if row["kind"] == "ratio"])
    return list(newest.values())


def side_name(row: Row) -> str:
    """Side, engine and setting as people call them: `zephyr-lite native, best`."""
    side = SIDES.get(row["side"], row["side"])
    engine = f" {row['engine']}" if row.get("engine") else ""
    setting = f", {row['setting']}" if row.get("setting") else ""
    return f"{side}{engine}{setting}"


def _order(row: Row) -> tuple[int, ...]:
    """Ours first, then rivals as SIDES lists them; native before hf, default before best."""
    orders = ((list(SIDES), "side"), (ENGINES, "engine"), (SETTINGS, "setting"))
    return tuple(
        names.index(row[key]) if row.get(key) in names else len(names) for names, key in orders
    )


def figure(row: Row, *keys: str) -> float | None:
    """A figure, `figure(row, "derived", "tflops")` for one inside another; None: not measured."""
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and row.get("status", "ok") == "ok" else None


def suite_cases(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the GPU suite, a list for each case: those of its newest date on that machine."""
    newest: dict[str, list[Row]] = {}
    for row in rows:
        if "part" not in row:
            continue
        key = json.dumps([row["part"], row.get("gpu"), row.get("toy"), row["case"]])
        held = newest.get(key, [])
        if held and held[0]["date"] == row["date"]:
            held.append(row)
        elif not held or held[0]["date"] < row["date"]:
            newest[key] = [row]
    return list(newest.values())


def is_sound(case: Sequence[Row]) -> bool:
    """Whether nothing in a case of the suite is wrong or broke, so that its speeds count."""
    return all(row["status"] in ("ok", "not available") for row in case)


def exports(rows: Sequence[Row]) -> list[Row]:
    """Rows of exports: the newest of each type and route."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if row.get("benchmark") == "export_cost":
            key = tuple(row.get(name) for name in ("cpu", "cores", "layers", "quant", "route"))
            newest[key] = row
    return list(newest.values())


def others(rows: Sequence[Row]) -> dict[str, int]:
    """Benchmark -> number of rows that a page has no section for."""
    counts: dict[str, int] = {}
    for row in rows:
        name = str(row.get("benchmark", row.get("kind", "without a name")))
        if "part" not in row and name not in ("race", "export_cost"):
            counts[name] = counts.get(name, 0) + 1
    return counts
