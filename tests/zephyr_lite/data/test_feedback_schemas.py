"""Schemas of AI feedback: what each becomes, and which rows are refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.data.answers import ReadyPair
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.feedback_rows import parse_feedback
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source

Write = Callable[..., Source]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any) -> Source:
        file = tmp_path / "f.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(file))  # type: ignore[call-arg]

    return write


def scored(*answers: tuple[str, Any], **extra: Any) -> dict[str, Any]:
    responses = [{"text": text, "score": score, "model": None} for text, score in answers]
    return {"prompt": "Why?", "history": [], "responses": responses} | extra


def user(text: str = "Why?") -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def only(pairs: list[PreferencePair]) -> tuple[Any, ...]:
    (pair,) = pairs
    return pair.prompt, pair.chosen, pair.rejected, pair.score_chosen, pair.score_rejected


def ranked(*ranks: Any) -> dict[str, Any]:
    responses = [{"text": f"rank {rank}", "rank": rank} for rank in ranks]
    return {"prompt": "Why?", "responses": responses}


MALFORMED: dict[str, tuple[Any, str]] = {
    "dialogue": ({"messages": []}, "no schema of AI feedback has these keys: messages"),
    "no prompt": ({"responses": []}, "no key `prompt`"),
    "prompt type": (scored(("a", 1), ("b", 2), prompt=3), "`prompt` must be text, found int"),
    "no score": (
        {"prompt": "p", "responses": [{"text": "a"}]},
        "no key `responses[0].score`; there is text",
    ),
    "no text": ({"prompt": "p", "responses": [{"score": 1}]}, "no key `responses[0].text`"),
    "score type": (scored(("a", "high")), "`responses[0].score` must be a finite number"),
    "score bool": (scored(("a", True)), "must be a finite number, found True"),
    "score overflow": (scored(("a", "1e999")), "must be a finite number"),
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
    "score and no score": (
        {"prompt": "p", "responses": [{"text": "a", "score": 1}, {"text": "b", "rank": 1}]},
        "no key `responses[1].score`",
    ),
    "rank type": (ranked("first", 2), "`responses[0].rank` must be a finite number, found 'first'"),
    "rank missing": (ranked(1, None), "`responses[1].rank` must be a finite number, found None"),
    "rank below 0": (ranked(-1, 2), "`responses[0].rank` must be 0 or above, found -1"),
    "no rank": (
        {"prompt": "p", "answers": [{"answer": "a", "model": "m"}]},
        "no key `answers[0].rank`; there is answer, model",
    ),
    "answers type": ({"prompt": "p", "answers": "a"}, "`answers` must be a list, found str"),
    "answer type": ({"prompt": "p", "answers": ["a"]}, "`answers[0]` must be an object"),
    "too few ranks": (
        {"prompt": "p", "responses": ["a", "b"], "ranks": [1]},
        "`ranks` must rank every response, found 1 ranks for 2 responses",
    ),
    "ranks type": (
        {"prompt": "p", "responses": ["a", "b"], "ranking": "ab"},
        "`ranking` must be a list, found str",
    ),
    "rank of a text": (
        {"prompt": "p", "responses": ["a", "b"], "ranking": [1, "N/A"]},
        "`ranking[1]` must be a finite number, found 'N/A'",
    ),
    "prompt that ends with the assistant": (
        ranked(1, 2) | {"prompt": [user(), assistant("x")]},
        "the prompt's last role is assistant, must be user",
    ),
    "two plain texts": (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        "no key `prompt`, and `chosen` does not begin with 'Human:'",
    ),
    "a transcript and a text": (
        {"chosen": "\n\nHuman: 1\n\nAssistant: a", "rejected": "b"},
        "no key `prompt`, and `rejected` does not begin with 'Human:'",
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
    "transcripts": (
        {
            "chosen": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: Why?\n\nAssistant: a",
            "rejected": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: Why?\n\nAssistant: b",
        },
        [user("1"), assistant("2"), user()],
    ),
    "transcript prompt": (
        {
            "prompt": "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: Why?\n\nAssistant:",
            "chosen": "a",
            "rejected": "b",
        },
        [user("1"), assistant("2"), user()],
    ),
    "argilla": (
        {
            "prompt": "Why?",
            "chosen": [user(), assistant("a")],
            "chosen-rating": 5.0,
            "rejected": [user(), assistant("b")],
            "rejected-rating": 4.5,
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
    scores = {"binarized": (8.5, 8.5), "argilla": (5.0, 4.5)}.get(case, (None, None))
    assert only(pairs) == (prompt, "a", "b", *scores)
    assert pairs[0].id == row.get("prompt_id", pairs[0].id)
    # A published pair is not dropped for its equal scores, but it is counted.
    noted = {"tie_kept": 1} if case == "binarized" else {}
    assert next(iter(report.as_dict()["files"].values()))["noted"] == noted


# --- ranks ---

RANKED: dict[str, dict[str, Any]] = {
    "ranks from 0": ranked(2, 0, 1),
    "ranks as text": ranked("2", "0", "1"),
    "texts and ranks": {
        "prompt": "Why?",
        "responses": ["rank 2", "rank 0", "rank 1"],
        "ranks": [2, 0, 1],
    },
    "texts and ranking": {
        "prompt": [user()],
        "responses": ["rank 2", "rank 0", "rank 1"],
        "ranking": [2.0, 0.0, 1.0],
    },
    "nectar": {
        "prompt": "\n\nHuman: Why?\n\nAssistant: ",
        "answers": [{"answer": f"rank {r}", "model": "m", "rank": r} for r in (2, 0, 1)],
        "turns": 1,
        "source": ["lmsys-chat-1m"],
        "good_natured": True,
    },
}


@pytest.mark.parametrize("case", RANKED)
def test_the_lowest_rank_is_the_best(write: Write, case: str) -> None:
    pairs, _ = load_pairs([write(RANKED[case])], rule="worst")
    assert only(pairs) == ([user()], "rank 0", "rank 2", 0.0, -2.0)
    assert str(pairs[0].score_chosen) == "0.0"  # not the -0.0 of a negated rank
    drawn = {load_pairs([write(RANKED[case])], seed=seed)[0][0].rejected for seed in range(20)}
    assert drawn == {"rank 1", "rank 2"}


def test_equal_ranks_tie(write: Write) -> None:
    file = write({"prompt": "Why?", "responses": [{"text": t, "rank": 1} for t in "ab"]})
    assert load_pairs([file])[1].reasons() == {"tie": 1}


def test_a_score_goes_before_a_rank(write: Write) -> None:
    responses = [{"text": "a", "score": 1, "rank": 1}, {"text": "b", "score": 2, "rank": 2}]
    pairs, _ = load_pairs([write({"prompt": "Why?", "responses": responses})])
    assert only(pairs)[1:] == ("b", "a", 2.0, 1.0)


def test_history_and_a_prompt_of_messages_join(write: Write) -> None:
    row = ranked(1, 2) | {"history": [SYSTEM, user("1"), assistant("2")], "prompt": [user()]}
    pairs, _ = load_pairs([write(row)])
    assert pairs[0].prompt == [SYSTEM, user("1"), assistant("2"), user()]


# --- transcripts ---


def test_only_a_prompt_that_ends_as_a_transcript_is_one() -> None:
    for text in ("\n\nHuman: 1", "\n\nHuman: 1\n\nAssistant: 2", "Assistant:", "x\n\nAssistant:"):
        row = Row("f", 1, {"prompt": text, "chosen": "a", "rejected": "b"})
        assert parse_feedback(row, "mean").prompt == [user(text)]


def test_a_mark_inside_a_turn_begins_no_turn() -> None:
    said = "I wrote:\nHuman: hello\nAssistant: hi"
    start = f"\n\nHuman: {said}\n\nAssistant: "
    pair = parse_feedback(Row("f", 1, {"chosen": f"{start}a", "rejected": f"{start}b"}), "mean")
    assert isinstance(pair, ReadyPair)
    assert (pair.prompt, pair.chosen.text, pair.rejected.text) == ([user(said)], "a", "b")


def test_real_dialogues_survive_being_written_as_transcripts(shared_data: Path) -> None:
    """hh_multiturn_pairs came from such transcripts; written as they were, they give the same."""
    file = shared_data / "aif" / "hh_multiturn_pairs.jsonl"
    names = {"user": "Human", "assistant": "Assistant"}
    for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        data = json.loads(text)
        turns = [*data["history"], user(data["prompt"])]
        prompt = "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)
        chosen, rejected = sorted(data["responses"], key=lambda r: -r["score"])
        texts = {
            "chosen": f"{prompt}\n\nAssistant: {chosen['text']}",
            "rejected": f"{prompt}\n\nAssistant: {rejected['text']}",
        }
        pair = parse_feedback(Row("hh", line, texts), "mean")
        assert isinstance(pair, ReadyPair)
        found = [pair.prompt, pair.chosen.text, pair.rejected.text]
        wanted = [turns, chosen["text"], rejected["text"]]
        assert found == wanted, f"{file.name}:{line}"


TRANSCRIPTS = {
    "\n\nHuman: 1\n\nAssistant: a\n\nHuman: 2": "transcript_order",  # the person has the last word
    "\n\nHuman: 1\n\nHuman: 1\n\nAssistant: a": "transcript_order",
    "\n\nHuman: 1\n\nAssistant: a\n\nAssistant: b": "transcript_order",
    "\n\nHuman: 1\n\nAssistant: a\n\nHuman: 2\n\nAssistant: b": "different_prompts",
    "\n\nHuman: 2\n\nAssistant: a": "different_prompts",
    "\n\nHuman: 1\n\nAssistant:": "empty_answer",
    "\n\nHuman: 1\n\nAssistant: a ": "equal_texts",
}


@pytest.mark.parametrize("text", TRANSCRIPTS)
def test_unsound_transcripts_are_faults_with_a_name(write: Write, text: str) -> None:
    sound = "\n\nHuman: 1\n\nAssistant: a"
    for row in ({"chosen": sound, "rejected": text}, {"chosen": text, "rejected": sound}):
        with pytest.raises(DataError, match=rf"f\.jsonl:1: {TRANSCRIPTS[text]}"):
            load_pairs([write(row)])
        _, report = load_pairs([write(row)], on_fault="drop")
        assert report.reasons() == {TRANSCRIPTS[text]: 1}
