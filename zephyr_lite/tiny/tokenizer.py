"""Train a byte-fallback BPE in Mistral's own form and write it as tokenizer.json.

Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3..258 the bytes (so a newline is 13), then the merged pieces in
order of merging, then the single characters. Every split of a piece into two pieces is listed as a
merge, as in files made from SentencePiece: so a reader that merges by piece score, as llama.cpp
does, gives the same ids. No piece contains a space mark except at its head, so none crosses a word.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

VOCAB_SIZE = 1024
SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
CHARACTERS = (SPACE, *(c for c in string.printable if c.isprintable() and c != " "))
# A role mark, or a word with the space before it, or a run of other signs.
_WORD = re.compile(rf"<\|[a-z]+\|>|{SPACE}?[A-Za-z]+|{SPACE}?[^A-Za-z{SPACE}]|{SPACE}")


def train_tokenizer(texts: Iterable[str], chats: Iterable[Sequence[dict[str, str]]]) -> str:
    """The text of a tokenizer.json with VOCAB_SIZE pieces.

    Args:
        texts: running text.
        chats: lists of messages with `role` and `content`; role marks are counted once per turn.
    Raises: ValueError when the words are too few to fill the vocabulary.
    """
    words = count_words(texts, chats)
    pieces = learn_pieces(words, VOCAB_SIZE - len(SPECIAL) - 256 - len(CHARACTERS))
    return json.dumps(_tokenizer_file(pieces), ensure_ascii=False, indent=1) + "\n"


def count_words(texts: Iterable[str], chats: Iterable[Sequence[dict[str, str]]]) -> Counter[str]:
    """How often each word occurs; a word carries the space before it as its first character."""
    words: Counter[str] = Counter()
    for text in texts:
        words.update(_WORD.findall(SPACE + text.replace(" ", SPACE)))
    for messages in chats:
        words[SPACE] += 2 * len(messages) + 1  # the form puts one after every special token
        words["<|system|>"] += 1
        for message in messages:
            words[f"<|{message['role']}|>"] += 1
            words.update(_WORD.findall(message["content"].replace(" ", SPACE)))
    return words


def learn_pieces(words: Counter[str], count: int) -> list[str]:
    """Byte-pair encoding: merge the most frequent pair (ties: the first in order) `count` times."""
    split = {word: tuple(word) for word in words}
    pieces: list[str] = []
    while len(pieces) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            raise ValueError(f"only {len(pieces)} pieces can be learnt, {count} are needed")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        split = {word: _merge(parts, best) for word, parts in split.items()}
        pieces.append("".join(best))
    return list(dict.fromkeys(pieces))


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    if pair[0] not in parts:
        return parts
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _tokenizer_file(pieces: Sequence[str]) -> dict[str, Any]:
    """The content of tokenizer.json, in the form of Mistral-7B-v0.1's."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *CHARACTERS]
    vocab = {name: index for index, name in enumerate(names)}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, name) for index, name in enumerate(SPECIAL)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in _all_splits(pieces, vocab)],
        },
    }


def _added_token(index: int, name: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": index, "content": name, **flags, "special": True}


def _all_splits(pieces: Sequence[str], vocab: dict[str, int]) -> Iterable[tuple[str, str]]:
    """Every way to put a piece together from two pieces, best piece first."""
    for piece in pieces:
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [half for half in halves if half[0] in vocab and half[1] in vocab]
        yield from sorted(known, key=lambda half: (vocab[half[0]], vocab[half[1]]))
