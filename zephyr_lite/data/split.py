"""Holding rows out by hash of the first user message: one prompt never falls on both sides."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def hold_out(
    items: Sequence[Item], fraction: float, prompt: Callable[[Item], Sequence[Mapping[str, str]]]
) -> tuple[list[Item], list[Item]]:
    """(train, held out), by `is_held_out`; `prompt` gives the messages of an item."""
    sides: tuple[list[Item], list[Item]] = ([], [])
    for item in items:
        sides[is_held_out(prompt(item), fraction)].append(item)
    return sides


def is_held_out(messages: Sequence[Mapping[str, str]], fraction: float) -> bool:
    """Whether the prompt's hash falls below `fraction` of its range.

    The first user message decides, case and spacing aside.
    """
    return fraction > 0 and _place(messages) < fraction


def _place(messages: Sequence[Mapping[str, str]]) -> float:
    """A number in [0, 1) that depends on the first user message only."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    text = re.sub(r"\W+", " ", unicodedata.normalize("NFKC", first).lower()).strip()
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
