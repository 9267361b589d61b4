"""The aif stage: what it writes of rows that it left out, and what makes it run anew."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

BENCHMARK = "Which three rivers of Europe flow north into the sea?"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


def scored(prompt: str, *scores: float, **extra: Any) -> dict[str, Any]:
    answers = [{"text": f"answer {i}", "score": score} for i, score in enumerate(scores)]
    return {"prompt": prompt, "responses": answers} | extra


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Rows of which most are left out, each for another reason, on both sides."""
    train = [
        scored("One?", 1, 2, source="flan"),
        scored("Two?", 1, 1),
        scored(BENCHMARK.upper(), 1, 2),
        scored("Three?", 1, 2, source="truthful_qa"),
        scored("One?", 1, 2, source="flan"),
        scored("", 1, 2),
    ]
    held_out = [scored("Four?", 1, 2), scored("Five?", 2, 2), scored(BENCHMARK, 1, 2)]
    return {
        "train": write(tmp_path / "train.jsonl", *train),
        "eval": write(tmp_path / "eval.jsonl", *held_out),
        "benchmark": write(tmp_path / "rivers.jsonl", {"prompt": BENCHMARK}),
    }


def overrides(files: dict[str, Path], *more: str) -> list[str]:
    sets = [
        f"data.feedback.train={{path: {files['train']}, weight: 2}}",
        f"data.feedback.eval={files['eval']}",
        f"data.decontaminate={files['benchmark']}",
        "data.on_fault=drop",
        *more,
    ]
    return [part for value in sets for part in ("--set", value)]


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_every_row_left_out_is_listed_with_side_place_and_reason(
    command, micro, home, tmp_path, files
):
    run = tmp_path / "run"
    status, text = command.run("aif", micro, "--run", str(run), *overrides(files), home=home)
    assert status == 0, text
    rejected = lines(run / "aif" / "rejected.jsonl")
    train, held_out = str(files["train"]), str(files["eval"])
    places = [(r["side"], r["file"], r["line"], r["reason"], r.get("detail")) for r in rejected]
    assert places == [
        ("train", train, 2, "tie", None),
        ("train", train, 3, "contaminated", "rivers"),
        ("train", train, 4, "excluded_source", "truthful_qa"),
        ("train", train, 5, "duplicate", None),
        ("train", train, 6, "empty_prompt", None),
        ("eval", held_out, 2, "tie", None),
    ]
    report = json.loads((run / "aif" / "report.json").read_text())
    for side, rows, kept in (("train", 6, 1), ("eval", 3, 2)):
        reasons = Counter(r["reason"] for r in rejected if r["side"] == side)
        assert report[side]["dropped"] == reasons
        assert (report[side]["rows_read"], report[side]["kept"]) == (rows, kept)
    assert report["train"]["files"][train]["noted"] == {"repeated": 1}
    assert [(s["step"], s["before"], s["after"]) for s in report["train"]["steps"]] == [
        ("mixture", 6, 5),
        ("soundness", 5, 4),
        ("decontamination", 4, 3),
        ("pairs", 3, 1),
    ]
    # Kept once, trained on twice; a benchmark's prompt may be held out.
    table = pq.read_table(run / "aif" / "pairs.parquet").to_pylist()
    asked = [(row["split"], json.loads(row["prompt"])[-1]["content"]) for row in table]
    assert asked == [("train", "One?")] * 2 + [("eval", "Four?"), ("eval", BENCHMARK)]
    assert (report["train_pairs"], report["held_out_pairs"]) == (2, 2)
    sealed = json.loads((run / "aif" / "MANIFEST.json").read_text())
    assert "rejected.jsonl" in json.dumps(sealed)


def test_nothing_left_out_is_an_empty_list(command, micro, home, tmp_path):
    run = tmp_path / "run"
    status, text = command.run("aif", micro, "--run", str(run), home=home)
    assert status == 0, text
    assert (run / "aif" / "rejected.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "change",
    [
        "the benchmark's bytes",
        "data.decontaminate=[]",
        "data.feedback.train={path: TRAIN, weight: 3}",
        "data.feedback.exclude_sources=[]",
    ],
)
def test_what_pairs_depend_on_is_part_of_the_stage(command, micro, home, tmp_path, files, change):
    run = ("aif", micro, "--run", str(tmp_path / "run"))
    assert command.run(*run, *overrides(files), home=home)[0] == 0
    status, text = command.run(*run, *overrides(files), home=home)
    assert (status, text.count("pairs")) == (0, 0), text
    more = []
    if "=" in change:
        more = [change.replace("TRAIN", str(files["train"]))]
    else:
        write(files["benchmark"], {"prompt": BENCHMARK + " And why?"})
    status, text = command.run(*run, *overrides(files, *more), home=home)
    assert status == 2
    assert "stage aif was run with another recipe or other data" in text
    assert "Traceback" not in text


def test_a_benchmark_that_is_missing_is_said(command, micro, home, tmp_path, files):
    files["benchmark"].unlink()
    status, text = command.run(
        "aif", micro, "--run", str(tmp_path / "run"), *overrides(files), home=home
    )
    assert status == 2
    assert "rivers.jsonl: no such file" in text
    assert "Traceback" not in text
