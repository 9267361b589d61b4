"""Leaving out training rows that contain a benchmark's prompts.

Texts are normalised (NFKC, lower case, runs of non-word characters to one space). A row is
contaminated when it contains more than half of the distinct 8-grams of one benchmark prompt, in
whichever turns; a prompt of fewer than 8 words, when it equals a whole turn.

The benchmarks' 8-grams stand in an index from 8-gram to prompts, so a row is read once however many
prompts there are: the words of a row are hashed, eight neighbouring hashes are combined, and only
what a bit table of the index lets through is looked up as text. No hash decides anything.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from zephyr_lite.data.messages import malformed, parse_messages
from zephyr_lite.data.sources import Row, SourceSpec, is_local, read_source
from zephyr_lite.errors import DataError

GRAM = 8
# Where a benchmark's prompts stand; the first of these keys that a row has counts.
PROMPT_KEYS = ("turns", "messages", "prompt", "instruction", "question", "query", "text")
_WORD = re.compile(r"\w+")
_ASCII_WORDS = {code: " " for code in range(128) if not _WORD.match(chr(code))}
_TABLE_BITS = 22
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(GRAM)], np.uint64)


class Decontaminator:
    """The prompts of some benchmarks, ready to be found in texts.

    `counts`: benchmark (file stem or hub id) -> prompts read from it that have a word.
    """

    def __init__(self, prompts: Iterable[tuple[str, str]]) -> None:
        """`prompts`: (benchmark, text) of each."""
        self.counts: Counter[str] = Counter()
        self._names: list[str] = []
        self._sizes: list[int] = []  # distinct 8-grams of each prompt, 0 for a short one
        self._grams: dict[str, list[int]] = defaultdict(list)
        self._short: dict[str, int] = {}
        for name, text in prompts:
            self._add(name, _words(text))
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[[_slots(gram.split(" "))[0] for gram in self._grams]] = True

    @classmethod
    def load(cls, sources: Sequence[SourceSpec], *, offline: bool = False) -> Decontaminator:
        """Read the prompts of `sources`.

        Raises: DataError for a row without a prompt, and for a source whose prompts have no words.
        """
        prompts: list[tuple[str, str]] = []
        for source in sources:
            found = [
                (_name(source, row), text)
                for row in read_source(source, offline=offline)
                for text in prompts_of(row)
            ]
            if not any(_words(text) for _, text in found):
                raise DataError("no prompt of this benchmark has a word", file=source.path)
            prompts += found
        return cls(prompts)

    @property
    def names(self) -> list[str]:
        """The benchmarks, in the order of reading."""
        return list(self.counts)

    def match(self, texts: Iterable[str]) -> str | None:
        """The benchmark whose prompt is in these texts (the first such prompt's), else None."""
        words: list[str] = []
        found: set[int] = set()
        for text in texts:
            turn = _words(text)
            if len(turn) < GRAM and (prompt := self._short.get(" ".join(turn))) is not None:
                found.add(prompt)
            words += turn
            words.append("")  # no 8-gram spans two turns
        found |= self._find_long(words)
        return self._names[min(found)] if found else None

    def _add(self, name: str, words: list[str]) -> None:
        if not words:
            return
        self.counts[name] += 1
        prompt = len(self._names)
        grams = {" ".join(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)}
        self._names.append(name)
        self._sizes.append(len(grams))
        if not grams:
            self._short.setdefault(" ".join(words), prompt)
        for gram in grams:
            self._grams[gram].append(prompt)

    def _find_long(self, words: list[str]) -> set[int]:
        if len(words) < GRAM or not self._grams:
            return set()
        places = np.flatnonzero(self._table[_slots(words)])
        grams = {" ".join(words[i : i + GRAM]) for i in places.tolist()}
        shared = Counter(p for gram in grams if gram in self._grams for p in self._grams[gram])
        return {prompt for prompt, count in shared.items() if 2 * count > self._sizes[prompt]}


def prompts_of(row: Row) -> list[str]:
    """The prompts of a benchmark's row: every turn of the user.

    `turns` (MT-Bench) and `prompt` (HumanEval; a list in mt_bench_prompts) are a text or a list of
    texts or messages, `instruction` is AlpacaEval's.
    Raises: DataError naming the row's keys where none is known or the value is no text.
    """
    key = next((key for key in PROMPT_KEYS if key in row.data), None)
    if key is None:
        found = ", ".join(sorted(map(str, row.data)))[:200] or "no keys"
        hint = f"a benchmark's prompt stands under one of {', '.join(PROMPT_KEYS)}"
        raise malformed(row, f"no prompt under these keys: {found}", hint=hint)
    return list(_texts(row, row.data[key], key))


def _texts(row: Row, value: Any, key: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif key == "messages" or (isinstance(value, list) and value and isinstance(value[0], dict)):
        yield from (m["content"] for m in parse_messages(row, value, key) if m["role"] == "user")
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        yield from value
    else:
        kind = type(value).__name__
        raise malformed(row, f"`{key}` must be a text or a list of texts, found {kind}")


def _name(source: SourceSpec, row: Row) -> str:
    if not is_local(source.path):
        return source.path
    return row.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def _words(text: str) -> list[str]:
    """Words of the normalised text; plain ASCII takes a shorter way to the same words."""
    if text.isascii():
        return text.lower().translate(_ASCII_WORDS).split()
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def _slots(words: list[str]) -> np.ndarray:
    """Places in the bit table, int64, one for each 8-gram of `words` (at least 8)."""
    hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)
    count = len(words) - GRAM + 1
    combined = np.zeros(count, np.uint64)
    for i, power in enumerate(_POWERS):
        combined += hashes[i : i + count] * power
    return ((combined * _MULTIPLIER) >> np.uint64(64 - _TABLE_BITS)).astype(np.int64)
