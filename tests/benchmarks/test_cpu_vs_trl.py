"""cpu_vs_trl.py at toy size: its rows, and that no speed comes from a run that differs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="the rival is not installed (extra `dev`)")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOY = ["--toy", "--threads", "1", "--repeats", "1", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module", autouse=True)
def _benchmarks_on_path() -> Iterator[None]:
    """`python benchmarks/cpu_vs_trl.py` has its folder on sys.path; so have these tests."""
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from cpu_prepare import TOY, prepare

    folder = tmp_path_factory.mktemp("work")
    prepare(TOY, folder, None, None)
    return folder


@pytest.fixture(scope="module")
def toy_runs(toy_folder: Path) -> dict[Any, list[dict[str, Any]]]:
    """What both sides report of the same two DPO steps, done in this process."""
    import cpu_ours
    import cpu_trl
    from cpu_work import Case

    ours = Case("ours", "dpo", 8192, batch=2, steps=2, warmup=1)
    trl = replace(ours, side="trl", setting=2)
    return {
        ours: [cpu_ours.preference(ours, toy_folder)],
        trl: [cpu_trl.preference(trl, toy_folder)],
    }


def test_a_toy_run_writes_a_row_per_side_and_one_with_the_ratios(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "cpu_vs_trl.py"), *TOY, "--out", str(out)]
    command += ["--tasks", "dpo", "--batches", "2", "--engines", "native"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, trl, ratio = (json.loads(line) for line in out.read_text().splitlines())
    assert [row["side"] for row in (ours, trl, ratio)] == ["ours", "trl", "ratio"]
    for row in (ours, trl):
        assert row["toy"] is True
        assert row["pairs"] == 2  # one measured step
        assert row["pairs_per_second"] == pytest.approx(2 / row["seconds"], rel=1e-2)
        assert 0 < row["peak_rss_above_imports_gib"] < row["peak_rss_gib"]
        assert row["reference_seconds"] > 0
    assert ours["tokens"] == trl["tokens"]
    assert ratio["speed_ratio"] == pytest.approx(trl["seconds"] / ours["seconds"], rel=1e-2)
    assert ratio["loss_worst_relative"] < 1e-4
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_both_sides_see_the_same_ids_and_lose_the_same(toy_runs) -> None:
    from cpu_rows import check

    check(toy_runs)
    losses = [run["losses"] for (run,) in toy_runs.values()]
    assert abs(losses[0][0] - 0.6931) > 1e-3, "the first loss must depend on more than ln 2"


def test_packed_rows_agree_too(toy_folder: Path) -> None:
    import cpu_ours
    import cpu_trl
    from cpu_rows import check
    from cpu_work import Case

    ours = Case("ours", "sft", 64, batch=2, steps=2, warmup=1)
    trl = replace(ours, side="trl", setting=2)
    check(
        {
            ours: [cpu_ours.language(ours, toy_folder)],
            trl: [cpu_trl.language(trl, toy_folder)],
        }
    )


def test_a_wrong_beta_is_refused(toy_runs, toy_folder: Path) -> None:
    import cpu_trl
    from cpu_rows import DisagreementError, check

    ours, trl = toy_runs
    wrong = replace(trl, beta=0.2)
    with pytest.raises(DisagreementError, match="losses differ"):
        check({ours: toy_runs[ours], wrong: [cpu_trl.preference(wrong, toy_folder)]})


@pytest.mark.parametrize("change", ["digests", "losses"])
def test_other_ids_and_missing_steps_are_refused(toy_runs, change: str) -> None:
    from cpu_rows import DisagreementError, check

    ours, trl = toy_runs
    run = dict(toy_runs[trl][0])
    run[change] = ["0" * 64] if change == "digests" else [float("nan"), run["losses"][1]]
    with pytest.raises(DisagreementError):
        check({ours: toy_runs[ours], trl: [run]})


def test_toy_rows_are_refused_among_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    import cpu_vs_trl

    with pytest.raises(SystemExit) as exit_:
        cpu_vs_trl.parse([*TOY, "--out", str(BENCHMARKS / "results" / "cpu_vs_trl.jsonl")])
    assert exit_.value.code == 2
    assert "toy rows are no results" in capsys.readouterr().err
