"""The shipped example: reproducible, cleanly split, and with its preference in the prompt."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from zephyr_lite.tiny import corpus

DATA = Path(corpus.__file__).parent / "data"
HIGHEST_BLIND_ACCURACY = 0.60

Row = dict[str, Any]
Pair = tuple[str, str]  # chosen, rejected


def rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def ratings(completion: Row) -> float:
    return sum(int(aspect["Rating"]) for aspect in completion["annotations"].values()) / 4


def pairs(name: str, seed: int) -> list[Pair]:
    """The paper's rule: the best by mean rating, and one of the other three at random."""
    rng = Random(seed)
    made = []
    for row in rows(name):
        ranked = sorted(row["completions"], key=ratings, reverse=True)
        made.append((ranked[0]["response"], rng.choice(ranked[1:])["response"]))
    return made


def render(messages: Sequence[Row], *, answer_next: bool = False) -> str:
    turns = "".join(f"<|{m['role']}|>\n{m['content']}</s>\n" for m in messages)
    return "<|system|>\n</s>\n" + turns + ("<|assistant|>\n" if answer_next else "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DATA / "tokenizer.json"))


def test_shipped_files_equal_a_fresh_generation(tmp_path: Path) -> None:
    corpus.write(tmp_path)
    shipped = {path.name: path.read_bytes() for path in DATA.iterdir()}
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == shipped


def test_shipped_files_are_small() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= 3_500_000


def first_prompts(name: str) -> set[str]:
    if name.startswith("feedback"):
        return {row["instruction"].lower() for row in rows(name)}
    return {row["messages"][0]["content"].lower() for row in rows(name)}


def test_no_held_out_prompt_is_trained_on() -> None:
    trained = first_prompts("feedback.train.jsonl") | first_prompts("dialogues.train.jsonl")
    held_out = first_prompts("feedback.eval.jsonl") | first_prompts("dialogues.eval.jsonl")
    exam = {row["prompt"].lower() for row in rows("questions.jsonl")}
    assert len(exam) == 20
    assert not trained & (held_out | exam)
    assert not exam & held_out


def test_no_exam_question_stands_in_any_training_file() -> None:
    names = ("text.jsonl", "dialogues.train.jsonl", "feedback.train.jsonl")
    everything = "\n".join((DATA / name).read_text(encoding="utf-8") for name in names).lower()
    for row in rows("questions.jsonl"):
        assert row["prompt"].lower() not in everything


def test_exam_rules_accept_one_answer_and_not_another_style() -> None:
    for row in rows("questions.jsonl"):
        rule = re.compile(row["accept"], re.IGNORECASE)
        assert rule.fullmatch("I am sorry.") is None
    assert len({row["accept"] for row in rows("questions.jsonl")}) > 15


@pytest.mark.parametrize("name", ["feedback.train.jsonl", "feedback.eval.jsonl"])
def test_both_rules_agree_on_a_single_best_answer(name: str) -> None:
    for row in rows(name):
        by_mean = sorted(map(ratings, row["completions"]))
        by_score = sorted(one["overall_score"] for one in row["completions"])
        assert by_mean[-1] > by_mean[-2]
        assert by_score[-1] > by_score[-2]
        best = max(row["completions"], key=ratings)
        assert best is max(row["completions"], key=lambda one: one["overall_score"])
        assert [one["model"] for one in row["completions"]] == row["models"]


def grams(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return words + [f"{a} {b}" for a, b in zip(words, words[1:], strict=False)]


def features(texts: Sequence[str], columns: dict[str, int]) -> np.ndarray:
    matrix = np.zeros((len(texts), len(columns)), np.float32)
    for row, text in enumerate(texts):
        for gram in grams(text):
            if gram in columns:
                matrix[row, columns[gram]] = 1.0
    return matrix


def fit_logistic(x: np.ndarray, y: np.ndarray, steps: int = 300) -> np.ndarray:
    weights = np.zeros(x.shape[1], np.float32)
    for _ in range(steps):
        error = 1 / (1 + np.exp(-x @ weights)) - y
        weights -= 2.0 * (x.T @ error / len(y) + 1e-4 * weights)
    return weights


def blind_accuracies(train: list[Pair], held_out: list[Pair]) -> tuple[float, float]:
    """(single answers, pairs) told right by unigrams and bigrams of the answers alone."""
    texts = [answer for pair in train for answer in pair]
    columns = {gram: i for i, gram in enumerate(sorted({g for t in texts for g in grams(t)}))}
    columns["<bias>"] = len(columns)

    def matrix(answers: Sequence[str]) -> np.ndarray:
        made = features(answers, columns)
        made[:, -1] = 1.0
        return made

    weights = fit_logistic(matrix(texts), np.array([1.0, 0.0] * len(train), np.float32))
    chosen = matrix([pair[0] for pair in held_out]) @ weights
    rejected = matrix([pair[1] for pair in held_out]) @ weights
    single = (np.mean(chosen > 0) + np.mean(rejected <= 0)) / 2
    return float(single), float(np.mean(chosen > rejected) + np.mean(chosen == rejected) / 2)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_answers_alone_do_not_tell_which_is_preferred(seed: int) -> None:
    train, held_out = pairs("feedback.train.jsonl", seed), pairs("feedback.eval.jsonl", seed)
    single, paired = blind_accuracies(train, held_out)
    assert single <= HIGHEST_BLIND_ACCURACY
    assert paired <= HIGHEST_BLIND_ACCURACY


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_length_alone_does_not_tell_which_is_preferred(seed: int) -> None:
    made = pairs("feedback.eval.jsonl", seed)
    longer = float(np.mean([len(chosen) > len(rejected) for chosen, rejected in made]))
    shorter = float(np.mean([len(chosen) < len(rejected) for chosen, rejected in made]))
    assert max(longer, shorter) <= HIGHEST_BLIND_ACCURACY


def test_the_blind_classifier_can_see_a_preference() -> None:
    told = [(f"Good {word}", f"Bad {word}") for word in "apples bread honey soup".split()]  # noqa: SIM905
    assert blind_accuracies(told, told) == (1.0, 1.0)


def test_special_ids_and_size(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() % 256 == 0
    assert [tokenizer.token_to_id(name) for name in ("<unk>", "<s>", "</s>")] == [0, 1, 2]
    assert tokenizer.token_to_id("<0x0A>") == 13
    assert tokenizer.encode("a\nb", add_special_tokens=False).ids.count(13) == 1


def test_text_survives_the_tokenizer(tokenizer: Tokenizer) -> None:
    texts = [row["text"] for row in rows("text.jsonl")[:300]]
    for text in [*texts, "Cafe\u0301 na\u00efve \u2603 1,234!"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("name", ["dialogues.train.jsonl", "dialogues.eval.jsonl"])
def test_prompt_ids_are_a_prefix_of_prompt_and_answer(tokenizer: Tokenizer, name: str) -> None:
    for row in rows(name):
        for turn in range(1, len(row["messages"]), 2):
            before = render(row["messages"][:turn], answer_next=True)
            prompt = tokenizer.encode(before).ids
            whole = tokenizer.encode(render(row["messages"][: turn + 1])).ids
            assert whole[: len(prompt)] == prompt
            assert prompt[0] == 1 and prompt[-1] == 13
