"""What was measured here, to paste into an issue: one compact JSON row a side.

    python benchmarks/submit.py [bench.jsonl ...]

Only the keys named below leave the file, and no text that looks like a path: no folder, user or
host name. Nothing is sent; a person pastes it or does not. Toy rows and sides without figures are
left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rows.reading import Row, RowsError, exports, figure, is_sound, races, read, suite_cases

RACE = (
    "benchmark", "task", "side", "engine", "setting", "options", "optimizer", "dropout", "versions",
    "pairs_per_second", "pairs_per_second_with_reference", "rows_per_second", "tokens_per_second",
    "step_ms_p20", "step_ms_p50", "step_ms_p80", "peak_allocated_gib", "peak_reserved_gib",
    "peak_rss_above_imports_gib", "energy_joules", "percent_of_roofline", "warmup_seconds",
    "attention", "gpu", "cpu", "threads", "cap_gib", "geometry", "load", "commit", "date",
)  # fmt: skip
KERNEL = (
    "part", "case", "metric", "unit", "p20", "p50", "p80", "derived", "gpu", "driver", "torch",
    "cuda", "triton", "bitsandbytes", "commit", "date",
)  # fmt: skip
EXPORT = (
    "benchmark", "quant", "route", "layers", "seconds", "cpu_seconds", "peak_anonymous_gib",
    "temporary_gb", "file_gb", "cpu", "cores", "torch", "gguf", "load", "commit", "date",
)  # fmt: skip
# A slash or backslash between two names, or at the start of one. "w/ Radeon Graphics" is no path.
PATH = re.compile(r"[/\\~]\S|\S[\\]")


def compact(row: Row, keys: Sequence[str]) -> str:
    """The row as one line of JSON: these keys, floats to four digits, nothing that is a path."""
    kept = {key: _clean(row[key]) for key in keys if row.get(key) is not None}
    return json.dumps(kept, separators=(",", ":"))


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, str) and PATH.search(value):
        return "(a path)"
    return value


def measured(rows: Sequence[Row]) -> list[str]:
    """A line for each side of a race, timed kernel and export that has figures at real size."""
    lines = [
        compact(row, RACE)
        for race in races(rows)
        if not race.shared.get("toy")
        for row in race.measured()
    ]
    for case in suite_cases(rows):
        if is_sound(case) and not case[0].get("toy"):
            timed = [row for row in case if row.get("unit") == "ms"]
            lines += [compact(row, KERNEL) for row in timed if figure(row, "p50") is not None]
    return lines + [compact(row, EXPORT) for row in exports(rows)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the block. Returns the exit code: 0, or 2 where there is nothing to submit."""
    parser = argparse.ArgumentParser(description="Rows to paste into an issue.")
    parser.add_argument("rows", nargs="*", type=Path, default=[Path("bench.jsonl")])
    arguments = parser.parse_args(argv)
    try:
        lines = measured(read(arguments.rows))
    except RowsError as error:
        print(f"error: {error}\nhint: zephyr-lite bench sft writes rows", file=sys.stderr)
        return 2
    if not lines:
        print("error: no row with figures at real size: nothing to submit", file=sys.stderr)
        return 2
    print("paste this into an issue:", file=sys.stderr)
    print("\n".join(["```json", *lines, "```"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
