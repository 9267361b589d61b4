"""The shipped example: made by its generator, split honestly, and preferring by prompt alone."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import zephyr_lite.tiny
from zephyr_lite import recipe_file
from zephyr_lite.data.chat import load_tokenizer, render
from zephyr_lite.data.feedback import load_pairs
from zephyr_lite.recipe import Source
from zephyr_lite.tiny.corpus import write

DATA = Path(zephyr_lite.tiny.__file__).parent / "data"
LIMIT = 0.60


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The shipped tokenizer, laid out as in a model folder."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_bytes((DATA / "tokenizer.json").read_bytes())
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pairs():
    """Pairs by split, drawn as the tiny recipe draws them."""
    recipe = recipe_file.load("tiny")
    assert recipe.data.feedback is not None
    return {
        side: load_pairs(
            [Source(path=f"package:feedback.{side}.jsonl", split=None, limit=None)],
            rule=recipe.data.feedback.rule,
            seed=recipe.seed,
        )[0]
        for side in ("train", "eval")
    }


def test_the_files_are_what_the_generator_writes(tmp_path):
    write(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {f.name for f in DATA.iterdir()}
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (DATA / file.name).read_bytes(), file.name


def test_no_held_out_prompt_is_ever_trained_on():
    trained = {r["instruction"] for r in _rows("feedback.train.jsonl")}
    for row in _rows("dialogues.train.jsonl"):
        trained |= {m["content"] for m in row["messages"] if m["role"] == "user"}
    questions = [r["prompt"] for r in _rows("questions.jsonl")]
    assert len(questions) == len(set(questions)) == 20
    assert not trained & set(questions)
    assert not trained & {r["instruction"] for r in _rows("feedback.eval.jsonl")}
    first = {r["messages"][0]["content"] for r in _rows("dialogues.eval.jsonl")}
    assert not trained & first
    text = "\n".join(r["text"] for r in _rows("text.jsonl"))
    assert not [q for q in questions if q in text]


def test_both_rules_choose_the_answer_that_obeys():
    for row in _rows("feedback.train.jsonl") + _rows("feedback.eval.jsonl"):
        means, overall = [], []
        for c in row["completions"]:
            ratings = [int(a["Rating"]) for a in c["annotations"].values()]
            means.append(sum(ratings) / len(ratings))
            overall.append(c["overall_score"])
        assert int(np.argmax(means)) == int(np.argmax(overall))
        assert Counter(means)[max(means)] == Counter(overall)[max(overall)] == 1


def test_answer_length_alone_tells_little(pairs):
    longer = np.array([len(p.chosen) - len(p.rejected) for p in pairs["eval"]])
    ties = (longer == 0).mean() / 2
    assert max((longer > 0).mean(), (longer < 0).mean()) + ties <= LIMIT


def test_a_bag_of_words_over_the_answers_tells_little(pairs):
    """Logistic regression over words and neighbouring words; single answers and pairs."""
    vocabulary: dict[str, int] = {}
    features = {
        side: [[_bag(text, vocabulary) for text in (p.chosen, p.rejected)] for p in rows]
        for side, rows in pairs.items()
    }
    chosen, rejected = (_matrix([f[i] for f in features["train"]], len(vocabulary)) for i in (0, 1))
    x = np.concatenate([chosen, rejected])
    y = np.concatenate([np.ones(len(chosen)), np.zeros(len(rejected))])
    weights, bias = np.zeros(x.shape[1]), 0.0
    for _ in range(300):
        error = 1 / (1 + np.exp(-(x @ weights + bias))) - y
        weights -= 2.0 * (x.T @ error / len(x) + 1e-4 * weights)
        bias -= 2.0 * error.mean()
    held = [
        _matrix([f[i] for f in features["eval"]], len(vocabulary)) @ weights + bias for i in (0, 1)
    ]
    single = (np.concatenate([held[0] > 0, held[1] <= 0])).mean()
    paired = (held[0] > held[1]).mean() + (held[0] == held[1]).mean() / 2
    assert single <= LIMIT, single
    assert paired <= LIMIT, paired


def _bag(text: str, vocabulary: dict[str, int]) -> set[int]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return {vocabulary.setdefault(gram, len(vocabulary)) for gram in grams}


def _matrix(bags: list[set[int]], width: int) -> np.ndarray:
    out = np.zeros((len(bags), width))
    for row, bag in enumerate(bags):
        out[row, list(bag)] = 1.0
    return out


def test_the_tokenizer_keeps_prompts_prefixes_and_newlines_apart(tokenizer):
    assert tokenizer.vocab_size % 256 == 0
    for row in _rows("dialogues.train.jsonl")[:200]:
        messages = row["messages"]
        ids = tokenizer.encode_dialogue(messages).ids.tolist()
        prompt = tokenizer.encode_prompt(messages[:-1])
        assert ids[: len(prompt)] == prompt
        assert prompt[-1] == 13  # the newline byte, merged with nothing
        assert tokenizer.decode(ids).count("\n") == render(messages).count("\n")
        answer = tokenizer.encode_answers([messages[-1]["content"]])[0]
        assert tokenizer.decode(answer.tolist()) == messages[-1]["content"]
    odd = "naïve 漢字 and\ttabs"
    assert tokenizer.decode(tokenizer.encode_answers([odd])[0].tolist()) == odd


def test_every_accepted_answer_is_one_the_world_gives():
    for row in _rows("questions.jsonl"):
        assert not re.fullmatch(row["accept"], "I do not know.", re.IGNORECASE)
        shown = row["accept"].replace(r"\.?", ".").replace("[.!]", ".")
        shown = re.sub(r"\(([^|)]+)\|[^)]*\)", r"\1", shown)
        assert re.fullmatch(row["accept"], shown, re.IGNORECASE), row


def test_every_quantisation_applies_to_the_tiny_base():
    build = recipe_file.load("tiny").base.build
    assert build is not None
    for size in (build.hidden_size, build.intermediate_size):
        assert size % 256 == 0
    assert build.kv_heads < build.heads
