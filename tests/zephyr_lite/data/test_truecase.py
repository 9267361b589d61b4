"""Truecasing: sentence starts and the pronoun I are repaired, everything else stays as it is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zephyr_lite.data.truecase import truecase

REPAIRED = {
    "Hello. how are you?": "Hello. How are you?",
    "hi": "Hi",
    "  what is this?": "  What is this?",
    "what? no! yes. ok": "What? No! Yes. Ok",
    "i think i'm right": "I think I'm right",
    "and then i’d say: so do i.": "And then I’d say: so do I.",
    "my wife and i, we like it": "My wife and I, we like it",
    "what can i do": "What can I do",
    "(can i ask?) yes i can": "(Can I ask?) yes I can",
    "is it on?\nand now?": "Is it on?\nAnd now?",
    "is it on?\n\nplease say so.": "Is it on?\n\nPlease say so.",
    '"hello," she said': '"Hello," she said',
    "éa va? oui": "Éa va? Oui",
    "dr. smith met mr. jones. who won?": "Dr. smith met mr. jones. Who won?",
    "it was in 1990. then it ended.": "It was in 1990. Then it ended.",
    "what does `foo. bar` do? is it ok": "What does `foo. bar` do? Is it ok",
    "fix this:\n```\nfoo. bar\ni = 1\n```\nthanks. can i run it?": (
        "Fix this:\n```\nfoo. bar\ni = 1\n```\nThanks. Can I run it?"
    ),
    "the i in team. is i a letter": "The i in team. Is i a letter",
    "see www.foo.com. then go. so be it": "See www.foo.com. then go. So be it",
}
UNTOUCHED = [
    "",
    " \n",
    "Hello. How are you?",
    "See e.g. this, i.e. that, etc. and so on.",
    "The U.S. is big. J. smith vs. the state, approx. five p.m. or so.",
    "Well... maybe. Wait... what.",
    "iPhone is good. eBay is better. mRNA is small.",
    "foo.txt is a file. my_name is an identifier. a/b is a path. x2 is a word.",
    "https://example.com/a. www.example.com. me@example.com. ok.go",
    "```\nhello. how are you?\ni am\n```",
    "```python\nunclosed. fence",
    "`hello. how`",
    "for i in range(10): print(i). then",
    "    indented. code",
    "def f(x): return x. foo",
    "$ sudo reboot. now",
    "import os. then",
    "Sort these words.\n\npear\napple\nfig",
    "Answer in French.\n\nwhere the text has no full stop",
    "This line was wrapped by hand at some width, so that the next\nis not a sentence. It is one.",
    "Roses are red,\nviolets are blue.",
    "1. first this\n2. then that",
    "i ragazzi sono qui",
    "Let i be an integer and j a letter. The index i is odd. Row i th.",
    "i",
    "I/O and i/o, i-th, (i), i2c, i_n",
    # One small start among many is likelier an abbreviation that is not known.
    "It is so. It is so. It is so. It is so. He works for the min. of health.",
    "It is so. It is so. It is so. It is so. The adj. is wrong.",
    "ßtraße",
]


@pytest.mark.parametrize("text", REPAIRED)
def test_repaired(text: str) -> None:
    assert truecase(text) == REPAIRED[text]


@pytest.mark.parametrize("text", UNTOUCHED)
def test_untouched(text: str) -> None:
    assert truecase(text) == text


WORDS = "i I i'm you the. what? no! e.g. etc. 1. - * ( ) \" ' ` ``` , ; : = . .. ... ? foo.txt x_y"
PIECES = st.one_of(
    st.sampled_from(re.split(" ", WORDS + " is and a Hello hello éa ı İ ß ǆ")),
    st.sampled_from(["\n", "\n\n", "    ", " "]),
    st.text(max_size=5),
)
TEXTS = st.builds("".join, st.lists(st.tuples(PIECES, st.sampled_from(["", " "])).map("".join)))


@settings(max_examples=250, deadline=None)
@given(TEXTS)
def test_once_is_enough_and_only_capitals_change(text: str) -> None:
    once = truecase(text)
    assert truecase(once) == once
    assert len(once) == len(text)
    for before, after in zip(text, once, strict=True):
        assert after == before or (before.islower() and after == before.upper())


@settings(max_examples=80, deadline=None)
@given(TEXTS)
def test_code_is_never_touched(text: str) -> None:
    code = text.replace("`", "")
    assert truecase(f"```\n{code}\n```") == f"```\n{code}\n```"


def test_long_lines_take_no_longer_than_their_length() -> None:
    """Each of these would take minutes if a pattern looked back or ahead without bound."""
    for unit in (".", "a", "i ", ". ", "`", '"', "'", "a.", " ", "i'"):
        truecase(unit * (200_000 // len(unit)))


# Turns of users that are changed, of all turns of users.
CHANGED = {
    "alpaca": (2, 3000),
    "arena_hard_gpt4": (96, 384),
    "dolly_hhrlhf": (7, 600),
    "gpteacher_codegen": (0, 500),
    "gpteacher_roleplay": (0, 1200),
    "gsm8k": (1, 1200),
    "moss_multiturn": (0, 1229),
    "oasst_trees": (91, 711),
    "sgd_multiturn": (527, 11651),
    "topical_chat_multiturn": (1004, 8392),
}


@pytest.mark.parametrize("name", CHANGED)
def test_every_shared_file(shared_data: Path, name: str) -> None:
    """Prompts of teachers hardly change; what people typed does, and then starts with capitals."""
    with (shared_data / "sft" / f"{name}.jsonl").open(encoding="utf-8") as lines:
        turns = [m["content"] for line in lines for m in json.loads(line)["messages"]]
        lines.seek(0)
        roles = [m["role"] for line in lines for m in json.loads(line)["messages"]]
    users = [turn for turn, role in zip(turns, roles, strict=True) if role == "user"]
    repaired = [truecase(turn) for turn in users]
    assert (sum(map(str.__ne__, users, repaired)), len(users)) == CHANGED[name]
    assert not [text for text in repaired if re.match(r"[a-z]{2,}\.?( [a-z]{2,}){2}[.?!]?$", text)]
