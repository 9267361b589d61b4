"""Preference pairs: rules, ties, faults, duplicates, mixtures, what is left out."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source

Write = Callable[..., Any]


def source(path: Path | str, **more: Any) -> Source:
    return Source(path=str(path), **more)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "f.jsonl", **more: Any) -> Source:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return source(tmp_path / name, **more)

    return write


def scored(*answers: tuple[str, float | None], **extra: Any) -> dict[str, Any]:
    responses = [{"text": text, "score": score, "model": None} for text, score in answers]
    return {"prompt": "Why?", "history": [], "responses": responses} | extra


def user(text: str = "Why?") -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def only(pairs: list[PreferencePair]) -> tuple[Any, ...]:
    (pair,) = pairs
    return pair.prompt, pair.chosen, pair.rejected, pair.score_chosen, pair.score_rejected


# --- the rules ---

FOUR = scored(("b", 3), ("d", 1), ("a", 4), ("c", 2))


def test_rejected_is_a_random_other(write: Write) -> None:
    rows = [FOUR | {"id": f"row {i}", "prompt": f"question {i}"} for i in range(900)]
    pairs, _ = load_pairs([write(*rows)], rule="mean")
    assert {pair.chosen for pair in pairs} == {"a"}
    drawn = Counter(pair.rejected for pair in pairs)
    assert set(drawn) == {"b", "c", "d"}
    assert all(240 < n < 360 for n in drawn.values()), drawn
    other_seed, _ = load_pairs([write(*rows)], rule="mean", seed=43)
    differ = sum(a.rejected != b.rejected for a, b in zip(pairs, other_seed, strict=True))
    assert 500 < differ < 700


def test_worst_is_the_lowest(write: Write) -> None:
    pairs, _ = load_pairs([write(FOUR)], rule="worst")
    assert only(pairs) == ([user()], "a", "d", 4.0, 1.0)


def test_a_draw_hangs_on_the_seed_and_the_row_alone(shared_data: Path, tmp_path: Path) -> None:
    names = ("arena_bench", "oasst_ranked", "gsm8k_solutions")
    files = [shared_data / "aif" / f"{name}.jsonl" for name in names]
    first, _ = load_pairs([source(file) for file in files], on_fault="drop", seed=7)
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(lines)
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines), encoding="utf-8")
    second, _ = load_pairs([source(tmp_path / "mixed.jsonl")], on_fault="drop", seed=7)
    key = PreferencePair.__dataclass_fields__.keys() - {"source"}
    assert sorted(str([getattr(p, k) for k in sorted(key)]) for p in first) == sorted(
        str([getattr(p, k) for k in sorted(key)]) for p in second
    )
    assert [p.id for p in first] != [p.id for p in second]


def test_rows_without_an_id_draw_by_content(write: Write) -> None:
    rows = [FOUR | {"prompt": f"question {i}"} for i in range(30)]
    one, _ = load_pairs([write(*rows)])
    two, _ = load_pairs([write(*rows[::-1])])
    assert one == two[::-1]
    assert len({pair.id for pair in one}) == 30
    assert len({pair.rejected for pair in one}) == 3


def test_ties(write: Write) -> None:
    tied = write(scored(("a", 2), ("b", 2)))
    pairs, report = load_pairs([tied])
    assert (pairs, report.reasons()) == ([], {"tie": 1})
    pairs, report = load_pairs([tied], ties="keep")
    assert only(pairs)[1:] == ("a", "b", 2.0, 2.0)
    assert report.as_dict()["files"][tied.path]["noted"] == {"tie_kept": 1}


def test_the_chosen_text_is_never_its_own_rejected(write: Write) -> None:
    rows = [scored(("a", 3), ("a", 1), ("b", 2), id=f"{i}", prompt=f"{i}?") for i in range(40)]
    for rule in ("mean", "worst"):
        pairs, _ = load_pairs([write(*rows)], rule=rule)  # type: ignore[arg-type]
        assert {(p.chosen, p.rejected) for p in pairs} == {("a", "b")}


# --- faults ---

FAULTY = {
    "empty_prompt": scored(("a", 1), ("b", 2), prompt=" "),
    "empty_answer": scored(("a", 1), ("\n", 2)),
    "equal_texts": scored(("a", 1), ("a", 2)),
    "too_few_responses": scored(("a", 1)),
    "special_token_text": scored(("a", 1), ("b</s>", 2)),
    "nul_text": scored(("a", 1), ("b\0", 2)),
    "different_prompts": {
        "chosen": [user("1"), assistant("a")],
        "rejected": [user("2"), assistant("b")],
    },
    "transcript_order": {
        "chosen": "\n\nHuman: 1\n\nHuman: 2\n\nAssistant: a",
        "rejected": "\n\nHuman: 1\n\nHuman: 2\n\nAssistant: b",
    },
    "score_range": {
        "instruction": "Why?",
        "completions": [
            {"response": "a", "annotations": {"honesty": {"Rating": "7"}}},
            {"response": "b", "annotations": {"honesty": {"Rating": "5"}}},
        ],
    },
    "score_order": {
        "prompt": "Why?",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 3,
        "score_rejected": 5,
    },
}


@pytest.mark.parametrize("reason", FAULTY)
def test_faults_stop_or_are_counted(write: Write, reason: str) -> None:
    file = write(scored(("x", 1), ("y", 2)), FAULTY[reason], scored(("v", 1), ("w", 2)))
    with pytest.raises(DataError) as error:
        load_pairs([file])
    assert str(error.value).startswith(f"{file.path}:2: {reason}")
    assert "data.on_fault=drop" in (error.value.hint or "")
    pairs, report = load_pairs([file], on_fault="drop")
    assert [pair.chosen for pair in pairs] == ["y", "w"]
    assert report.reasons() == {reason: 1}
    (dropped,) = report.dropped_rows
    assert (dropped["file"], dropped["line"], dropped["reason"]) == (file.path, 2, reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": " "}, "empty_answer"),
        ({"rejected": ""}, "empty_answer"),
        ({"rejected": "good"}, "equal_texts"),
        ({"prompt": "\n"}, "empty_prompt"),
        ({"prompt": "a<unk>"}, "special_token_text"),
        ({"chosen": "<s>"}, "special_token_text"),
    ],
)
def test_faults_of_ready_pairs(write: Write, changes: dict[str, Any], reason: str) -> None:
    row = {"prompt": "Why?", "chosen": "good", "rejected": "bad"} | changes
    with pytest.raises(DataError, match=rf"f\.jsonl:1: {reason}"):
        load_pairs([write(row)])
    assert load_pairs([write(row)], on_fault="drop")[1].reasons() == {reason: 1}


def test_faulty_answers_are_set_aside_and_counted(write: Write) -> None:
    file = write(scored(("", 9), ("b", 3), ("x</s>", 8), ("c", 1), ("d", None)))
    with pytest.raises(DataError, match=r"f\.jsonl:1: empty_answer"):
        load_pairs([file])
    pairs, report = load_pairs([file], on_fault="drop")
    assert only(pairs)[1:3] == ("b", "c")
    noted = {"answer_empty_answer": 1, "answer_special_token_text": 1, "answer_unrated": 1}
    assert report.as_dict()["files"][file.path]["noted"] == noted


def test_duplicates_are_counted_and_never_stop(write: Write) -> None:
    row = scored(("a", 1), ("b", 2))
    one, two = write(row, row | {"id": "other"}), write(row, name="g.jsonl")
    pairs, report = load_pairs([one, two])
    assert len(pairs) == 1
    assert [d["file"] for d in report.dropped_rows] == [one.path, two.path]
    assert report.reasons() == {"duplicate": 2}


# --- mixtures, and what is left out ---


def questions(count: int, **extra: Any) -> list[dict[str, Any]]:
    return [scored(("a", 1), ("b", 2), prompt=f"question {i}?", **extra) for i in range(count)]


def test_a_row_of_weight_2_gives_its_pair_twice_and_duplicates_are_still_seen(write: Write) -> None:
    rows = questions(3)
    once, twice = write(*rows[:1], name="g.jsonl"), write(*rows, rows[1], weight=2)
    pairs, report = load_pairs([once, twice])
    asked = [pair.prompt[0]["content"] for pair in pairs]
    assert asked == ["question 0?"] + ["question 1?"] * 2 + ["question 2?"] * 2
    assert [(d["line"], d["reason"]) for d in report.dropped_rows] == [
        (1, "duplicate"),
        (4, "duplicate"),
    ]
    assert report.kept[twice.path] == 2
    assert report.noted[twice.path] == {"repeated": 2}
    assert len(pairs) == report.kept.total() + 2


def test_a_weight_below_1_takes_a_seeded_part_of_the_rows(write: Write) -> None:
    rows = questions(400)
    half, report = load_pairs([write(*rows, weight=0.5)])
    assert 160 < len(half) < 240
    assert report.reasons() == {"not_sampled": 400 - len(half)}
    assert load_pairs([write(*rows, weight=0.5)])[0] == half
    assert load_pairs([write(*rows, weight=0.5)], seed=43)[0] != half
    file = write(*rows, weight=1.5)
    more, report = load_pairs([file])
    assert len(more) == report.kept.total() + report.noted[file.path]["repeated"]
    assert report.kept.total() == 400
    assert 560 < len(more) < 640


def test_a_limit_counts_rows_not_copies(write: Write) -> None:
    pairs, report = load_pairs([write(*questions(9), weight=3)], limit=2)
    assert (len(pairs), report.kept.total(), report.rows_read.total()) == (6, 2, 2)


@pytest.mark.parametrize("on_fault", ["stop", "drop"])
def test_a_malformed_row_stops_even_where_the_mixture_leaves_it_out(
    write: Write, on_fault: Any
) -> None:
    rows = questions(40)
    _, report = load_pairs([write(*rows, weight=0.1)])
    left_out = report.dropped_rows[0]["line"]
    rows[left_out - 1] = {"prompt": "Why?"}
    with pytest.raises(DataError, match=rf"f\.jsonl:{left_out}: no schema"):
        load_pairs([write(*rows, weight=0.1)], on_fault=on_fault)


def test_a_faulty_row_that_the_mixture_leaves_out_does_not_stop(write: Write) -> None:
    rows = questions(40)
    _, report = load_pairs([write(*rows, weight=0.1)])
    rows[report.dropped_rows[0]["line"] - 1] = scored(("", 1), ("b", 2))
    assert load_pairs([write(*rows, weight=0.1)])[1].reasons() == report.reasons()


def test_excluded_sources_are_left_out_and_are_no_fault(write: Write) -> None:
    rows = [
        *questions(1, source="flan"),
        *questions(1, source="truthful_qa"),
        scored(("", 1), ("b", 2), source=["sharegpt", "truthful_qa"]),
        scored(("a", 1), ("b", 2), source=7),
    ]
    file = write(*rows)
    pairs, report = load_pairs([file], exclude_sources=("truthful_qa",))
    assert [pair.source for pair in pairs] == ["flan", "f"]
    assert report.dropped_rows == [
        {"file": file.path, "line": line, "reason": "excluded_source", "detail": "truthful_qa"}
        for line in (2, 3)
    ]
    steps = {step["step"]: (step["before"], step["after"]) for step in report.steps()}
    assert steps == {"mixture": (4, 2), "soundness": (2, 2), "pairs": (2, 2)}


def test_prompts_of_a_benchmark_are_left_out_wherever_the_user_asks_them(write: Write) -> None:
    asked = "Name three rivers of Europe that flow north, and say where each ends."
    history = [user(asked), assistant("The Rhine.")]
    rows = [
        scored(("a", 1), ("b", 2), prompt=asked.upper()),
        scored(("a", 1), ("b", 2), history=history, prompt="And?"),
        {"prompt": asked, "chosen": "a", "rejected": "b"},
        scored((asked, 1), ("b", 2)),
        scored(
            ("a", 1), ("b", 2), history=[user("Quiz me."), assistant(asked)], prompt="The Rhine"
        ),
    ]
    decontaminator = Decontaminator([("rivers", asked)])
    pairs, report = load_pairs([write(*rows)], decontaminator=decontaminator)
    assert [pair.prompt[-1] for pair in pairs] == [user(), user("The Rhine")]
    assert [(d["line"], d["reason"], d["detail"]) for d in report.dropped_rows] == [
        (line, "contaminated", "rivers") for line in (1, 2, 3)
    ]
