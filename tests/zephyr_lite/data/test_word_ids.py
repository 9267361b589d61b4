"""Word by word gives the tokenizer's own ids, and is not tried where it might not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from zephyr_lite.data import word_ids as module
from zephyr_lite.data.sources import PACKAGED_DATA
from zephyr_lite.data.word_ids import WordIds, word_ids

FILE = PACKAGED_DATA / "tokenizer.json"
OWN = Tokenizer.from_file(str(FILE))
HARD = [
    "",
    " ",
    "   \n  ",
    "a  b   c",
    "a\u2581b \u2581 \u2581\u2581c",
    "\n\n\nword\n \n",
    "tab\tand\r\nCRLF\u00a0and\u2028more",
    "</s>",
    "</s></s> a</s> </s>\n</s>b",
    "<|user|>\n 数学 🦙 e\u0301 \x00 \x7f",
    "x" * 300 + " " * 300 + "\n" * 300,
]


def fast(tokenizer: Tokenizer = OWN) -> WordIds:
    found = word_ids(tokenizer, "</s>", 2)
    assert found is not None
    return found


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_get_the_tokenizers_ids(text: str) -> None:
    assert fast().encode(text).tolist() == ids(OWN, text)


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([" ", "  ", "\n", "\u2581", "</s>", "\t", "The", "plays", ".", "é", "数"]),
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="<>"), max_size=12
        ),  # no control token but </s>: every caller has refused them
    ),
    max_size=30,
).map("".join)
WORDS = fast()


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_any_text_gets_the_tokenizers_ids(text: str) -> None:
    assert WORDS.encode(text).tolist() == ids(OWN, text)


@pytest.mark.parametrize("name", ["mistral-7b-v0.1-tokenizer", "stories260k"])
def test_real_tokenizers_on_real_and_on_hard_texts(shared_data: Path, name: str) -> None:
    own = Tokenizer.from_file(str(shared_data / "models" / name / "tokenizer.json"))
    words = fast(own)
    with (shared_data / "sft" / "oasst_trees.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    texts = ["</s>\n".join(m["content"] for m in messages) for messages in rows] + HARD
    texts = [text for text in texts if "<s>" not in text and "<unk>" not in text]
    assert len(texts) > 400
    for text in texts:
        assert words.encode(text).tolist() == ids(own, text)


def test_what_is_remembered_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(module, "MOST_WORDS", 10)
    words = fast()
    for number in range(200):
        text = f"the {number} " + "y" * (60 + number % 10)
        assert words.encode(text).tolist() == ids(OWN, text)
        assert len(words) <= 10
        assert all(len(word) <= module.LONGEST_WORD for word in words)


def add_token(content: str) -> Callable[[dict[str, Any]], None]:
    def change(parts: dict[str, Any]) -> None:
        parts["model"]["vocab"][content] = len(parts["model"]["vocab"])

    return change


@pytest.mark.parametrize(
    "change",
    [
        add_token("a\u2581b"),
        add_token("a\n"),
        add_token("<0x0A><0x0A>"),
        lambda p: p["model"].update(dropout=0.1),
        lambda p: p["model"].update(byte_fallback=False),
        lambda p: p["model"].update(ignore_merges=True),
        lambda p: p["normalizer"]["normalizers"].pop(0),
        lambda p: p.update(pre_tokenizer={"type": "Whitespace"}),
        lambda p: p["added_tokens"][0].update(rstrip=True),
        lambda p: p["added_tokens"].pop(),
    ],
    ids=[
        "a token over two words",
        "a token over a line's end",
        "a token of two newline bytes",
        "dropout",
        "unknown characters",
        "whole words first",
        "no space before the text",
        "a pre-tokenizer",
        "a greedy control token",
        "other control tokens",
    ],
)
def test_where_ids_could_differ_the_tokenizer_is_used_as_it_is(change) -> None:
    parts = json.loads(FILE.read_text())
    change(parts)
    assert word_ids(Tokenizer.from_str(json.dumps(parts)), "</s>", 2) is None
