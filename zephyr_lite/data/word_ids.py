"""Token ids word by word: the ids of the tokenizer itself, several times sooner on one core.

A SentencePiece BPE tokenizer (Llama's, Mistral's) merges over a whole turn at once. But where no
token of its vocabulary has the space mark behind another character, or a newline beside something
else, no merge ever crosses the beginning of a word or a newline. Words can then be encoded one at
a time and remembered, and the ids are the same by construction. `word_ids` looks whether all of
this holds; other tokenizers are used as they are.
"""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

SPACE = "\u2581"
MOST_WORDS, LONGEST_WORD = 1 << 18, 64  # about 80 MB when full
CONTROL = {"<unk>", "<s>", "</s>"}
NORMALIZERS = [
    {"type": "Prepend", "prepend": SPACE},
    {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
]
_WORDS = re.compile(r" *[^ \n]+| +|\n+")
_CROSSING = re.compile(rf"[^{SPACE}]{SPACE}|[^\n]\n|\n[^\n]|.<0x0A>|<0x0A>.", re.DOTALL)


class WordIds(dict[str, tuple[int, ...]]):
    """Ids of each word that was met, its leading spaces included."""

    def __init__(self, tokenizer: Tokenizer, eos: str, eos_id: int) -> None:
        super().__init__()
        self._model = tokenizer.model
        self._eos, self._eos_id = eos, eos_id

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word.replace(" ", SPACE)))
        if len(word) <= LONGEST_WORD:
            if len(self) >= MOST_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def encode(self, text: str) -> np.ndarray:
        """int32 ids of a text in which the end token is the only control token.

        Raises: TypeError or UnicodeEncodeError for a lone surrogate, as the tokenizer does.
        """
        ids: list[int] = []
        for part in text.replace(SPACE, " ").split(self._eos):
            if part:  # an empty one gets no space mark either
                words = _WORDS.findall(" " + part)
                ids += itertools.chain.from_iterable(map(self.__getitem__, words))
            ids.append(self._eos_id)
        return np.array(ids[:-1], dtype=np.int32)


def word_ids(tokenizer: Tokenizer, eos: str, eos_id: int) -> WordIds | None:
    """The word-by-word encoder of a tokenizer; None where its ids could differ."""
    parts = json.loads(tokenizer.to_str())
    normalizer = parts["normalizer"] or {}
    fits = (
        normalizer.get("normalizers") == NORMALIZERS
        and parts["pre_tokenizer"] is None
        and eos in CONTROL
        and {token["content"] for token in parts["added_tokens"]} == CONTROL
        and all(_is_plain(token) for token in parts["added_tokens"])
        and _merges_only(parts["model"])
    )
    return WordIds(tokenizer, eos, eos_id) if fits else None


def _is_plain(token: dict[str, Any]) -> bool:
    """Whether a control token takes nothing of the text beside it."""
    return not any(token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized"))


def _merges_only(model: dict[str, Any]) -> bool:
    """Whether ids come from merges of characters and bytes alone, none of which leaves its word."""
    affixes = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    return (
        model["type"] == "BPE"
        and not any(model.get(name) for name in affixes)
        and bool(model["byte_fallback"])
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and not any(_CROSSING.search(token) for token in model["vocab"])
    )
