"""What a row of AI feedback says, whichever schema it came in, and how its fields are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zephyr_lite.data.messages import Message, malformed
from zephyr_lite.data.sources import Row

Rule = Literal["mean", "overall", "worst"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `score` is None where it was not rated. Higher is better.

    `fault`: why its score cannot be believed. `note`: what was done to the score, for the report.
    """

    text: str
    score: float | None
    fault: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """A prompt (ending with the user) and its answers, from which a rule makes a pair."""

    prompt: list[Message]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class ReadyPair:
    """A pair that was made elsewhere and is used as it is."""

    prompt: list[Message]
    chosen: Answer
    rejected: Answer


class FaultyRow(Exception):
    """A row of a known schema that holds no pair: a fault to stop at or to count, see `Report`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def get(row: Row, item: Mapping[str, Any], key: str, where: str = "") -> Any:
    """`item[key]`. Raises: DataError where there is no such key; `where` leads its name."""
    if key not in item:
        found = ", ".join(sorted(map(str, item)))[:200] or "no keys"
        raise malformed(row, f"no key `{where}{key}`; there is {found}")
    return item[key]


def get_text(row: Row, item: Mapping[str, Any], key: str, where: str = "") -> str:
    """`item[key]`, which must be text."""
    value = get(row, item, key, where)
    if not isinstance(value, str):
        raise malformed(row, f"`{where}{key}` must be text, found {type(value).__name__}")
    return value


def get_list(row: Row, key: str) -> list[Any]:
    """The row's list `key`."""
    value = get(row, row.data, key)
    if not isinstance(value, list):
        raise malformed(row, f"`{key}` must be a list, found {type(value).__name__}")
    return value


def get_objects(row: Row, key: str) -> list[dict[str, Any]]:
    """The row's list `key`, whose items must be objects."""
    items = get_list(row, key)
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            raise malformed(row, f"`{key}[{i}]` must be an object, found {type(item).__name__}")
    return items


def to_number(row: Row, value: Any, where: str, hint: str | None = None) -> float:
    """A finite number, also as text ("4", "4.0"). Raises: DataError for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise malformed(row, f"`{where}` must be a finite number, found {value!r:.40}", hint=hint)
    return number


def to_score(row: Row, value: Any, where: str) -> float | None:
    """As `to_number`, and None for null and "N/A": both say that there was no rating."""
    if value is None or value == "N/A":
        return None
    return to_number(row, value, where, 'write null or "N/A" where there is none')
