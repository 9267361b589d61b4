"""The strings are many, distinct, and of every kind that was promised."""

from __future__ import annotations

import json
import unicodedata

import pytest

from zephyr_lite.export.check.texts import odd_strings

STRINGS = odd_strings()


def test_they_are_many_and_distinct() -> None:
    assert len(STRINGS) >= 300
    assert len(set(STRINGS)) == len(STRINGS)
    # What JSON cannot carry to llama.cpp would be compared with something else.
    assert [json.loads(json.dumps(text).encode()) for text in STRINGS] == list(STRINGS)


@pytest.mark.parametrize(
    "script",
    ["LATIN", "CYRILLIC", "GREEK", "HEBREW", "ARABIC", "DEVANAGARI", "BENGALI", "TAMIL", "THAI",
     "LAO", "MYANMAR", "KHMER", "GEORGIAN", "ARMENIAN", "ETHIOPIC", "CJK", "HIRAGANA", "KATAKANA",
     "HANGUL", "MONGOLIAN", "TIBETAN", "GOTHIC"],
)  # fmt: skip
def test_every_script_is_there(script: str) -> None:
    names = {unicodedata.name(c, "").split(" ")[0] for text in STRINGS for c in text}
    assert script in names


@pytest.mark.parametrize(
    "holds",
    [
        lambda t: t == "",
        lambda t: t.startswith("  ") and t.strip() != "",
        lambda t: t.endswith(" ") and t.strip() != "",
        lambda t: "   " in t.strip(),
        lambda t: "\t" in t,
        lambda t: "\r\n" in t,
        lambda t: t.endswith("\n\n"),
        lambda t: "\u200d" in t and len(t) > 3,  # joined emoji
        lambda t: any(unicodedata.category(c) == "Mn" for c in t),
        lambda t: any(unicodedata.category(c) == "Co" for c in t),  # private use
        lambda t: t.startswith("\ufeff"),
        lambda t: t.isdigit() and len(t) > 15,
        lambda t: "https://" in t,
        lambda t: len(t) >= 1000 and " " not in t,
        lambda t: "</s>" in t and not t.startswith("</s>") and not t.endswith("</s>"),
        lambda t: "<|assistant|>\n" in t and "</s>" in t,
    ],
)
def test_every_kind_is_there(holds) -> None:
    assert any(map(holds, STRINGS))


def test_a_tokenizers_own_marks_stand_in_every_place() -> None:
    more = set(odd_strings(("<|eom_id|>",))) - set(STRINGS)
    assert "a<|eom_id|>b" in more
    assert "a <|eom_id|> b" in more
    assert "<|eom_id|><|eom_id|> x" in more
    assert set(odd_strings(("</s>",))) == set(STRINGS)
