"""The table and the bars of a plan: what is drawn is what was planned, on 80 columns."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zephyr_lite.plan.ledger import HostParts, Parts
from zephyr_lite.plan.schedule import Candidate
from zephyr_lite.plan.setting import Cut
from zephyr_lite.report import plan_table
from zephyr_lite.report.plan_table import Column, Duration
from zephyr_lite.report.quantities import disk, duration, memory

GIB = 2**30
PARTS = Parts(
    weights=4 * GIB,
    embeddings=GIB,
    adapters=GIB // 4,
    gradients=GIB // 4,
    optimizer=GIB // 2,
    activations=8 * GIB,
    workspace=GIB,
    context=GIB // 2,
    slack=GIB // 2,
    may_leave=0,
)
CHOSEN = Candidate(Cut(4096, 32), PARTS, HostParts(0, 0), 4.0, 3.0, 32)
WORDS = (
    "4096 tokens a micro-batch, 30 of 32 layers keep activations, the others wait in host memory"
)
COLUMN = Column("dpo", PARTS, WORDS, (WORDS,))


def test_the_bar_is_the_budget():
    text = plan_table.bar(PARTS, 20 * GIB, width=40)
    assert len(text) == 40
    assert {letter: text.count(letter) for letter in "WAGOkwc."} == {
        "W": 10, "A": 1, "G": 1, "O": 1, "k": 15, "w": 2, "c": 2, ".": 8,
    }  # fmt: skip
    assert "".join(sorted(set(text), key=text.index)) == "WAGOkwc."


def test_a_small_part_is_seen_and_one_that_is_not_there_is_not():
    tiny = replace(PARTS, gradients=1, optimizer=0)
    text = plan_table.bar(tiny, 20 * GIB, width=40)
    assert text.count("G") == 1 and "O" not in text and len(text) == 40


def test_what_does_not_fit_fills_the_bar():
    assert "." not in plan_table.bar(PARTS, 10 * GIB)
    assert len(plan_table.bar(PARTS, 10 * GIB)) == plan_table.BAR


def test_the_table_adds_up():
    lines = plan_table.table([COLUMN, replace(COLUMN, stage="sft")], 20 * GIB)
    rows = {line[2:26].strip(): [float(x) for x in line[26:].split()] for line in lines[1:]}
    assert lines[0].split() == ["GiB", "dDPO", "dSFT"]
    assert rows["sum"] == [16.0, 16.0] and rows["free"] == [4.0, 4.0]
    parts = [value[0] for name, value in rows.items() if name not in ("sum", "free")]
    assert sum(parts) == pytest.approx(16.0)


def test_no_line_is_longer_than_a_terminal():
    lines = [
        *plan_table.table([COLUMN], 20 * GIB),
        *plan_table.bars([COLUMN], 20 * GIB),
        *plan_table.choices([COLUMN]),
        *plan_table.times([Duration("dDPO", "3,821 steps of 3.1 s", 11845.0)] * 2),
    ]
    assert max(map(len, lines)) < 80
    assert " ".join(" ".join(lines).split()).count(WORDS) == 2


@pytest.mark.parametrize(
    ("seconds", "size", "said"),
    [(4.2, -1, "5 % slower, 1.0 GiB less"), (3.6, 1, "10 % faster"), (4.01, 0, "as fast")],
)
def test_an_alternative_is_told_by_its_cost(seconds, size, said):
    parts = replace(PARTS, activations=PARTS.activations + size * GIB)
    other = replace(CHOSEN, step_seconds=seconds, parts=parts)
    assert said in plan_table.alternative(other, CHOSEN, "2048 tokens")


def test_times_are_summed_only_where_all_are_known():
    known = [Duration("dSFT", "", 3600.0), Duration("dDPO", "", 7200.0)]
    assert plan_table.times(known)[-1].split() == ["sum", "3.0", "h"]
    unknown = plan_table.times([known[0], Duration("dDPO", "", None)])
    assert unknown[-1].endswith("not known") and len(unknown) == 2


def test_quantities():
    assert [memory(n) for n in (17.44 * GIB, 6 * 2**20, 900)] == ["17.4 GiB", "6.0 MiB", "1 KiB"]
    assert [disk(n) for n in (4.36e9, 1.2e7, 900)] == ["4.4 GB", "12.0 MB", "1 kB"]
    assert [duration(n) for n in (5, 720, 12240)] == ["5 s", "12 min", "3.4 h"]
