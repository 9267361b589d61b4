"""Decontamination: more than half of a prompt's 8-grams, never less, and every form of a prompt."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_lite.data import decontaminate
from zephyr_lite.data.decontaminate import Decontaminator, prompts_of
from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source

Write = Callable[..., Source]
LONG = "one two three four five six seven eight nine ten eleven twelve"  # 5 distinct 8-grams


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, *rows: Any) -> Source:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(tmp_path / name))

    return write


def test_more_than_half_of_the_grams() -> None:
    found = Decontaminator([("bench", LONG)])
    words = LONG.split()
    assert found.match([LONG]) == "bench"
    assert found.match([" ".join(words[:10])]) == "bench"  # 3 of 5
    assert found.match([" ".join(words[:9])]) is None  # 2 of 5
    assert found.match([" ".join(words[:9]), " ".join(words[4:])]) == "bench"  # 2 and 1 over turns
    assert found.match([" ".join(words[:6]), " ".join(words[6:])]) is None  # no gram spans turns
    assert found.match([" ".join(words[:9])] * 3) is None  # distinct ones count
    half = Decontaminator([("bench", " ".join(words[:11]))])  # 4 grams
    assert half.match([" ".join(words[:9])]) is None  # exactly half
    assert half.match([" ".join(words[:10])]) == "bench"


def test_texts_are_normalised() -> None:
    found = Decontaminator([("bench", "Ｗhat’s the ﬁrst-ever:  prize\n(of the) CONTEST, please?")])
    assert found.match(["So: what's the FIRST ever prize of the contest please!"]) == "bench"
    assert Decontaminator([("b", "naïve café")]).match(["Nai\u0308ve  CAFE\u0301."]) == "b"
    assert Decontaminator([("b", "one_two")]).match(["one two"]) is None  # _ is a word character


def test_short_prompts_are_whole_turns() -> None:
    found = Decontaminator([("short", "Prove the Pythagorean theorem."), ("long", LONG)])
    assert found.match(["Hello", "prove, the pythagorean THEOREM"]) == "short"
    assert found.match(["Please prove the Pythagorean theorem."]) is None
    assert found.match(["prove the", "pythagorean theorem"]) is None
    eight = Decontaminator([("eight", "a b c d e f g h")])
    assert eight.match(["so a b c d e f g h it is"]) == "eight"


def test_the_first_prompt_names_the_benchmark() -> None:
    found = Decontaminator([("one", LONG), ("two", LONG), ("two", "hi there")])
    assert found.match(["hi there", LONG]) == "one"
    assert found.match(["hi there"]) == "two"
    assert (found.names, dict(found.counts)) == (["one", "two"], {"one": 1, "two": 2})


def test_nothing_to_find() -> None:
    for found in (Decontaminator([]), Decontaminator([("b", "?!")])):
        assert (found.names, found.match(["", LONG, "?"])) == ([], None)
    assert Decontaminator([("b", LONG)]).match([]) is None


FORMS: dict[str, tuple[Any, list[str]]] = {
    "MT-Bench": ({"question_id": 81, "turns": ["a", "b"], "reference": ["x"]}, ["a", "b"]),
    "mt_bench_prompts": ({"prompt": ["a", "b"], "reference": ["x"]}, ["a", "b"]),
    "AlpacaEval": ({"instruction": "a", "output": "x", "generator": "x", "dataset": "x"}, ["a"]),
    "HumanEval": ({"prompt": "a", "canonical_solution": "x", "test": "x"}, ["a"]),
    "question": ({"question": "a", "best_answer": "x"}, ["a"]),
    "query": ({"query": "a", "choices": ["x"], "gold": 0}, ["a"]),
    "text": ({"text": "a"}, ["a"]),
    "messages": (
        {"prompt": "x", "messages": [{"role": r, "content": r} for r in ("user", "assistant")]},
        ["user"],
    ),
    "chat prompt": ({"prompt": [{"role": "user", "content": "a"}]}, ["a"]),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_benchmarks_row(form: str) -> None:
    row, prompts = FORMS[form]
    assert prompts_of(Row("b.jsonl", 1, row)) == prompts


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"name": "x", "prompt_template": "y"},
            "no prompt under these keys: name, prompt_template",
        ),
        ({}, "no prompt under these keys: no keys"),
        ({"prompt": 3}, "`prompt` must be a text or a list of texts, found int"),
        ({"turns": ["a", None]}, "`turns` must be a text or a list of texts, found list"),
        ({"messages": []}, "`messages` must be a list of messages, found an empty list"),
    ],
)
def test_rows_without_a_prompt(write: Write, row: Any, words: str) -> None:
    with pytest.raises(DataError) as error:
        Decontaminator.load([write("b.jsonl", {"prompt": "a"}, row)])
    assert words in str(error.value)
    assert "b.jsonl:2: " in str(error.value)


def test_a_benchmark_without_words(write: Write) -> None:
    sources = [write("a.jsonl", {"prompt": "a"}), write("b.jsonl", {"prompt": "?"}, {"prompt": []})]
    with pytest.raises(DataError, match=r"b\.jsonl: no prompt of this benchmark has a word"):
        Decontaminator.load(sources)


def test_benchmarks_are_named_after_their_files(write: Write) -> None:
    sources = [write("mt_bench.jsonl", {"turns": ["a b", "?"]}), write("he.json", {"prompt": "c"})]
    assert Decontaminator.load(sources).counts == {"mt_bench": 1, "he": 1}


def by_hand(prompts: list[str], texts: list[str]) -> bool:
    """The rule in its plainest form."""

    def words(text: str) -> list[str]:
        normal = re.sub(r"\W+", " ", unicodedata.normalize("NFKC", text).lower())
        return normal.split()

    def grams(text: str) -> set[tuple[str, ...]]:
        found = words(text)
        return {tuple(found[i : i + 8]) for i in range(len(found) - 7)}

    row = set().union(*map(grams, texts)) if texts else set()
    turns = [words(text) for text in texts]
    return any(
        len(grams(prompt) & row) > len(grams(prompt)) / 2
        if len(words(prompt)) >= 8
        else bool(words(prompt)) and words(prompt) in turns
        for prompt in prompts
    )


TEXT = st.lists(
    st.sampled_from(["a", "B", "c", "É", "ﬁ", "x_y", "1", ",", " - ", "\n", "’"]), max_size=30
).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, max_size=3))
def test_as_by_hand(prompts: list[str], texts: list[str]) -> None:
    found = Decontaminator([("b", prompt) for prompt in prompts])
    assert (found.match(texts) == "b") == by_hand(prompts, texts)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(max_codepoint=127)))
def test_the_short_way_for_ascii_gives_the_same_words(text: str) -> None:
    assert decontaminate._words(text) == re.findall(r"\w+", text.lower())


# (benchmark file, training file): rows that are contaminated.
EXPECTED = {
    ("mt_bench/question", "alpaca"): 1,
    ("mt_bench/question", "oasst_trees"): 0,
    ("alpaca_eval_zephyr_7b_beta", "moss_multiturn"): 1,
    ("alpaca_eval_zephyr_7b_beta", "oasst_trees"): 26,
    ("alpaca_eval_zephyr_7b_beta", "sgd_multiturn"): 0,
}


@pytest.mark.parametrize(("benchmark", "name"), EXPECTED)
def test_shared_files(shared_data: Path, benchmark: str, name: str) -> None:
    source = Source(path=str(shared_data / "eval" / f"{benchmark}.jsonl"))
    found = Decontaminator.load([source])
    with (shared_data / "sft" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        rows = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
    matches = [found.match(texts) for texts in rows]
    assert sum(match is not None for match in matches) == EXPECTED[benchmark, name]
    assert set(matches) <= {None, benchmark.split("/")[-1]}
    count = 160 if "question" in benchmark else 589
    assert found.counts == {benchmark.split("/")[-1]: count}


def test_every_prompt_is_found_in_its_own_benchmark(shared_data: Path) -> None:
    for name in ("ifeval_prompts", "copa"):
        file = shared_data / "eval" / f"{name}.jsonl"
        found = Decontaminator.load([Source(path=str(file))])
        for line, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            prompts = prompts_of(Row(str(file), line, json.loads(text)))
            assert found.match(prompts) == name
