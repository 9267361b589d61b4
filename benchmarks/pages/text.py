"""The page's words: cells, tables, lists, and the line that says which machine it was."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pages.svg_chart import three_digits
from rows.reading import Row

NOT_MEASURED = "not measured"
TOY = "**Toy size: these rows show that the harness works, and nothing about speed.**"
LONGEST_LINE = 300


@dataclass(frozen=True)
class Section:
    """A part of the page: its Markdown, and the pictures (file name -> SVG text) that it shows."""

    text: str
    pictures: dict[str, str]


def cell(value: float | None) -> str:
    """A figure of a table."""
    return NOT_MEASURED if value is None else three_digits(value)


def line(text: object) -> str:
    """One line of Markdown from any text; long ones are cut."""
    words = " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
    return words if len(words) <= LONGEST_LINE else words[: LONGEST_LINE - 3] + "..."


def bullets(title: str, items: Iterable[str]) -> str:
    """A list under its title."""
    return f"{title}:\n\n" + "\n".join(f"- {item}" for item in items)


def table(head: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """Markdown; the first columns to the left, figures to the right."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))


def shown(names: Iterable[str]) -> str:
    """Pictures, which lie beside the page."""
    return "\n\n".join(f"![{name.removesuffix('.svg')}]({name})" for name in names)


def machine(rows: Sequence[Row]) -> str:
    """Which machine, model, commits and days."""
    first = rows[0]
    gpu = first.get("gpu")
    facts = [f"GPU: {gpu if gpu and gpu != 'none' else 'none'}"]
    words = (("cpu", "CPU: {}"), ("cores", "{} cores"), ("threads", "threads: {}"))
    words += (("geometry", "model: {}"), ("cap_gib", "memory cap: {} GiB"))
    words += (("dropout", "dropout: {}"),)
    facts += [text.format(first[key]) for key, text in words if first.get(key)]
    commits = dict.fromkeys(str(row["commit"]) for row in rows if row.get("commit"))
    facts.append(f"commit {', '.join(commits) or 'not recorded'}")
    days = sorted({str(row["date"])[:10] for row in rows if row.get("date")})
    facts.append(" to ".join(dict.fromkeys((days[0], days[-1]))) if days else "day not recorded")
    loads: list[Any] = [row["load"] for row in rows if row.get("load") is not None]
    facts += [f"load average up to {max(loads)}"] if loads else []
    return "; ".join(facts) + "."
