"""Mixtures: a weight is a mean, a draw depends on the row's place alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_lite.data.mixture import copies
from zephyr_lite.data.sources import Row

ROWS = [Row("data/d.jsonl", line, {}) for line in range(1, 4001)]


@pytest.mark.parametrize("weight", [0.1, 0.5, 0.9, 1.5, 2.25])
@pytest.mark.parametrize("seed", [0, 42])
def test_the_mean_is_the_weight(weight: float, seed: int) -> None:
    drawn = [copies(weight, seed, row) for row in ROWS]
    fraction = weight % 1
    deviation = math.sqrt(fraction * (1 - fraction) / len(ROWS))
    assert abs(sum(drawn) / len(ROWS) - weight) < 4 * deviation
    assert set(drawn) == {math.floor(weight), math.floor(weight) + 1}


@pytest.mark.parametrize("weight", [1.0, 2.0, 100.0])
def test_whole_weights_are_exact(weight: float) -> None:
    assert {copies(weight, 7, row) for row in ROWS} == {weight}


def test_the_draw_depends_on_seed_name_and_line_only() -> None:
    half = [copies(0.5, 42, row) for row in ROWS]
    moved = [copies(0.5, 42, Row("elsewhere/d.jsonl", row.line, {"x": 1})) for row in ROWS]
    assert half == moved
    for seed, name in ((43, "d.jsonl"), (42, "e.jsonl")):
        other = [copies(0.5, seed, Row(name, row.line, {})) for row in ROWS]
        agreement = sum(map(int.__eq__, half, other)) / len(ROWS)
        assert 0.45 < agreement < 0.55


@settings(deadline=None)
@given(
    st.floats(0.01, 100),
    st.floats(0.01, 100),
    st.integers(0, 2**32 - 1),
    st.integers(1, 10**9),
)
def test_draws_are_nested_and_within_one_of_the_weight(
    one: float, two: float, seed: int, line: int
) -> None:
    row = Row("d.jsonl", line, {})
    few, many = (copies(weight, seed, row) for weight in sorted((one, two)))
    assert few <= many
    assert math.floor(one) <= copies(one, seed, row) <= math.ceil(one)
