"""Projections: they are labelled, they are what the formula says now, and a derivation agrees."""

from __future__ import annotations

import json

import pytest

import projections
from zephyr_lite.plan.gpus import gpu_named
from zephyr_lite.plan.roofline import micro_batch_seconds
from zephyr_lite.plan.setting import Cut
from zephyr_lite.plan.work import documents_work, pairs_work

# Derived by hand before there was a formula in code. SFT at 2048 tokens and r 16, tokens/s: all
# layers keep at 4096 tokens a micro-batch; lean at 8192. DPO of r 128, pairs/s, at about 4096:
# prompts of 150 and answers of 330; 500 and 250.
DERIVED = {
    "3090": (1780, 1330, 2.21, 1.78),
    "4090": (3780, 2880, 4.68, 3.77),
    "5090": (5010, 3790, 6.23, 5.02),
    "A10G": (1680, 1270, 2.08, 1.68),
    "L4": (1640, 1270, 2.02, 1.63),
    "H200": (20700, 15800, 25.6, 20.6),
}


@pytest.mark.parametrize("card", DERIVED)
def test_the_formula_gives_what_was_derived(card: str) -> None:
    gpu, g = gpu_named(card), projections.MISTRAL_7B

    def rate(units: int, setting, work, keep: int) -> float:
        return units / micro_batch_seconds(g, setting, Cut(work.tokens, keep), work, gpu)

    dpo = projections.Setting("dpo", trained=128, frozen=0)
    found = (
        rate(4096, projections.SFT, documents_work([2048] * 2), 32),
        rate(8192, projections.SFT, documents_work([2048] * 4), 0),
        rate(5, dpo, pairs_work([(150, 330, 330)] * 5), 32),
        rate(4, dpo, pairs_work([(500, 250, 250)] * 4), 32),
    )
    assert found == pytest.approx(DERIVED[card], rel=0.02)


def test_rows_projected_differ_from_the_derivation_by_what_is_named() -> None:
    """The frozen adapter and the optimizer's step: below 1.5 %, and never faster."""
    rates = {(r["gpu"]["name"], r["task"]): r["value"] for r in projections.rows() if _keeps(r)}
    for card, (sft, _, dpo, _) in DERIVED.items():
        if card == "H200":
            continue
        name = gpu_named(card).name
        assert rates[name, "SFT, 2048"] == pytest.approx(sft, rel=0.01)
        assert 0.985 <= rates[name, "DPO, 150 + 330 + 330"] / dpo <= 1.005


def _keeps(row) -> bool:
    return row["policy"] == "keep"


def test_committed_rows_are_what_the_formula_gives_and_say_what_they_are() -> None:
    committed = [json.loads(line) for line in projections.RESULTS.read_text().splitlines()]
    assert committed == json.loads(json.dumps(list(projections.rows()))), (
        "python benchmarks/projections.py writes them anew"
    )
    assert all(row["kind"] == "projection" and row["formula"] for row in committed)
    assert len(committed) == len(projections.CARDS) * len(projections.TASKS) * 2


def test_the_table_says_projection_in_its_heading_and_has_a_line_per_card() -> None:
    heading, _, *lines = projections.table(list(projections.rows())).splitlines()
    assert heading.startswith("### PROJECTION, not measured")
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        gpu_named(card).name for card in projections.CARDS
    ]
    assert "| RTX 4090 | 3775 |" in lines[2]
