"""Kernels and exports on the page."""

from __future__ import annotations

from collections.abc import Sequence

from pages.svg_chart import Bar, bar_chart, three_digits
from pages.text import NOT_MEASURED, TOY, Section, bullets, cell, line, machine, shown, table
from rows.reading import Row, exports, figure, is_sound, suite_cases

THEIRS = ("torch", "cublas", "bitsandbytes", "gemm")  # in the names of what ours are held against


def kernels_section(rows: Sequence[Row], stem: str) -> Section | None:
    """Every kernel's time and share of its ceiling; a case with an error in it has no speed."""
    cases = suite_cases(rows)
    if not cases:
        return None
    timed = [row for case in cases if is_sound(case) for row in case if row.get("unit") == "ms"]
    checks = [case for case in cases if case[0]["part"] == "kernels_correct"]
    bad = [row for case in cases for row in case if row["status"] in ("wrong", "error")]
    parts = ["## Kernels", machine([case[0] for case in cases])]
    parts += [TOY] if any(case[0].get("toy") for case in cases) else []
    if checks:
        parts.append(f"Correct: {sum(map(is_sound, checks))} of {len(checks)} cases.")
    if bad:
        items = [f"{_name(row)}: {row['status']}: {line(row.get('note'))}" for row in bad]
        parts.append(bullets("Without figures", items))
    if not timed:
        return Section("\n\n".join([*parts, f"Speed: {NOT_MEASURED}."]), {})
    bars = [Bar(_name(row), _percent(row), _is_ours(row), NOT_MEASURED) for row in timed]
    pictures = {f"{stem}-kernels.svg": bar_chart("Kernels: percent of the card's ceiling", bars)}
    head = ["kernel", "ms", "p20", "p80", "rate", "% of ceiling"]
    parts += [shown(pictures), table(head, map(_timing, timed))]
    parts.append("Ceiling: the copy, or the matrix product, that the same process measured.")
    return Section("\n\n".join(parts), pictures)


def _is_ours(row: Row) -> bool:
    return not any(name in row["metric"] for name in THEIRS)


def _name(row: Row) -> str:
    case = row["case"]
    words = [case.get("op"), case.get("layout"), row["metric"].strip("_")]
    return " ".join(str(word) for word in words if word)


def _percent(row: Row) -> float | None:
    of_copy = figure(row, "derived", "percent_of_copy")
    return figure(row, "derived", "percent_of_matmul") if of_copy is None else of_copy


def _rate(row: Row) -> str:
    for key, unit in (("gb_per_s", "GB/s"), ("tflops", "TFLOPS")):
        rate = figure(row, "derived", key)
        if rate is not None:
            return f"{three_digits(rate)} {unit}"
    return NOT_MEASURED


def _timing(row: Row) -> list[str]:
    times = [cell(figure(row, key)) for key in ("p50", "p20", "p80")]
    return [_name(row), *times, _rate(row), cell(_percent(row))]


def exports_section(rows: Sequence[Row], stem: str) -> Section | None:
    """Each type of file by our route and by the usual one."""
    found = exports(rows)
    if not found:
        return None
    keys = ("seconds", "cpu_seconds", "peak_anonymous_gib", "temporary_gb", "file_gb")
    head = ["type", "route", "s", "CPU s", "GiB", "GB of temporary disk", "GB of the file"]
    lines = [[r["quant"], r["route"], *(cell(figure(r, key)) for key in keys)] for r in found]
    bars = [
        Bar(f"{r['quant']} {r['route']}", figure(r, "seconds"), r["route"].startswith("ours"))
        for r in found
    ]
    pictures = {f"{stem}-export.svg": bar_chart("Export: seconds", bars)}
    layers = ", ".join(sorted({str(row.get("layers")) for row in found}))
    parts = [
        "## Export beside the usual route",
        machine(found),
        f"Mistral-7B's widths; layers: {layers}.",
        shown(pictures),
        table(head, lines, left=2),
    ]
    return Section("\n\n".join(parts), pictures)
