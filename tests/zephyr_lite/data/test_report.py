"""The report: sums that add up over rows and over steps, and the rows that were left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zephyr_lite.data.report import NOT_FAULTS, STEPS, Report
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError, StorageError, VerificationError

REASONS = ("not_sampled", "empty_answer", "refusal", "contaminated", "tie", "nul_text", "duplicate")


def fill(report: Report, keep: int = 3) -> Report:
    """One row dropped for each of REASONS, alternating between two files, and `keep` kept."""
    for line, reason in enumerate(REASONS, start=1):
        row = Row(f"f{line % 2}.jsonl", line, {})
        report.read(row)
        report.drop(row, reason, "mt_bench" if reason == "contaminated" else "")
    for line in range(100, 100 + keep):
        row = Row("f0.jsonl", line, {})
        report.read(row)
        report.keep(row)
        report.note(row, "truecased_turns", 2)
    return report


def test_steps_follow_the_order_and_end_at_what_is_kept() -> None:
    report = fill(Report("drop"))
    report.check()
    assert report.as_dict()["steps"] == [
        {"step": "mixture", "before": 10, "after": 9},
        {"step": "soundness", "before": 9, "after": 7},
        {"step": "refusals", "before": 7, "after": 6},
        {"step": "decontamination", "before": 6, "after": 5},
        {"step": "pairs", "before": 5, "after": 3},
        {"step": "truecasing", "before": 3, "after": 3, "changed": {"truecased_turns": 6}},
    ]


def test_a_step_that_dropped_nothing_is_listed_when_it_was_on() -> None:
    report = Report()
    row = Row("a", 1, {})
    report.read(row)
    report.keep(row)
    assert [s["step"] for s in report.steps()] == ["soundness"]
    report.steps_on.add("decontamination")
    assert report.steps()[1] == {"step": "decontamination", "before": 1, "after": 1}


def test_only_faults_stop() -> None:
    assert set(NOT_FAULTS) == {
        "tie",
        "duplicate",
        "not_sampled",
        "excluded_source",
        "refusal",
        "contaminated",
    }
    report, row = Report("stop"), Row("a.jsonl", 7, {})
    for reason in NOT_FAULTS:
        report.read(row)
        report.drop(row, reason)
    report.check()
    with pytest.raises(DataError, match=r"a\.jsonl:7: empty_answer"):
        report.drop(row, "empty_answer")


def test_rejected_rows_are_written_in_order_with_their_detail(tmp_path: Path) -> None:
    report = fill(Report("drop"))
    path = tmp_path / "sub" / "rejected.jsonl"
    report.write_rejected(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == report.dropped_rows
    assert [(row["line"], row["reason"]) for row in rows] == list(enumerate(REASONS, start=1))
    assert [row.get("detail") for row in rows] == [None] * 3 + ["mt_bench"] + [None] * 3
    assert rows[0] == {"file": "f1.jsonl", "line": 1, "reason": "not_sampled"}
    assert "dropped_rows" not in report.as_dict()
    Report().write_rejected(path)
    assert path.read_text() == ""
    assert list(path.parent.iterdir()) == [path]


def test_rejected_rows_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"rejected\.jsonl"):
        Report().write_rejected(tmp_path / "rejected.jsonl")


def test_many_rejected_rows_take_little_memory() -> None:
    report = Report()
    for line in range(1, 50_001):
        report.drop(Row("a.jsonl", line, {}), "not_sampled")
    held = report._rejected
    assert sum(part.itemsize * len(part) for part in (held._lines, held._kind_of)) == 800_000
    assert report.dropped_rows[-1]["line"] == 50_000


@pytest.mark.parametrize("loss", ["row", "rejected"])
def test_sums_that_do_not_add_up_are_our_bug(loss: str) -> None:
    report = fill(Report("drop"))
    if loss == "row":
        report.read(Row("f0.jsonl", 1, {}))
    else:
        report.dropped["f0.jsonl"]["tie"] += 1
        report.rows_read["f0.jsonl"] += 1
    with pytest.raises(VerificationError):
        report.check()


def test_every_reason_belongs_to_one_step() -> None:
    reasons = [reason for reasons, _ in STEPS.values() for reason in reasons]
    assert len(reasons) == len(set(reasons))
