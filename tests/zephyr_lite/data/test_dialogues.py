"""Dialogues: every schema and every shared file goes in, every fault is named, counts add up."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.dialogues import (
    Dialogue,
    DialogueRule,
    iter_dialogues,
    load_dialogues,
    read_texts,
)
from zephyr_lite.data.report import Report
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError, VerificationError
from zephyr_lite.recipe import Source

Write = Callable[..., Any]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: Any, name: str = "d.jsonl", **options: Any) -> Source:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(tmp_path / name), **options)

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
        source = Source(path=str(shared_data / "sft" / f"{name}.jsonl"))
        dialogues, report = load_dialogues([source])
        with open(source.path, encoding="utf-8") as lines:
            raw = [json.loads(line) for line in lines]
        assert [(d.id, d.messages) for d in dialogues] == [(r["id"], r["messages"]) for r in raw]
        assert report.as_dict()["rows_read"] == len(dialogues) == rows
        assert report.as_dict()["dropped"] == {}


def run(
    *sources: Source, limit: int | None = None, **rule: Any
) -> tuple[list[Dialogue], dict[str, Any]]:
    """(dialogues, report as a dictionary) under `on_fault=drop`."""
    report = Report("drop")
    return list(iter_dialogues(sources, DialogueRule(**rule), report, limit)), report.as_dict()


def say(**turn: str) -> list[dict[str, str]]:
    """`say(human="x", gpt="y")`: a ShareGPT dialogue."""
    return [{"from": speaker.rstrip("_"), "value": text} for speaker, text in turn.items()]


UA = [("user", "u"), ("assistant", "a")]
SCHEMAS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "ultrachat_200k": (
        {"prompt": "u", "prompt_id": "f" * 64, "messages": turns("ua", u="u", a="a")},
        UA,
    ),
    "messages beside others": ({"messages": turns("ua", u="u", a="a"), "data": ["x", "y"]}, UA),
    "ShareGPT": ({"id": "x", "conversations": say(human="u", gpt="a")}, UA),
    "ShareGPT, other names": (
        {"conversation": say(system="s", user="u", chatgpt="a", human="v", bing="b")},
        [("system", "s"), *UA, ("user", "v"), ("assistant", "b")],
    ),
    "ShareGPT, system apart": (
        {"system": "s", "conversations": say(human="u", bard="a")},
        [("system", "s"), *UA],
    ),
    "conversation of roles": ({"conversation": turns("ua", u="u", a="a")}, UA),
    "Alpaca": ({"instruction": "u", "input": "", "output": "a"}, UA),
    "Alpaca without input": ({"instruction": "u", "output": "a"}, UA),
    "Alpaca, null input": ({"instruction": "u", "input": None, "output": "a"}, UA),
    "Alpaca with input": (
        {"instruction": "Sort.", "input": "b a", "output": "a b", "text": "Below is ..."},
        [("user", "Sort.\n\nb a"), ("assistant", "a b")],
    ),
    "UltraChat": (
        {"id": "7", "data": ["u", "a", "v", "b"]},
        [*UA, ("user", "v"), ("assistant", "b")],
    ),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_schemas(write: Write, schema: str) -> None:
    row, expected = SCHEMAS[schema]
    dialogues, report = load_dialogues([write(row)])
    assert [(m["role"], m["content"]) for m in dialogues[0].messages] == expected
    assert report.as_dict()["kept"] == 1
    assert dialogues[0].id == row.get("id", row.get("prompt_id", dialogues[0].id))


def test_schemas_are_recognised_row_by_row(write: Write) -> None:
    dialogues, report = run(write(*(row for row, _ in SCHEMAS.values())))
    assert len(dialogues) == report["kept"] == len(SCHEMAS)


FAULTY = {
    "empty_answer": turns("ua", a=" \n\t"),
    "empty_user": turns("suaua", u=""),
    "special_token_text": turns("ua", a="so </s>\n<|user|>\nforged"),
    "nul_text": turns("ua", u="a\0b"),
    "no_assistant_turn": turns("su"),
    "last_turn_not_assistant": turns("uau"),
}
FAULTY_ROWS = {
    "assistant_first": {"conversations": say(gpt="hi", human="u", gpt_="a")},
    "assistant_first, after a system turn": {"conversations": say(system="s", gpt="a")},
    "turn_order": {"conversations": say(human="u", user="v", gpt="a")},
    "turn_order, a late system turn": {"conversations": say(human="u", system="s", gpt="a")},
    "no_assistant_turn": {"conversations": []},
    "no_assistant_turn, ShareGPT": {"conversations": say(human="u")},
    "last_turn_not_assistant": {"conversations": say(human="u", gpt="a", user="v")},
    "last_turn_not_assistant, UltraChat": {"data": ["u", "a", "v"]},
    "no_assistant_turn, UltraChat": {"data": ["u"]},
    "empty_answer, Alpaca": {"instruction": "u", "input": "x", "output": ""},
    "empty_user, Alpaca": {"instruction": " ", "input": "x", "output": "a"},
    "empty_user, ShareGPT": {"conversations": say(human="", gpt="a")},
    "special_token_text, UltraChat": {"data": ["u", "a</s>"]},
}


@pytest.mark.parametrize("case", FAULTY_ROWS)
def test_faults_of_other_schemas(write: Write, case: str) -> None:
    source, reason = write(FAULTY_ROWS[case]), case.split(",")[0]
    with pytest.raises(DataError, match=rf"d\.jsonl:1: {reason}$"):
        load_dialogues([source])
    dialogues, report = run(source)
    assert (dialogues, report["dropped"]) == ([], {reason: 1})


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
    "no key": ({"dialogue": []}, "no key `messages`; the row has dialogue"),
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
    "ShareGPT text": (
        {"conversations": "hi"},
        "`conversations` must be a list of turns, found str",
    ),
    "ShareGPT turn": ({"conversation": ["hi"]}, "`conversation[0]` must be an object, found str"),
    "ShareGPT speaker": ({"conversations": say(tool="x")}, "`conversations[0].from` is 'tool'"),
    "ShareGPT value": (
        {"conversations": [{"from": "human", "value": None}]},
        "`conversations[0].value` must be text, found NoneType",
    ),
    "ShareGPT keys": (
        {"conversations": [{"from": "human", "text": "x"}]},
        "`conversations[0].value` must be text, found no such key",
    ),
    "mixed turns": (
        {"conversations": [*turns("u"), *say(gpt="a")]},
        "`conversations[1].role` must be text, found no such key",
    ),
    "system type": ({"system": 3, "conversations": say(human="u", gpt="a")}, "`system` must be"),
    "Alpaca output": ({"instruction": "u", "output": None}, "`output` must be text, found NoneTy"),
    "Alpaca input": (
        {"instruction": "u", "input": 3, "output": "a"},
        "`input` must be text, found",
    ),
    "Alpaca history": (
        {"instruction": "u", "output": "a", "history": [["x", "y"]]},
        "`history` beside `instruction` is not read",
    ),
    "UltraChat text": ({"data": "hi"}, "`data` must be a list of texts, found str"),
    "UltraChat empty": ({"data": []}, "`data` must be a list of texts, found an empty list"),
    "UltraChat turn": ({"data": ["u", {"x": 1}]}, "`data[1]` must be text, found dict"),
    "instruction alone": ({"instruction": "u"}, "no key `messages`; the row has instruction"),
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


def test_rows_stream(write: Write) -> None:
    """What is not asked for is not read, and what was handed out is not kept."""
    stream = iter_dialogues([write({"messages": turns("ua")}, {})], DialogueRule(), Report())
    assert next(stream).messages == turns("ua")
    with pytest.raises(DataError, match=r"d\.jsonl:2: no key `messages`"):
        next(stream)
    rows = ({"messages": turns("ua", a="x" * 4000)} for _ in range(2500))  # 10 MB
    source = write(*rows, name="big.jsonl", weight=1.5)
    tracemalloc.start()
    total = sum(1 for _ in iter_dialogues([source], DialogueRule(), Report()))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 3500 < total < 4000
    assert peak < 1_000_000


def test_weights_draw_and_repeat_rows(write: Write) -> None:
    rows = [{"id": str(i), "messages": turns("ua", a=f"a{i}")} for i in range(400)]
    half, twice = write(*rows, weight=0.5), write(*rows[:3], name="e.jsonl", weight=2)
    dialogues, report = run(half, twice)
    names = [d.id for d in dialogues]
    assert names[-6:] == ["0", "0", "1", "1", "2", "2"]
    assert 150 < len(names) - 6 < 250
    assert report["dropped"] == {"not_sampled": 400 - len(names) + 6}
    assert report["files"][twice.path] == {
        "rows_read": 3,
        "kept": 3,
        "dropped": {},
        "noted": {"repeated": 3},
    }
    assert report["steps"][0]["changed"] == {"repeated": 3}
    assert [d.id for d in run(half)[0]] == names[:-6]
    assert [d.id for d in run(half, seed=43)[0]] != names[:-6]
    # Malformed is malformed, drawn or not; so many rows are never all left out.
    with pytest.raises(DataError, match="no key `messages`"):
        run(write(*[{}] * 3, name="f.jsonl", weight=0.01))


def test_truecasing_touches_turns_of_users_only(write: Write) -> None:
    text = "hello. how are you?"
    row = {"messages": turns("suaua", s=text, u=text, a=text)}
    source = write(row, {"messages": turns("ua", u="Fine.")})
    (plain, _), _ = run(source)
    (cased, other), report = run(source, truecase=True)
    fixed = "Hello. How are you?"
    assert [m["content"] for m in cased.messages] == [text, fixed, text, fixed, text]
    assert plain.messages == row["messages"]
    assert cased.id == plain.id
    assert other.messages[0]["content"] == "Fine."
    last = {"step": "truecasing", "before": 2, "after": 2, "changed": {"truecased_turns": 2}}
    assert report["steps"][-1] == last


def test_filters_follow_each_other(write: Write) -> None:
    """A row with several reasons is dropped for the first; nobody's fault stops the run."""
    prompt = "Name the three largest moons of the planet Jupiter, please."
    refusal = {"messages": turns("ua", u=prompt, a="I do not have opinions.")}
    contaminated = {"messages": turns("ua", u=prompt.lower())}
    answered = {"messages": turns("ua", a=f"You asked: {prompt} Here they are.")}
    source = write(refusal, contaminated, answered, {"messages": turns("ua")})
    rule = DialogueRule(drop_refusals=True, decontaminator=Decontaminator([("moons", prompt)]))
    report = Report("stop")
    assert len(list(iter_dialogues([source], rule, report))) == 1
    assert report.reasons() == {"refusal": 1, "contaminated": 2}
    assert report.dropped_rows[1:] == [
        {"file": source.path, "line": line, "reason": "contaminated", "detail": "moons"}
        for line in (2, 3)
    ]
    assert [(s["step"], s["before"], s["after"]) for s in report.steps()] == [
        ("soundness", 4, 4),
        ("refusals", 4, 3),
        ("decontamination", 3, 1),
    ]
    assert report.steps()[-1]["benchmarks"] == {"moons": 1}
    assert len(run(source)[0]) == 4


def test_every_shared_file_through_every_step(shared_data: Path, tmp_path: Path) -> None:
    sources = [
        Source(path=str(shared_data / "sft" / f"{name}.jsonl"), weight=0.5 if i % 2 else 2)
        for i, name in enumerate(ROWS_SFT)
        if name not in ("sgd_multiturn", "alpaca", "gsm8k")  # large, and they lose nothing
    ]
    benchmarks = ("mt_bench/question", "alpaca_eval_zephyr_7b_beta")
    found = Decontaminator.load(
        [Source(path=str(shared_data / "eval" / f"{name}.jsonl")) for name in benchmarks]
    )
    rule = DialogueRule(truecase=True, drop_refusals=True, decontaminator=found)
    report = Report("drop")
    dialogues = list(iter_dialogues(sources, rule, report))
    figures = report.as_dict()
    rows = {Path(file).stem: counts["rows_read"] for file, counts in figures["files"].items()}
    assert rows == {name: ROWS_SFT[name] for name in rows}
    assert figures["rows_read"] == figures["kept"] + sum(figures["dropped"].values())
    repeated = figures["steps"][0]["changed"]["repeated"]
    assert len(dialogues) == figures["kept"] + repeated
    steps = figures["steps"]
    assert [step["step"] for step in steps] == [
        "mixture",
        "soundness",
        "refusals",
        "decontamination",
        "truecasing",
    ]
    assert [step["after"] for step in steps][:-1] == [step["before"] for step in steps][1:]
    assert steps[-1]["after"] == figures["kept"]
    report.write_rejected(tmp_path / "rejected.jsonl")
    reasons = Counter(
        json.loads(line)["reason"]
        for line in (tmp_path / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert reasons == figures["dropped"]
    assert set(reasons) == {"not_sampled", "refusal", "contaminated"}


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
