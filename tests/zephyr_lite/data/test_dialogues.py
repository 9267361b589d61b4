"""Dialogues: every shared file goes in whole, every fault is named, counts add up."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zephyr_lite.data.dialogues import load_dialogues, read_texts
from zephyr_lite.data.report import Report
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError, VerificationError

Write = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "d.jsonl", limit: int | None = None) -> Any:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return SimpleNamespace(path=str(tmp_path / name), split=None, limit=limit)

    return write


def turns(roles: str, **contents: str) -> list[dict[str, str]]:
    """`turns("sua", u="question")`: a dialogue by the first letters of its roles."""
    names = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": names[r], "content": contents.get(r, f"text of {r}")} for r in roles]


ROWS_SFT = {
    "alpaca": 3000,
    "arena_hard_gpt4": 384,
    "dolly_hhrlhf": 600,
    "gpteacher_codegen": 500,
    "gpteacher_roleplay": 1200,
    "gsm8k": 1200,
    "moss_multiturn": 177,
    "oasst_trees": 439,
    "sgd_multiturn": 1200,
    "topical_chat_multiturn": 800,
}


def test_every_shared_file_goes_in(shared_data: Path) -> None:
    for name, rows in ROWS_SFT.items():
        source = SimpleNamespace(
            path=str(shared_data / "sft" / f"{name}.jsonl"), split=None, limit=None
        )
        dialogues, report = load_dialogues([source])
        with open(source.path, encoding="utf-8") as lines:
            raw = [json.loads(line) for line in lines]
        assert [(d.id, d.messages) for d in dialogues] == [(r["id"], r["messages"]) for r in raw]
        assert report.as_dict()["rows_read"] == len(dialogues) == rows
        assert report.as_dict()["dropped"] == {}


FAULTY = {
    "empty_answer": turns("ua", a=" \n\t"),
    "empty_user": turns("suaua", u=""),
    "special_token_text": turns("ua", a="so </s>\n<|user|>\nforged"),
    "nul_text": turns("ua", u="a\0b"),
    "no_assistant_turn": turns("su"),
    "last_turn_not_assistant": turns("uau"),
}


@pytest.mark.parametrize("reason", FAULTY)
def test_faults_stop_or_are_counted(write: Write, reason: str) -> None:
    good = {"messages": turns("sua", s="")}
    source = write(good, {"messages": FAULTY[reason]}, {"messages": turns("uaua")})
    with pytest.raises(DataError) as error:
        load_dialogues([source])
    assert str(error.value) == f"{source.path}:2: {reason}"
    assert "data.on_fault=drop" in (error.value.hint or "")
    dialogues, report = load_dialogues([source], on_fault="drop")
    assert [len(d.messages) for d in dialogues] == [3, 4]
    assert report.as_dict()["dropped"] == {reason: 1}
    assert report.dropped_rows == [{"file": source.path, "line": 2, "reason": reason}]


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no key": ({"conversations": []}, "no key `messages`"),
    "preference row": ({"chosen": "a", "rejected": "b"}, "no key `messages`"),
    "text": ({"messages": "hi"}, "`messages` must be a list of messages, found str"),
    "null": ({"messages": None}, "found NoneType"),
    "no turns": ({"messages": []}, "found an empty list"),
    "turn is text": ({"messages": ["hi"]}, "`messages[0]` must be an object, found str"),
    "no role": ({"messages": [{"content": "x"}]}, "`messages[0].role` must be text, found no such"),
    "null content": (
        {"messages": [*turns("u"), {"role": "assistant", "content": None}]},
        "`messages[1].content` must be text, found NoneType",
    ),
    "unknown role": ({"messages": [{"role": "gpt", "content": "x"}]}, "is 'gpt'"),
    "two users": ({"messages": turns("uua")}, "`messages[1].role` is user, must be assistant"),
    "assistant first": ({"messages": turns("au")}, "`messages[0].role` is assistant, must be user"),
    "system in the middle": (
        {"messages": turns("suasua")},
        "`messages[3].role` is system, must be user",
    ),
    "system twice": ({"messages": turns("ssua")}, "`messages[1].role` is system, must be user"),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("on_fault", ["stop", "drop"])
def test_malformed_rows_always_stop(write: Write, case: str, on_fault: Any) -> None:
    row, words = MALFORMED[case]
    source = write({"messages": turns("ua")}, row)
    with pytest.raises(DataError) as error:
        load_dialogues([source], on_fault=on_fault)
    assert words in str(error.value)
    assert str(error.value).startswith(f"{source.path}:2: ")


def test_ids_depend_on_the_row_alone(write: Write) -> None:
    rows = [
        {"id": "x", "messages": turns("ua", a="1")},
        {"prompt_id": "p", "messages": turns("ua", a="2")},
        {"id": 7, "messages": turns("ua", a="3")},
        {"messages": turns("ua", a="4"), "source": "mine"},
    ]
    one, _ = load_dialogues([write(*rows)])
    two, _ = load_dialogues([write(*reversed(rows), name="e.jsonl")])
    assert [d.id for d in one] == [d.id for d in reversed(two)]
    assert [d.id for d in one[:3]] == ["x", "p", "7"]
    assert len(one[3].id) == 16
    assert [d.source for d in one] == ["d", "d", "d", "mine"]


def test_limits(write: Write) -> None:
    good, bad = {"messages": turns("ua")}, {"messages": turns("ua", a="")}
    one = write(good, bad, good, good, limit=3)
    two = write(good, good, name="e.jsonl")
    dialogues, report = load_dialogues([one, two], on_fault="drop")
    assert dict(report.rows_read) == {one.path: 3, two.path: 2}
    assert len(dialogues) == 4
    dialogues, report = load_dialogues([one, two], 2, on_fault="drop")
    assert dict(report.rows_read) == {one.path: 3}
    assert len(dialogues) == 2


def test_the_tokenizers_own_special_tokens_count(write: Write) -> None:
    source = write({"messages": turns("ua", a="<|im_end|>")})
    assert len(load_dialogues([source])[0]) == 1
    with pytest.raises(DataError, match="special_token_text"):
        load_dialogues([source], special_tokens=("<|im_end|>",))


def test_texts(write: Write) -> None:
    source = write({"text": "Once upon a time"}, {"text": " \n"}, {"text": "a <s>"}, {"text": "b"})
    documents, report = read_texts([source], on_fault="drop")
    assert [d.text for d in documents] == ["Once upon a time", "b"]
    assert report.reasons() == {"empty_text": 1, "special_token_text": 1}
    with pytest.raises(DataError, match=r"d\.jsonl:2: empty_text"):
        read_texts([source])
    for row, words in (({"texts": "a"}, "no key `text`"), ({"text": 3}, "must be text, found int")):
        with pytest.raises(DataError, match=words):
            read_texts([write(row, name="e.jsonl")], on_fault="drop")


def test_a_report_that_does_not_add_up_is_our_bug() -> None:
    report = Report("drop")
    row = Row("f", 1, {})
    report.read(row)
    with pytest.raises(VerificationError, match="1 rows read, 0 kept, 0 dropped"):
        report.check()
    report.drop(row, "tie")
    report.check()
    assert report.dropped == {"f": Counter(tie=1)}
