"""Mixtures: how often a row of a weighted source is taken."""

from __future__ import annotations

import hashlib
import math

from zephyr_lite.data.sources import Row


def copies(weight: float, seed: int, row: Row) -> int:
    """floor(weight), and one more with probability frac(weight): 0.5 takes half, 2 all twice.

    A pure function of the seed, the last part of the file's name and the line, so neither the order
    of sources nor a limit changes which rows are taken. Draws are nested: what 0.25 takes is part
    of what 0.5 takes.
    """
    whole = math.floor(weight)
    fraction = weight - whole
    return whole + (fraction > 0 and _place(seed, row) < fraction)


def _place(seed: int, row: Row) -> float:
    """A number in [0, 1) that depends on the seed and the row's place."""
    name = row.file.rsplit("/", 1)[-1]
    text = f"{seed}\n{name}\n{row.line}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:13], 16) / 16**13
