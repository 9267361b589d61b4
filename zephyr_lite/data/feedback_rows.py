"""The schemas in which AI feedback comes, recognised row by row by their keys.

    responses + prompt [+ history]    scored answers {text, score}; history is the turns before
    completions + instruction         UltraFeedback as published: ratings are strings, "N/A" is none
    chosen + rejected [+ prompt]      ready pairs, TRL's forms and ultrafeedback_binarized:
        three texts                       prompt, chosen, rejected
        three lists of messages           prompt, and one assistant turn each
        two lists of messages             whole dialogues that differ in their last turn; a `prompt`
                                          text beside them repeats the first user turn, is not read

UltraFeedback's `custom_system_prompt` steered the teacher that wrote the answer and differs from
answer to answer; the student never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from zephyr_lite.data.messages import Message, malformed, parse_messages
from zephyr_lite.data.sources import Row

Rule = Literal["mean", "overall", "worst"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `score` is None where it was not rated. Higher is better."""

    text: str
    score: float | None


@dataclass(frozen=True, slots=True)
class ScoredAnswers:
    """A prompt (ending with the user) and its answers, from which a rule makes a pair."""

    prompt: list[Message]
    answers: list[Answer]


@dataclass(frozen=True, slots=True)
class ReadyPair:
    """A pair that was made elsewhere and is used as it is."""

    prompt: list[Message]
    chosen: Answer
    rejected: Answer


def parse_feedback(row: Row, rule: Rule) -> ScoredAnswers | ReadyPair:
    """The row by whichever schema its keys name. `rule` says which score of UltraFeedback counts.

    Raises: DataError with file and line where no schema fits or the row does not keep to its own.
    """
    data = row.data
    if "responses" in data:
        return _parse_responses(row)
    if "completions" in data:
        return _parse_ultrafeedback(row, rule)
    if "chosen" in data and "rejected" in data:
        return _parse_ready(row)
    found = ", ".join(sorted(map(str, data)))[:200] or "no keys"
    hint = "expected prompt + responses, instruction + completions, or prompt + chosen + rejected"
    raise malformed(row, f"no schema of AI feedback has these keys: {found}", hint=hint)


def _parse_responses(row: Row) -> ScoredAnswers:
    prompt = [{"role": "user", "content": _text(row, row.data, "prompt")}]
    history = row.data.get("history")
    if history:
        turns = [*_list(row, "history"), *prompt]
        prompt = parse_messages(row, turns, "history + prompt")
    items = _objects(row, "responses")
    answers = [
        Answer(
            _text(row, item, "text", f"responses[{i}]."),
            _number(
                row, _required(row, item, "score", f"responses[{i}]."), f"responses[{i}].score"
            ),
        )
        for i, item in enumerate(items)
    ]
    return ScoredAnswers(prompt, answers)


def _parse_ultrafeedback(row: Row, rule: Rule) -> ScoredAnswers:
    prompt = [{"role": "user", "content": _text(row, row.data, "instruction")}]
    answers = []
    for i, item in enumerate(_objects(row, "completions")):
        where = f"completions[{i}]."
        if rule == "overall":
            score = _number(row, item.get("overall_score"), f"{where}overall_score")
        else:
            score = _mean_rating(row, item, where)
        answers.append(Answer(_text(row, item, "response", where), score))
    return ScoredAnswers(prompt, answers)


def _mean_rating(row: Row, item: Mapping[str, Any], where: str) -> float | None:
    """Mean of the aspects that were rated; `fine-grained_score` is that mean where it stands."""
    aspects = item.get("annotations") or {}
    if not isinstance(aspects, dict):
        found = type(aspects).__name__
        raise malformed(row, f"`{where}annotations` must be an object, found {found}")
    ratings = []
    for name, aspect in aspects.items():
        if aspect is None:
            continue
        if not isinstance(aspect, dict):
            raise malformed(row, f"`{where}annotations.{name}` must be an object")
        rating = _number(row, aspect.get("Rating"), f"{where}annotations.{name}.Rating")
        if rating is not None:
            ratings.append(rating)
    if ratings:
        return sum(ratings) / len(ratings)
    return _number(row, item.get("fine-grained_score"), f"{where}fine-grained_score")


def _parse_ready(row: Row) -> ReadyPair:
    data = row.data
    scores = [_number(row, data.get(key), key) for key in ("score_chosen", "score_rejected")]
    if isinstance(data["chosen"], str) or isinstance(data["rejected"], str):
        prompt = _prompt_of(row)
        texts = [_text(row, data, key) for key in ("chosen", "rejected")]
    else:
        prompt, *texts = _parse_dialogue_pair(row)
    if prompt[-1]["role"] != "user":
        raise malformed(row, f"the prompt's last role is {prompt[-1]['role']}, must be user")
    return ReadyPair(prompt, Answer(texts[0], scores[0]), Answer(texts[1], scores[1]))


def _prompt_of(row: Row) -> list[Message]:
    if isinstance(row.data.get("prompt"), list):
        return parse_messages(row, row.data["prompt"], "prompt")
    return [{"role": "user", "content": _text(row, row.data, "prompt")}]


def _parse_dialogue_pair(row: Row) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected) of two lists of messages, with or without the prompt in them."""
    lists = [_list(row, key) for key in ("chosen", "rejected")]
    if all(len(turns) == 1 for turns in lists) or isinstance(row.data.get("prompt"), list):
        before = _prompt_of(row)
        lists = [[*before, *turns] for turns in lists]
    names = ("chosen", "rejected")
    dialogues = [parse_messages(row, turns, n) for turns, n in zip(lists, names, strict=True)]
    for name, dialogue in zip(names, dialogues, strict=True):
        if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
            raise malformed(row, f"`{name}` must end with the assistant's answer to a prompt")
    chosen, rejected = dialogues
    if chosen[:-1] != rejected[:-1]:
        hint = "chosen and rejected must share every turn but the last"
        raise malformed(row, "chosen and rejected answer different prompts", hint=hint)
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _required(row: Row, item: Mapping[str, Any], key: str, where: str = "") -> Any:
    if key not in item:
        found = ", ".join(sorted(map(str, item)))[:200] or "no keys"
        raise malformed(row, f"no key `{where}{key}`; there is {found}")
    return item[key]


def _text(row: Row, item: Mapping[str, Any], key: str, where: str = "") -> str:
    value = _required(row, item, key, where)
    if not isinstance(value, str):
        raise malformed(row, f"`{where}{key}` must be text, found {type(value).__name__}")
    return value


def _list(row: Row, key: str) -> list[Any]:
    value = row.data[key]
    if not isinstance(value, list):
        raise malformed(row, f"`{key}` must be a list, found {type(value).__name__}")
    return value


def _objects(row: Row, key: str) -> list[dict[str, Any]]:
    for i, item in enumerate(_list(row, key)):
        if not isinstance(item, dict):
            raise malformed(row, f"`{key}[{i}]` must be an object, found {type(item).__name__}")
    return row.data[key]


def _number(row: Row, value: Any, where: str) -> float | None:
    """A finite number, also as text; None for null and "N/A"."""
    if value is None or value == "N/A":
        return None
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        hint = 'write null or "N/A" where there is none'
        raise malformed(row, f"`{where}` must be a finite number, found {value!r:.40}", hint=hint)
    return number
