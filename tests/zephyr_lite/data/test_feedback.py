"""Preference pairs: rules, ties, schemas, and counts over the shared files counted by hand."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.feedback_rows import ScoredAnswers, parse_feedback
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError

Write = Callable[..., Any]


def source(path: Path | str) -> Any:
    return SimpleNamespace(path=str(path), split=None, limit=None)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "f.jsonl") -> Any:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return source(tmp_path / name)

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
    assert report.dropped_rows == [{"file": file.path, "line": 2, "reason": reason}]


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


MALFORMED: dict[str, tuple[Any, str]] = {
    "dialogue": ({"messages": []}, "no schema of AI feedback has these keys: messages"),
    "no prompt": ({"responses": []}, "no key `prompt`"),
    "prompt type": (scored(("a", 1), ("b", 2), prompt=3), "`prompt` must be text, found int"),
    "no score": (
        {"prompt": "p", "responses": [{"text": "a"}]},
        "no key `responses[0].score`; there is text",
    ),
    "no text": ({"prompt": "p", "responses": [{"score": 1}]}, "no key `responses[0].text`"),
    "score type": (scored(("a", "high")), "`responses[0].score` must be a finite number"),  # type: ignore[arg-type]
    "score bool": (scored(("a", True)), "must be a finite number, found True"),
    "score overflow": (scored(("a", "1e999")), "must be a finite number"),  # type: ignore[arg-type]
    "responses type": (scored() | {"responses": "a"}, "`responses` must be a list, found str"),
    "response type": (scored() | {"responses": ["a"]}, "`responses[0]` must be an object"),
    "history order": (
        scored(("a", 1), history=[user()]),
        "`history + prompt[1].role` is user, must be assistant",
    ),
    "history type": (scored(("a", 1), history="x"), "`history` must be a list"),
    "no instruction": ({"completions": []}, "no key `instruction`"),
    "rating": (
        {
            "instruction": "p",
            "completions": [{"response": "a", "annotations": {"honesty": {"Rating": "good"}}}],
        },
        "`completions[0].annotations.honesty.Rating` must be a finite number",
    ),
    "texts without prompt": ({"chosen": "a", "rejected": "b"}, "no key `prompt`"),
    "mixed": ({"prompt": "p", "chosen": "a", "rejected": [assistant("b")]}, "`rejected` must be"),
    "other prompt": (
        {"chosen": [user("1"), assistant("a")], "rejected": [user("2"), assistant("b")]},
        "answer different prompts",
    ),
    "ends with user": (
        {"chosen": [user()], "rejected": [user()]},
        "no key `prompt`",
    ),
    "prompt ends with assistant": (
        {
            "prompt": [user(), assistant("x")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
        "`chosen[2].role` is assistant, must be user",
    ),
    "prompt list, texts": (
        {"prompt": [user(), assistant("x")], "chosen": "a", "rejected": "b"},
        "the prompt's last role is assistant, must be user",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("on_fault", ["stop", "drop"])
def test_malformed_rows_always_stop(write: Write, case: str, on_fault: Any) -> None:
    row, words = MALFORMED[case]
    file = write(scored(("x", 1), ("y", 2)), row)
    with pytest.raises(DataError) as error:
        load_pairs([file], on_fault=on_fault)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{file.path}:2: ")


# --- the schemas ---

SYSTEM = {"role": "system", "content": "Be kind."}
READY: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
    "texts": ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, [user()]),
    "prompt messages, texts": (
        {"prompt": [SYSTEM, user()], "chosen": "a", "rejected": "b"},
        [SYSTEM, user()],
    ),
    "explicit": (
        {"prompt": [SYSTEM, user()], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [SYSTEM, user()],
    ),
    "implicit": (
        {
            "chosen": [user("1"), assistant("2"), user(), assistant("a")],
            "rejected": [user("1"), assistant("2"), user(), assistant("b")],
        },
        [user("1"), assistant("2"), user()],
    ),
    "binarized": (
        {
            "prompt": "Why?",
            "prompt_id": "f0",
            "chosen": [user(), assistant("a")],
            "rejected": [user(), assistant("b")],
            "messages": [user(), assistant("a")],
            "score_chosen": 8.5,
            "score_rejected": 8.5,
        },
        [user()],
    ),
    "prompt text, answers": (
        {"prompt": "Why?", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        [user()],
    ),
}


@pytest.mark.parametrize("case", READY)
def test_ready_pairs_are_used_as_they_are(write: Write, case: str) -> None:
    row, prompt = READY[case]
    pairs, report = load_pairs([write(row)])
    score = 8.5 if case == "binarized" else None
    assert only(pairs) == (prompt, "a", "b", score, score)
    assert pairs[0].id == row.get("prompt_id", pairs[0].id)
    # A published pair is not dropped for its equal scores, but it is counted.
    noted = {"tie_kept": 1} if case == "binarized" else {}
    assert next(iter(report.as_dict()["files"].values()))["noted"] == noted


def ultrafeedback(ratings: list[list[Any]], overall: list[Any]) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    completions = [
        {
            "model": f"m{i}",
            "custom_system_prompt": f"prompt {i}",
            "response": "abcd"[i],
            "annotations": {
                aspect: {"Rating": rating, "Rationale": "because"}
                for aspect, rating in zip(aspects, row, strict=True)
            },
            "overall_score": overall[i],
            "fine-grained_score": 99.0,
        }
        for i, row in enumerate(ratings)
    ]
    return {"instruction": "Why?", "source": "flan", "completions": completions}


def test_ultrafeedback_by_mean_and_by_overall(write: Write) -> None:
    # Means: a 4, b 4.5 over the two aspects that are rated, c 1, d not rated at all.
    ratings = [["4"] * 4, ["5", "4", "N/A", "N/A"], ["1"] * 4, ["N/A", "N/A", None, "N/A"]]
    row = ultrafeedback(ratings, [9.0, 2, "1.5", 10])
    row["completions"][3].pop("fine-grained_score")
    assert only(load_pairs([write(row)], rule="worst")[0]) == ([user()], "b", "c", 4.5, 1.0)
    chosen = load_pairs([write(row)], rule="overall")[0][0]
    assert (chosen.chosen, chosen.score_chosen, chosen.source) == ("d", 10.0, "flan")
    drawn = set()
    for seed in range(40):
        pairs, report = load_pairs([write(row)], rule="mean", seed=seed)
        drawn.add((pairs[0].chosen, pairs[0].rejected))
    assert drawn == {("b", "a"), ("b", "c")}
    assert next(iter(report.noted.values())) == {"answer_unrated": 1}


def test_the_published_ultrafeedback_record(shared_data: Path) -> None:
    """One completion is printed in the README: rated (2 + 3 + 3 + 3) / 4, and no pair."""
    file = source(shared_data / "aif" / "ultrafeedback_raw_readme_record.json")
    with pytest.raises(DataError, match=r"json:1: too_few_responses: 1 of 1 answers can be used$"):
        load_pairs([file])
    record = json.loads(Path(file.path).read_text(encoding="utf-8"))
    record["completions"].append({"response": "no", "annotations": {"honesty": {"Rating": "2.5"}}})
    assert load_pairs([file], on_fault="drop")[1].as_dict()["dropped"] == {"too_few_responses": 1}
    parsed = parse_feedback(Row("f", 1, record), "mean")
    assert isinstance(parsed, ScoredAnswers)
    assert [answer.score for answer in parsed.answers] == [2.75, 2.5]


def test_a_rule_that_the_file_has_no_scores_for_says_so(shared_data: Path) -> None:
    file = source(shared_data / "aif" / "ultrafeedback_schema_arena_bench.jsonl")
    with pytest.raises(DataError, match="4 without a rating under rule 'mean'") as error:
        load_pairs([file])
    assert "data.feedback.rule" in (error.value.hint or "")


# --- the shared files ---

# file: rows, and what `worst` drops (it draws nothing, so these hang on no seed).
EXPECTED: dict[str, tuple[int, dict[str, int]]] = {
    "alpaca_eval": (589, {}),
    "arena_bench": (216, {}),
    "dpo_multiturn_pairs": (218, {"duplicate": 3}),
    "gsm8k_solutions": (800, {"tie": 350}),
    "hh_multiturn_pairs": (211, {}),
    "oasst_ranked": (164, {}),
    "pandalm_pairs": (682, {"duplicate": 52, "tie": 67, "empty_answer": 32}),
    "ultrafeedback_pairs": (
        895,
        {"tie": 97, "equal_texts": 4, "empty_answer": 1, "special_token_text": 4},
    ),
}


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
def test_counts_of_every_shared_file(shared_data: Path, name: str) -> None:
    rows, dropped = EXPECTED[name]
    file = shared_data / "aif" / f"{name}.jsonl"
    pairs, report = load_pairs([source(file)], rule="worst", on_fault="drop")
    raw = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert report.as_dict()["rows_read"] == len(raw) == rows
    assert report.reasons() == dropped
    assert count_by_hand(raw) == {"kept": len(pairs)} | dropped
    assert len(report.dropped_rows) == sum(dropped.values())


@pytest.mark.parametrize("name", EXPECTED)
def test_pairs_of_every_shared_file_under_mean(shared_data: Path, name: str) -> None:
    file = shared_data / "aif" / f"{name}.jsonl"
    raw = {r["id"]: r for r in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    pairs, report = load_pairs([source(file)], on_fault="drop")
    assert len(pairs) + sum(report.reasons().values()) == EXPECTED[name][0]
    for pair in pairs:
        row = raw[pair.id]
        assert pair.prompt == [*row["history"], user(row["prompt"])]
        usable = [a for a in row["responses"] if a["text"].strip()]
        assert pair.score_chosen == max(a["score"] for a in usable if "</s>" not in a["text"])
        assert {"text": pair.rejected, "score": pair.score_rejected} in [
            {"text": a["text"], "score": a["score"]} for a in row["responses"]
        ]
        assert (pair.score_rejected or 0) < (pair.score_chosen or 0)


def test_counts_of_the_ultrafeedback_schema_file(shared_data: Path) -> None:
    file = source(shared_data / "aif" / "ultrafeedback_schema_arena_bench.jsonl")
    pairs, report = load_pairs([file], rule="overall")
    assert (report.as_dict()["rows_read"], len(pairs), report.reasons()) == (80, 66, {"tie": 14})
    raw = [json.loads(line) for line in Path(file.path).read_text(encoding="utf-8").splitlines()]
    best = {row["instruction"]: max(c["overall_score"] for c in row["completions"]) for row in raw}
    assert all(pair.score_chosen == best[pair.prompt[0]["content"]] for pair in pairs)
    pairs, report = load_pairs([file], rule="overall", ties="keep")
    assert (len(pairs), next(iter(report.noted.values()))) == (80, {"tie_kept": 14})
