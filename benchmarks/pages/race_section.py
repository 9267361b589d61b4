"""A race on the page: bars of speed and memory, every figure, who has none and why, versions."""

from __future__ import annotations

from pages.svg_chart import Bar, bar_chart
from pages.text import NOT_MEASURED, TOY, Section, bullets, cell, line, machine, shown, table
from rows.reading import SIDES, Race, Row, figure, side_name

TITLES = {"dpo": "DPO", "sft": "SFT"}
SPEED = {"dpo": ("pairs_per_second", "pairs/s"), "sft": ("tokens_per_second", "useful tokens/s")}
WHY = {
    "absent": "not installed",
    "disagrees": "computes something else, so it has no speed",
    "unchecked": "nothing ran that it could agree with, so it has no speed",
}
FIGURES = {
    "pairs_per_second": "pairs/s",
    "pairs_per_second_with_reference": "with the reference pass",
    "rows_per_second": "rows/s",
    "tokens_per_second": "useful tokens/s",
    "step_ms_p50": "step ms",
    "step_ms_p20": "p20",
    "step_ms_p80": "p80",
    "peak_allocated_gib": "GiB allocated",
    "peak_reserved_gib": "GiB reserved",
    "peak_rss_above_imports_gib": "GiB of RAM above imports",
    "energy_joules": "joules",
    "percent_of_roofline": "% of roofline",
    "warmup_seconds": "warm-up s",
}
RATIOS = {
    "speed_ratio": "times its speed",
    "speed_ratio_with_reference": "with the reference pass",
    "cpu_ratio": "by CPU seconds",
    "memory_ratio": "times its memory",
}
ON_GPU, IN_RAM, ROOFLINE = "peak_allocated_gib", "peak_rss_above_imports_gib", "percent_of_roofline"


def race_section(race: Race, stem: str) -> Section:
    """The race's part of the page; pictures are called STEM-speed.svg and so on."""
    task = str(race.shared["task"])
    title = TITLES.get(task, task)
    pictures = _pictures(race, task, title, stem)
    parts = [f"## {title} beside rivals", machine(race.sides)]
    parts += [TOY] if race.shared.get("toy") else []
    parts += [shown(pictures), *_ratios(race), _figures(race), *_without_figures(race)]
    parts += [_settings(race), _versions(race)]
    return Section("\n\n".join(parts), pictures)


def _pictures(race: Race, task: str, title: str, stem: str) -> dict[str, str]:
    key, unit = SPEED.get(task, SPEED["sft"])
    charts = {"speed": (f"{title}: {unit}", key)}
    if _has(race, ON_GPU):
        charts["memory"] = (f"{title}: peak GiB allocated on the GPU", ON_GPU)
    elif _has(race, IN_RAM):
        charts["memory"] = (f"{title}: peak GiB of RAM above imports", IN_RAM)
    if _has(race, ROOFLINE):
        charts["roofline"] = (f"{title}: percent of the roofline", ROOFLINE)
    rows = race.fastest(key)
    return {
        f"{stem}-{name}.svg": bar_chart(said, [_bar(row, key) for row in rows])
        for name, (said, key) in charts.items()
    }


def _bar(row: Row, key: str) -> Bar:
    instead = NOT_MEASURED if row["status"] == "ok" else str(row["status"])
    return Bar(side_name(row), figure(row, key), row["side"] == "ours", instead)


def _has(race: Race, key: str) -> bool:
    return any(figure(row, key) is not None for row in race.sides)


def _figures(race: Race) -> str:
    """The table of all sides; figures that no side has are named in one sentence below it."""
    columns = [key for key in FIGURES if _has(race, key)]
    lines = [
        [_label(row, race), *(cell(figure(row, key)) for key in columns)] for row in race.sides
    ]
    text = table(["side", *(FIGURES[key] for key in columns)], lines)
    other = "rows_" if race.shared["task"] == "dpo" else "pairs_"
    absent = [key for key in FIGURES if key not in columns and not key.startswith(other)]
    lacking = ", ".join(FIGURES[key] for key in absent)
    return f"{text}\n\nOn no side: {lacking}: {NOT_MEASURED}." if lacking else text


def _label(row: Row, race: Race) -> str:
    """The side's name; where several settings were tried under it, with its settings."""
    name = side_name(row)
    is_alone = sum(side_name(other) == name for other in race.sides) == 1
    return name if is_alone else f"{name} ({_words(row)})"


def _words(row: Row) -> str:
    options = (row.get("options") or {}).items()
    return line(", ".join(f"{key}={value}" for key, value in options if value is not None))


def _without_figures(race: Race) -> list[str]:
    """Sides that have no figures, each with the reason."""
    items = []
    for row in race.sides:
        if row["status"] != "ok":
            reason = f": {line(row['reason'])}" if row.get("reason") else ""
            items.append(f"{_label(row, race)}: {WHY.get(row['status'], row['status'])}{reason}")
    return [bullets("Without figures", items)] if items else []


def _ratios(race: Race) -> list[str]:
    """Ratios of rows that have figures: a ratio is worth what its rows are."""
    names = {row["row"] for row in race.measured()}
    kept = [row for row in race.ratios if {row["ours_row"], row["rival_row"]} <= names]
    columns = [key for key in RATIOS if any(figure(row, key) is not None for row in kept)]
    lines = [
        [
            f"{SIDES.get(row['rival'], row['rival'])}, {row['setting']}",
            *(cell(figure(row, key)) for key in columns),
            line(f"{row['ours_row']} / {row['rival_row']}"),
        ]
        for row in kept
    ]
    head = ["ours against", *(RATIOS[key] for key in columns), "rows"]
    return [table(head, lines)] if lines else []


def _settings(race: Race) -> str:
    items = [f"{side_name(row)}: {_words(row)}" for row in race.sides if row.get("options")]
    return bullets("Settings", items) if items else "Settings: none beyond what a side does alone."


def _versions(race: Race) -> str:
    """Versions each side ran with, rivals in environments of their own."""
    rows = {side_name(row): row["versions"] for row in race.sides if row.get("versions")}
    names = list(dict.fromkeys(name for versions in rows.values() for name in versions))
    lines = [[side, *(str(v.get(name, "-")) for name in names)] for side, v in rows.items()]
    head = ["versions", *names]
    return table(head, lines, left=len(head)) if lines else "Versions: not recorded."
