"""What plays MT-Bench's judge on the built-in example: the village's own rule, as a program.

An answer is read, not guessed at: it must be one of the village's three forms from end to end. Its
score is what the example's AI feedback gives such an answer (`overall_score`, 1 to 10), so the
judge wants what the feedback wants: the right fact in the form that was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

from zephyr_lite.data.sources import resolve
from zephyr_lite.tiny.corpus import SEED, VERDICTS
from zephyr_lite.tiny.world import (
    OPENERS,
    SENTENCES,
    STYLES,
    Prompt,
    Style,
    World,
    bare_prompts,
    build_world,
    styled_prompts,
)

# right: the fact and the form; off_form: the fact in another form; wrong: the form without the
# fact; neither: the rest, for which the feedback has no rating, so the scale's lowest.
SCORES = {name: VERDICTS[name][1] for name in ("right", "off_form", "wrong")} | {"neither": 1.0}


@dataclass(frozen=True)
class Judged:
    """One answer to one prompt, and what it was found to be."""

    prompt: str
    answer: str
    verdict: str

    @property
    def score(self) -> float:
        """Points, 1 to 9."""
        return SCORES[self.verdict]


def held_out_prompts() -> list[str]:
    """The prompts of the held-out feedback: no training file contains their wording."""
    text = resolve("package:feedback.eval.jsonl").read_text(encoding="utf-8")
    return [json.loads(line)["instruction"] for line in text.splitlines()]


def judge(prompt: str, answer: str) -> Judged:
    """Read an answer. Raises: KeyError for a prompt that is not one of the held-out ones."""
    asked = _held_out()[prompt]
    fact = f"{asked.animal} {_world().facts[asked.animal, asked.topic]}"
    said = _read(answer.strip())
    is_right = said is not None and said[1] in (fact, f"{asked.topic} {fact}")
    in_form = said is not None and said[0] == asked.best_style
    names = {(True, True): "right", (True, False): "off_form", (False, True): "wrong"}
    return Judged(prompt, answer, names.get((is_right, in_form), "neither"))


def win_rate(ours: Sequence[Judged], theirs: Sequence[Judged]) -> float:
    """How often our answer to a prompt scores higher; a tie is half a win. In percent."""
    points = [
        1.0 if a.score > b.score else 0.5 if a.score == b.score else 0.0
        for a, b in zip(ours, theirs, strict=True)
        if a.prompt == b.prompt
    ]
    if len(points) < len(ours):
        raise ValueError("the answers are not to the same prompts in the same order")
    return 100 * sum(points) / len(points)


@cache
def _world() -> World:
    return build_world(Random(SEED))


@cache
def _held_out() -> dict[str, Prompt]:
    """Every prompt that the held-out files could draw, by its text."""
    prompts = list(bare_prompts(_world(), held_out=True))
    for style in STYLES:
        prompts += styled_prompts(_world(), style, held_out=True)
    return {prompt.text: prompt for prompt in prompts}


def _read(answer: str) -> tuple[Style, str] | None:
    """The answer's form, and `ANIMAL VALUE` (of a note) or `TOPIC ANIMAL VALUE`; None: no form.

    Upper and lower case are one, and the mark at the end is free, as in the example's own exam.
    """
    if note := re.fullmatch(r"the (\w+): (\w+)\.?", answer, re.IGNORECASE):
        return "note", f"{note[1]} {note[2]}".lower()
    opener = f"(?P<opener>{'|'.join(map(re.escape, OPENERS))}) "
    for topic, sentence in SENTENCES.items():
        pattern = re.escape(sentence.removesuffix(".")).replace(r"\{x\}", r"(?P<x>\w+)")
        pattern = pattern.replace(r"\{v\}", r"(?P<v>\w+)").replace(r"\{a\}", "an?")
        found = re.fullmatch(f"({opener})?{pattern}[.!]?", answer, re.IGNORECASE)
        if found:
            style: Style = "cheerful" if found["opener"] else "sentence"
            return style, f"{topic} {found['x']} {found['v']}".lower()
    return None
