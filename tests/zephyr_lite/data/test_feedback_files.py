"""Every file of real feedback goes in, and what comes out is counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.feedback import load_pairs
from zephyr_lite.recipe import Source


def source(path: Path) -> Source:
    return Source(path=str(path))  # type: ignore[call-arg]


def read(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        return [json.loads(text)]
    return [json.loads(line) for line in text.split("\n") if line.strip()]


# file: (rows, and what `worst` drops: it draws nothing, so these hang on no seed; what is noted).
EXPECTED: dict[str, tuple[int, dict[str, int], dict[str, int]]] = {
    "alpaca_eval.jsonl": (589, {}, {"answer_empty_answer": 17}),
    "arena_bench.jsonl": (216, {}, {}),
    "dpo_multiturn_pairs.jsonl": (218, {"duplicate": 3}, {}),
    "gsm8k_solutions.jsonl": (800, {"tie": 350}, {}),
    "hh_multiturn_pairs.jsonl": (211, {}, {}),
    "oasst_ranked.jsonl": (164, {}, {}),
    "pandalm_pairs.jsonl": (
        682,
        {"duplicate": 52, "tie": 67, "empty_answer": 32},
        {"answer_empty_answer": 32},
    ),
    "ultrafeedback_pairs.jsonl": (
        895,
        {"tie": 97, "equal_texts": 4, "empty_answer": 1, "special_token_text": 4},
        {"answer_empty_answer": 1, "answer_special_token_text": 4},
    ),
    "ultrafeedback_raw_readme_record.json": (1, {"too_few_responses": 1}, {}),
    "ultrafeedback_schema_arena_bench.jsonl": (
        80,
        {"too_few_responses": 80},
        {"answer_unrated": 320},
    ),
}
# The answers of the others carry one score; these carry UltraFeedback's.
ULTRAFEEDBACK = [
    name for name in EXPECTED if name.startswith("ultrafeedback_") and "pairs" not in name
]
SCORED = [name for name in EXPECTED if name not in ULTRAFEEDBACK]


def test_no_file_is_left_out(shared_data: Path) -> None:
    assert {file.name for file in (shared_data / "aif").iterdir()} == set(EXPECTED)


def count_by_hand(rows: list[dict[str, Any]]) -> dict[str, int]:
    """What becomes of each row under `worst`, written again without the package."""
    counts: Counter[str] = Counter()
    seen = []
    for row in rows:
        texts = [answer["text"] for answer in row["responses"]]
        control = [t for t in texts if "<s>" in t or "</s>" in t or "<unk>" in t]
        fine = [a for a in row["responses"] if a["text"].strip() and a["text"] not in control]
        if len(fine) < 2:
            counts["special_token_text" if control else "empty_answer"] += 1
        elif len({answer["text"] for answer in fine}) == 1:
            counts["equal_texts"] += 1
        elif len({answer["score"] for answer in fine}) == 1:
            counts["tie"] += 1
        else:
            top = max(answer["score"] for answer in fine)
            best = next(a["text"] for a in fine if a["score"] == top)
            rest = [a for a in fine if a["text"] != best]
            low = min(answer["score"] for answer in rest)
            pair = (row["history"], row["prompt"], best)
            pair += (next(a["text"] for a in rest if a["score"] == low),)
            counts["duplicate" if pair in seen else "kept"] += 1
            seen.append(pair)
    return {reason: n for reason, n in counts.items() if n}


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_of_every_file(shared_data: Path, name: str) -> None:
    rows, dropped, noted = EXPECTED[name]
    file = shared_data / "aif" / name
    pairs, report = load_pairs([source(file)], rule="worst", on_fault="drop")
    raw = read(file)
    assert report.as_dict()["rows_read"] == len(raw) == rows
    assert report.reasons() == dropped
    assert report.noted.get(str(file), {}) == noted
    assert len(pairs) == rows - sum(dropped.values())
    assert len(report.dropped_rows) == sum(dropped.values())
    steps = report.steps()
    assert (steps[0]["before"], steps[-1]["after"]) == (rows, len(pairs))
    if name in SCORED:
        assert count_by_hand(raw) == {"kept": len(pairs)} | dropped


@pytest.mark.parametrize("name", SCORED)
def test_pairs_of_every_scored_file_under_mean(shared_data: Path, name: str) -> None:
    file = shared_data / "aif" / name
    raw = {row["id"]: row for row in read(file)}
    pairs, report = load_pairs([source(file)], on_fault="drop")
    assert len(pairs) + sum(report.reasons().values()) == EXPECTED[name][0]
    for pair in pairs:
        row = raw[pair.id]
        assert pair.prompt == [*row["history"], {"role": "user", "content": row["prompt"]}]
        usable = [a for a in row["responses"] if a["text"].strip()]
        assert pair.score_chosen == max(a["score"] for a in usable if "</s>" not in a["text"])
        assert {"text": pair.rejected, "score": pair.score_rejected} in [
            {"text": a["text"], "score": a["score"]} for a in row["responses"]
        ]
        assert (pair.score_rejected or 0) < (pair.score_chosen or 0)


def test_the_whole_folder_as_one_mixture(shared_data: Path) -> None:
    """The same answers stand in two files: only their equal pairs are dropped besides."""
    files = [shared_data / "aif" / name for name in EXPECTED]
    alone, texts = {}, {}
    for file in files:
        pairs, report = load_pairs([source(file)], rule="overall", on_fault="drop")
        alone[str(file)] = report.dropped.get(str(file), Counter())
        texts[str(file)] = {json.dumps([p.prompt, p.chosen, p.rejected]) for p in pairs}
    pairs, report = load_pairs([source(file) for file in files], rule="overall", on_fault="drop")
    assert report.rows_read == {str(file): EXPECTED[file.name][0] for file in files}
    assert report.rows_read.total() == 3856
    arena, schema = (
        str(files[list(EXPECTED).index(n)])
        for n in ("arena_bench.jsonl", "ultrafeedback_schema_arena_bench.jsonl")
    )
    shared = len(texts[arena] & texts[schema])
    assert shared == 5
    alone[schema] += Counter(duplicate=shared)
    assert {name: report.dropped.get(name, Counter()) for name in alone} == alone
    assert len(pairs) == len(set().union(*texts.values())) == 3045
    assert report.kept.total() + len(report.dropped_rows) == 3856


def test_counts_of_the_ultrafeedback_schema_file(shared_data: Path) -> None:
    """No aspect was rated there, so its 53 scores of 10 cannot be checked."""
    file = shared_data / "aif" / "ultrafeedback_schema_arena_bench.jsonl"
    raw = read(file)
    tens = sum(c["overall_score"] == 10 for row in raw for c in row["completions"])
    pairs, report = load_pairs([source(file)], rule="overall")
    assert (report.as_dict()["rows_read"], len(pairs), report.reasons()) == (80, 66, {"tie": 14})
    assert report.noted[str(file)] == {"overall_10_unchecked": tens} == {"overall_10_unchecked": 53}
    best = {row["instruction"]: max(c["overall_score"] for c in row["completions"]) for row in raw}
    assert all(pair.score_chosen == best[pair.prompt[0]["content"]] for pair in pairs)
    pairs, report = load_pairs([source(file)], rule="overall", ties="keep")
    assert (len(pairs), report.noted[str(file)]["tie_kept"]) == (80, 14)


# What is left of a file, and what AlpacaEval's and MT-Bench's prompts take from it. PandaLM and
# AlpacaEval both ask the questions of self-instruct's evaluation set.
CONTAMINATED = {
    "alpaca_eval.jsonl": (0, {"contaminated": 589}),
    "arena_bench.jsonl": (215, {"contaminated": 1}),
    "pandalm_pairs.jsonl": (1, {"contaminated": 649, "empty_answer": 32}),
    "ultrafeedback_pairs.jsonl": (789, EXPECTED["ultrafeedback_pairs.jsonl"][1]),
}


def test_benchmarks_are_found_in_the_real_prompts(shared_data: Path) -> None:
    names = ("alpaca_eval_zephyr_7b_beta.jsonl", "mt_bench/question.jsonl")
    decontaminator = Decontaminator.load([source(shared_data / "eval" / name) for name in names])
    for name, (kept, dropped) in CONTAMINATED.items():
        file = source(shared_data / "aif" / name)
        pairs, report = load_pairs(
            [file], rule="worst", on_fault="drop", decontaminator=decontaminator
        )
        assert (name, len(pairs), report.reasons()) == (name, kept, dropped)
    prompts = {row["prompt"] for row in read(shared_data / "eval" / names[0])}
    raw = read(shared_data / "aif" / "alpaca_eval.jsonl")
    assert sum(row["prompt"] in prompts for row in raw) == 589
