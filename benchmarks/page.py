"""Rows of benchmarks as a page: `bench.md`, with bars as SVG beside it.

    python benchmarks/page.py [bench.jsonl ...] [--out bench.md]

Every figure is one that a row has; a cell without one says "not measured". Pictures are SVG, which
browsers and Markdown viewers show; no other form is written.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pages.other_sections import exports_section, kernels_section
from pages.race_section import TITLES, race_section
from pages.text import NOT_MEASURED
from rows.reading import Race, Row, RowsError, exports, others, races, read, suite_cases


def make_page(rows: Sequence[Row], stem: str) -> tuple[str, dict[str, str]]:
    """(Markdown, file name -> SVG text); pictures are called STEM-....svg.

    Args:
        rows: as `reading.read` gives them.
    """
    found = races(rows)
    sections = [race_section(race, f"{stem}-{at}") for at, race in enumerate(found, start=1)]
    rest = (kernels_section(rows, stem), exports_section(rows, stem))
    sections += [section for section in rest if section]
    parts = ["# Benchmarks", *_lacking(found, rows), *(section.text for section in sections)]
    if left := others(rows):
        names = ", ".join(f"{name} ({count})" for name, count in sorted(left.items()))
        parts.append(f"Rows of other benchmarks, which this page does not show: {names}.")
    pictures = {name: svg for section in sections for name, svg in section.pictures.items()}
    return "\n\n".join(parts) + "\n", pictures


def _lacking(found: Sequence[Race], rows: Sequence[Row]) -> list[str]:
    """What has no section, because these files have no row of it."""
    tasks = {race.shared["task"] for race in found}
    names = [title for task, title in TITLES.items() if task not in tasks]
    names += [] if suite_cases(rows) else ["kernels"]
    names += [] if exports(rows) else ["export"]
    return [f"{', '.join(names)}: {NOT_MEASURED}."] if names else []


def main(argv: Sequence[str] | None = None) -> int:
    """Read rows, write the page. Returns the exit code: 0, or 2 where rows cannot be read."""
    parser = argparse.ArgumentParser(description="Rows of benchmarks as a page.")
    parser.add_argument("rows", nargs="*", type=Path, default=[Path("bench.jsonl")])
    parser.add_argument("--out", type=Path, default=Path("bench.md"), help="the page")
    arguments = parser.parse_args(argv)
    try:
        page, pictures = make_page(read(arguments.rows), arguments.out.stem)
    except RowsError as error:
        print(f"error: {error}\nhint: zephyr-lite bench sft writes rows", file=sys.stderr)
        return 2
    _write(arguments.out.parent, {**pictures, arguments.out.name: page})
    print(f"{arguments.out}; pictures beside it: {', '.join(pictures) or 'none'}")
    return 0


def _write(folder: Path, files: dict[str, str]) -> None:
    """Replace each file whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        part = folder / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        os.replace(part, folder / name)


if __name__ == "__main__":
    raise SystemExit(main())
