"""The oddest rows of the real files: what each is, and where the report says it landed.

A place is (file, line); nothing of the texts is written down here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.report import Report
from zephyr_lite.recipe import Source

KEPT = "kept"
Data = dict[str, Any]


class Case(NamedTuple):
    """What stands at a place, as a condition on the raw row, and what becomes of it."""

    file: str
    line: int
    holds: Callable[[Data], bool]
    lands: str
    noted: str = ""  # what the report counts besides, over the whole file


def is_empty(row: Data, index: int) -> bool:
    return not row["responses"][index]["text"].strip()


def are_equal(row: Data, *indices: int) -> bool:
    return len({row["responses"][i]["text"] for i in indices}) == 1


def scores(row: Data) -> list[float]:
    return sorted((answer["score"] for answer in row["responses"]), reverse=True)


def all_tie(row: Data) -> bool:
    return len(set(scores(row))) == 1


def has_system(row: Data, turns: int) -> bool:
    return row["history"][0]["role"] == "system" and len(row["history"]) == turns


def spells(row: Data, index: int, token: str) -> bool:
    return token in row["responses"][index]["text"]


def is_as_long(row: Data, index: int, characters: int) -> bool:
    return len(row["responses"][index]["text"]) == characters


def best_leads_by_a_millionth(row: Data) -> bool:
    return round(scores(row)[0] - scores(row)[1], 9) == 1e-6


def eight_at_a_millionth(row: Data) -> bool:
    return scores(row).count(1e-6) == 8


CASES = {
    "empty rejected of two": Case(
        "ultrafeedback_pairs.jsonl", 124, partial(is_empty, index=1), "empty_answer"
    ),
    "empty answer of two, voted down": Case(
        "pandalm_pairs.jsonl", 469, partial(is_empty, index=0), "empty_answer"
    ),
    "empty answer of eleven": Case(
        "alpaca_eval.jsonl", 14, partial(is_empty, index=5), KEPT, "answer_empty_answer"
    ),
    "two equal texts": Case(
        "ultrafeedback_pairs.jsonl", 15, lambda row: are_equal(row, 0, 1), "equal_texts"
    ),
    "best text twice among four": Case(
        "gsm8k_solutions.jsonl", 252, lambda row: are_equal(row, 0, 1), KEPT
    ),
    "equal texts among the others": Case(
        "alpaca_eval.jsonl", 29, lambda row: are_equal(row, 0, 1, 4, 8), KEPT
    ),
    "the same pair in an earlier row": Case(
        "dpo_multiturn_pairs.jsonl", 116, lambda row: len(row["responses"]) == 2, "duplicate"
    ),
    "two equal scores": Case("ultrafeedback_pairs.jsonl", 1, all_tie, "tie"),
    "four equal scores": Case("gsm8k_solutions.jsonl", 2, all_tie, "tie"),
    "best score drawn against its like": Case(
        "gsm8k_solutions.jsonl", 1, lambda row: scores(row)[0] == scores(row)[1], "tie"
    ),
    "a spelled </s>": Case(
        "ultrafeedback_pairs.jsonl",
        586,
        partial(spells, index=1, token="</s>"),
        "special_token_text",
    ),
    "one answer only": Case(
        "ultrafeedback_raw_readme_record.json",
        1,
        lambda row: len(row["completions"]) == 1,
        "too_few_responses",
    ),
    "a system turn and nothing before": Case(
        "dpo_multiturn_pairs.jsonl", 4, partial(has_system, turns=1), KEPT
    ),
    "a system turn before 12 more and a prompt of 4,405 tokens": Case(
        "dpo_multiturn_pairs.jsonl", 164, lambda row: len(row["history"]) == 12, KEPT
    ),
    "an answer of 8,158 tokens": Case(
        "alpaca_eval.jsonl", 404, partial(is_as_long, index=2, characters=24456), KEPT
    ),
    "an answer of 7,663 tokens, and a drawn tie": Case(
        "arena_bench.jsonl", 43, partial(is_as_long, index=10, characters=121525), "tie"
    ),
    "best by a millionth": Case("alpaca_eval.jsonl", 207, best_leads_by_a_millionth, KEPT),
    "eight scores of 1e-6": Case("alpaca_eval.jsonl", 2, eight_at_a_millionth, KEPT),
}


class Loaded(NamedTuple):
    """One file: its raw rows, its pairs by row id, its report."""

    rows: list[Data]
    pairs: dict[str, PreferencePair]
    report: Report


@pytest.fixture(scope="module")
def load(shared_data: Path) -> Callable[[str], Loaded]:
    """A file of real feedback under the default rule, read once."""
    loaded: dict[str, Loaded] = {}

    def load(name: str) -> Loaded:
        if name not in loaded:
            file = shared_data / "aif" / name
            text = file.read_text(encoding="utf-8")
            rows = [json.loads(text)] if name.endswith(".json") else _lines(text)
            source = Source(path=str(file))  # type: ignore[call-arg]
            pairs, report = load_pairs([source], on_fault="drop")
            loaded[name] = Loaded(rows, {pair.id: pair for pair in pairs}, report)
        return loaded[name]

    return load


def _lines(text: str) -> list[Data]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def test_there_are_eighteen() -> None:
    assert len(CASES) == 18
    assert len({(case.file, case.line) for case in CASES.values()}) == 18


@pytest.mark.parametrize("what", CASES)
def test_an_edge_case_lands_where_the_report_says(load: Callable[[str], Loaded], what: str) -> None:
    case = CASES[what]
    rows, pairs, report = load(case.file)
    row = rows[case.line - 1]
    assert case.holds(row), f"{case.file}:{case.line} is not {what}"
    landed = {d["line"]: d["reason"] for d in report.dropped_rows}
    assert landed.get(case.line, KEPT) == case.lands
    assert (row.get("id") in pairs) == (case.lands == KEPT)
    if case.noted:
        (noted,) = report.noted.values()
        assert noted[case.noted] > 0


def test_a_kept_edge_case_became_the_right_pair(load: Callable[[str], Loaded]) -> None:
    for case in CASES.values():
        if case.lands != KEPT:
            continue
        rows, pairs, _ = load(case.file)
        row = rows[case.line - 1]
        pair = pairs[row["id"]]
        answers = {answer["text"]: answer["score"] for answer in row["responses"]}
        assert pair.prompt[:-1] == row["history"]
        assert pair.chosen.strip() and pair.rejected.strip()
        assert pair.score_chosen == answers[pair.chosen] == max(answers.values())
        assert pair.score_rejected == answers[pair.rejected] < pair.score_chosen


def test_the_duplicate_is_one(load: Callable[[str], Loaded]) -> None:
    case = CASES["the same pair in an earlier row"]
    rows = load(case.file).rows
    first, again = rows[7], rows[case.line - 1]
    assert all(first[key] == again[key] for key in ("history", "prompt", "responses"))
    assert first["id"] != again["id"]


class Length(NamedTuple):
    """Tokens of (prompt, best answer, another) before and after truncation to 1024 / 512."""

    file: str
    line: int
    other: int
    before: tuple[int, int, int]
    after: tuple[int, int, int]


LENGTHS = {
    "an answer of 8,158 tokens": Length(
        "alpaca_eval.jsonl", 404, 2, before=(44, 108, 8158), after=(44, 108, 512)
    ),
    "an answer of 7,663 tokens": Length(
        "arena_bench.jsonl", 43, 10, before=(150, 479, 7663), after=(150, 479, 512)
    ),
    "a prompt of 4,405 tokens": Length(
        "dpo_multiturn_pairs.jsonl", 164, 1, before=(4405, 496, 361), after=(512, 496, 361)
    ),
}


@pytest.fixture(scope="module")
def tokenizer(shared_data: Path) -> ChatTokenizer:
    """Mistral's."""
    return load_tokenizer(shared_data / "models" / "mistral-7b-v0.1-tokenizer")


@pytest.mark.parametrize("what", LENGTHS)
def test_what_truncation_does_to_the_longest(
    load: Callable[[str], Loaded], tokenizer: ChatTokenizer, what: str
) -> None:
    """A long prompt loses its head but not its BOS; a long answer its end, `</s>` with it."""
    case = LENGTHS[what]
    row = load(case.file).rows[case.line - 1]
    prompt = [*row["history"], {"role": "user", "content": row["prompt"]}]
    best = max(row["responses"], key=lambda answer: answer["score"])["text"]
    pair = (prompt, best, row["responses"][case.other]["text"])
    whole = tokenizer.encode_pair(*pair, max_length=20_000, max_prompt_length=10_000)
    cut = tokenizer.encode_pair(*pair, max_length=1024, max_prompt_length=512)
    parts = [(whole.prompt, cut.prompt), (whole.chosen, cut.chosen), (whole.rejected, cut.rejected)]
    assert tuple(len(before) for before, _ in parts) == case.before
    assert tuple(len(after) for _, after in parts) == case.after
    flags = (cut.prompt_truncated, cut.chosen_truncated, cut.rejected_truncated)
    assert flags == tuple(len(before) > len(after) for before, after in parts)
    assert cut.prompt[0] == whole.prompt[0]
    assert cut.prompt[1:].tolist() == whole.prompt[1 - len(cut.prompt) :].tolist()
    for before, after in parts[1:]:
        assert after.tolist() == before[: len(after)].tolist()
        assert (after[-1] == tokenizer.eos_id) == (len(after) == len(before))
    assert cut.is_distinct
