"""Dialogues to packed rows at ultrachat_200k's size: time, rate and memory.

    python benchmarks/tokenise.py --tokenizer FOLDER                   200,000 dialogues; minutes
    python benchmarks/tokenise.py --tokenizer FOLDER --dialogues 2000  a trial

The dialogues are made here, the same ones every time: messages of 6 or 8 turns, in words of the
tokenizer's vocabulary and compounds of them drawn by Zipf's law, about 1,370 tokens each under
Mistral's tokenizer, as the published 285.5 M tokens over 208,000 dialogues imply. They are read,
checked, tokenised, stored, mapped and packed into rows of 2,048 tokens by the code that
`zephyr-lite sft` runs, in a process of its own with an empty cache. Needs about 13 KB of temporary
disk per dialogue; everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SEED, MAX_LENGTH = 1, 2048
# Zipf's law over this many words: 9% of the first 1.5 M words (with their marks) are new, where
# real dialogues have 6%, so remembering words is not flattered.
VOCABULARY, EXPONENT, SHIFT = 150_000, 1.15, 2.7
MARKS = (",", ".", ",", ".\n\n", ",", ".", ",", ".", ":", ".", ",", "?", ".")
WORDS_PER_TURN = 229  # of an assistant; a user says a quarter of that
SAMPLE_SECONDS = 0.05


def main() -> None:
    """Make the dialogues, measure a child, append the row."""
    parser = argparse.ArgumentParser(description="Dialogues to packed rows.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--dialogues", type=int, default=200_000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/tokenise.jsonl")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child, arguments.tokenizer)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dialogues.jsonl"
        write_dialogues(file, arguments.dialogues, arguments.tokenizer)
        command = [sys.executable, __file__, "--child", str(file)]
        command += ["--tokenizer", str(arguments.tokenizer.resolve())]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        row = {"benchmark": "tokenise", **json.loads(done.stdout), **_provenance()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def write_dialogues(file: Path, count: int, tokenizer: Path) -> None:
    """`count` rows {prompt_id, messages}; the lengths vary from a quarter to twice the mean."""
    rng = np.random.default_rng(SEED)
    words = _make_words(random.Random(SEED), tokenizer)
    with file.open("w", encoding="utf-8") as handle:
        for number in range(count):
            size = WORDS_PER_TURN * rng.triangular(0.25, 0.75, 2)
            messages = []
            for turn in range(6 + 2 * int(rng.integers(2))):
                length = size * (rng.uniform(0.5, 1.5) if turn % 2 else rng.uniform(0.1, 0.4))
                role = "assistant" if turn % 2 else "user"
                text = _write(rng, words, max(3, int(length)))
                messages.append({"role": role, "content": text})
            row = {"prompt_id": f"synthetic-{number}", "messages": messages}
            handle.write(json.dumps(row) + "\n")


def _make_words(rng: random.Random, tokenizer: Path) -> list[str]:
    """Whole words of the vocabulary, which stand in it by frequency, then compounds of them."""
    from tokenizers import Tokenizer

    numbers = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab()
    pieces = sorted(numbers, key=numbers.__getitem__)
    words = [p[1:] for p in pieces if re.fullmatch("\u2581[A-Za-z]+", p) and len(p) > 2]
    endings = [p for p in pieces if re.fullmatch("[a-z]{2,6}", p)]
    found = dict.fromkeys(words)
    while len(found) < VOCABULARY:
        found[rng.choice(words) + rng.choice(endings)] = None
    return list(found)


def _write(rng: np.random.Generator, words: list[str], length: int) -> str:
    """Words by Zipf's law, in sentences of about 14 and paragraphs of about 5 sentences."""
    power = 1 - EXPONENT
    low, high = SHIFT**power, (len(words) - 1 + SHIFT) ** power
    ranks = (low + rng.random(length) * (high - low)) ** (1 / power) - SHIFT
    chosen = [words[rank] for rank in ranks.astype(np.int64).tolist()]
    for at in np.flatnonzero(rng.random(length) < 0.16).tolist():
        chosen[at] += MARKS[at % len(MARKS)]
    text = " ".join(chosen)
    return (text[0].upper() + text[1:]).replace("\n ", "\n").strip()


def measure(file: Path, tokenizer: Path) -> dict[str, Any]:
    """Read, tokenise and pack one file; figures of this process."""
    from zephyr_lite.data.chat import load_tokenizer
    from zephyr_lite.data.layout import pack_masked
    from zephyr_lite.data.token_store import Corpus, open_tokens
    from zephyr_lite.recipe import Source

    chat = load_tokenizer(tokenizer)
    imported = _status("VmRSS")
    home = file.parent / "home"
    corpus = Corpus(sources=[Source.model_validate({"path": str(file)})], on_fault="stop")
    with _PeakOf("RssAnon") as anonymous:
        began, cpu = time.monotonic(), time.process_time()
        tokens = open_tokens(corpus, chat, home, lambda text: print(text, file=sys.stderr))
        tokenised, cpu = time.monotonic(), time.process_time() - cpu
        assert tokens.documents is not None
        rows = pack_masked(tokens.documents, MAX_LENGTH)
        packed = time.monotonic()
        open_tokens(corpus, chat, home, print)
        opened = time.monotonic()
    documents = tokens.documents
    count, total = len(documents), int(documents.offsets[-1])
    return {
        "dialogues": count,
        "tokens": total,
        "rows": len(rows),
        "row_tokens": MAX_LENGTH,
        "density": round(total / (len(rows) * MAX_LENGTH), 5),
        "tokenise_seconds": round(tokenised - began, 2),
        "tokenise_cpu_seconds": round(cpu, 2),
        "pack_seconds": round(packed - tokenised, 2),
        "reopen_seconds": round(opened - packed, 2),
        "dialogues_per_second": round(count / (tokenised - began), 1),
        "tokens_per_second": round(total / (tokenised - began)),
        "peak_rss_gib": _gib(_status("VmHWM")),
        "peak_anonymous_gib": _gib(anonymous.peak),
        "imported_rss_gib": _gib(imported),
        "source_bytes": file.stat().st_size,
        "store_bytes": sum(f.stat().st_size for f in home.rglob("*") if f.is_file()),
        "threads": os.environ.get("RAYON_NUM_THREADS"),
    }


class _PeakOf:
    """The largest value of a line of /proc/self/status, sampled; `peak` in bytes."""

    def __init__(self, name: str) -> None:
        self.peak, self._name, self._over = 0, name, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakOf:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, _status(self._name))


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        sys.exit(f"no {name} in /proc/self/status: this benchmark needs Linux")
    return int(found[1]) << 10


def _gib(size: int) -> float:
    return round(size / (1 << 30), 3)


def _provenance() -> dict[str, Any]:
    """Where the row comes from; `+dirty` where the checkout differs from its commit."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("tokenizers", "numpy")},
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "load": [round(load, 1) for load in os.getloadavg()],
        "commit": git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else ""),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


if __name__ == "__main__":
    main()
