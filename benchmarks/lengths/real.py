"""Lengths of real rows, as plain numbers: what a race's random token ids are cut to.

    python benchmarks/lengths/real.py --tokenizer FOLDER --pairs FILE --dialogues FILE...

Writes lengths/pairs.json and lengths/dialogues.json, which are committed: whoever races needs no
data. FOLDER holds Mistral's tokenizer.json; texts go through this project's template and truncation
rule (1,024 tokens, prompts of longer pairs to their last 512), as a training's would.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512
Lengths = list[tuple[int, int, int]]


def pair_lengths() -> Lengths:
    """(prompt, chosen, rejected) tokens of each pair."""
    return [(p, c, r) for p, c, r in _read("pairs")]


def dialogue_lengths() -> list[int]:
    """Tokens of each dialogue, uncut."""
    return _read("dialogues")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure both kinds of rows and write the files."""
    parser = argparse.ArgumentParser(description="Write the lengths that races use.")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--dialogues", type=Path, nargs="+", required=True)
    arguments = parser.parse_args(argv)
    from zephyr_lite.data.chat import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    _write("pairs", _measure_pairs(tokenizer, arguments.pairs), [arguments.pairs])
    _write("dialogues", _measure_dialogues(tokenizer, arguments.dialogues), arguments.dialogues)
    return 0


def _measure_pairs(tokenizer: Any, file: Path) -> list[list[int]]:
    from zephyr_lite.data.feedback import load_pairs
    from zephyr_lite.recipe import Source

    source = Source.model_validate({"path": str(file)})
    special = tokenizer.special_tokens
    rows, _ = load_pairs([source], None, ties="keep", on_fault="drop", special_tokens=special)
    encoded = tokenizer.encode_pairs(
        [(row.prompt, row.chosen, row.rejected) for row in rows],
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
    )
    return [[len(p.prompt), len(p.chosen), len(p.rejected)] for p in encoded]


def _measure_dialogues(tokenizer: Any, files: Sequence[Path]) -> list[int]:
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    dialogues = [json.loads(line)["messages"] for line in lines]
    sound = [d for d in dialogues if not any(tokenizer.has_special_text(m["content"]) for m in d)]
    return [len(dialogue.ids) for dialogue in tokenizer.encode_dialogues(sound)]


def _write(name: str, lengths: list[Any], files: Sequence[Path]) -> None:
    old = FOLDER / f"{name}.json"
    about = json.loads(old.read_text(encoding="utf-8"))["about"] if old.exists() else ""
    content = {"about": about, "files": [f.name for f in files], "lengths": lengths}
    old.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read(name: str) -> list[Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["lengths"]


if __name__ == "__main__":
    raise SystemExit(main())
