"""A plan on 80 columns: bytes of every part, a bar a training, times, and what else would do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zephyr_lite.plan.memory import Parts
from zephyr_lite.plan.schedule import Candidate
from zephyr_lite.report.quantities import duration, memory

BAR = 70
COLUMN = 10
TITLES = {"sft": "dSFT", "dpo": "dDPO"}
# Letter and words of each part of a bar, in its order.
LEGEND = (
    ("W", "weights", ("weights", "embeddings")),
    ("A", "adapters", ("adapters",)),
    ("G", "gradients", ("gradients",)),
    ("O", "optimizer", ("optimizer",)),
    ("k", "kept for the backward", ("activations",)),
    ("w", "workspace", ("workspace",)),
    ("c", "CUDA and slack", ("context", "slack")),
)
FREE = "."


@dataclass(frozen=True)
class Column:
    """One training of the table. parts: as chosen, or the least where nothing fits."""

    stage: str
    parts: Parts
    words: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Duration:
    """One line of the times. seconds: None where they are not known."""

    name: str
    work: str
    seconds: float | None


def table(columns: Sequence[Column], budget: int) -> list[str]:
    """Bytes by part, one column a training."""
    heads = "".join(f"{TITLES[c.stage]:>{COLUMN}}" for c in columns)
    most = max(column.parts.total for column in columns)
    unit, size = ("GiB", 2**30) if most >= 2**30 else ("MiB", 2**20)
    lines = [f"  {unit:24}{heads}"]
    for _, words, names in LEGEND:
        cells = [sum(getattr(c.parts, name) for name in names) / size for c in columns]
        if any(cells):
            lines.append(_line(words, cells))
    lines.append(_line("sum", [c.parts.total / size for c in columns]))
    lines.append(_line("free", [(budget - c.parts.total) / size for c in columns]))
    return lines


def bars(columns: Sequence[Column], budget: int) -> list[str]:
    """A bar a training, as wide as the budget, and what its letters mean."""
    lines = [f"  {TITLES[c.stage]}  {bar(c.parts, budget)}" for c in columns]
    used = [
        f"{letter} {words}"
        for letter, words, names in LEGEND
        if any(getattr(c.parts, name) for c in columns for name in names)
    ]
    return lines + _wrapped([*used, f"{FREE} free"], "        ")


def bar(parts: Parts, budget: int, width: int = BAR) -> str:
    """Each part as long as its share of the budget; a part that is there has a letter at least."""
    cells, done, text = 0.0, 0, ""
    for letter, _, names in LEGEND:
        size = sum(getattr(parts, name) for name in names)
        cells += size / budget * width
        count = max(round(cells) - done, 1 if size else 0)
        text, done = text + letter * count, done + count
    return text[:width] + FREE * (width - done)


def choices(columns: Sequence[Column]) -> list[str]:
    """What was chosen, and what else would do at what cost."""
    lines = []
    for column in columns:
        lines += indented(f"  {TITLES[column.stage]}  ", column.words)
        for other in column.others:
            lines += indented("        or ", other)
    return lines


def alternative(candidate: Candidate, chosen: Candidate, words: str) -> str:
    """An alternative, and what it costs beside the choice."""
    slower = 100 * (candidate.step_seconds / chosen.step_seconds - 1)
    pace = (
        "as fast"
        if abs(slower) < 0.5
        else f"{abs(slower):.0f} % " + ("slower" if slower > 0 else "faster")
    )
    difference = candidate.parts.total - chosen.parts.total
    more = f"{memory(abs(difference))} {'more' if difference > 0 else 'less'}"
    return f"{words}: {pace}, {more}"


def times(durations: Sequence[Duration]) -> list[str]:
    """What each part takes, and all of them."""
    lines = [
        f"  {d.name:10}{d.work:44}" + ("not known" if d.seconds is None else duration(d.seconds))
        for d in durations
    ]
    known = [d.seconds for d in durations if d.seconds is not None]
    if len(known) == len(durations) > 1:
        lines.append(f"  {'sum':54}{duration(sum(known))}")
    return lines


def _line(words: str, cells: Sequence[float]) -> str:
    return f"  {words:24}" + "".join(f"{cell:{COLUMN}.2f}" for cell in cells)


def indented(head: str, text: str, width: int = 78) -> list[str]:
    """Text behind a head, its further lines under its first."""
    lines, blank = [head], " " * len(head)
    for word in text.split():
        if len(lines[-1]) + len(word) > width:
            lines.append(blank)
        lines[-1] += word + " "
    return [line.rstrip() for line in lines]


def _wrapped(entries: Sequence[str], indent: str, width: int = 78) -> list[str]:
    lines = [indent]
    for entry in entries:
        if len(lines[-1]) + len(entry) > width:
            lines.append(indent)
        lines[-1] += entry + "   "
    return [line.rstrip() for line in lines]
