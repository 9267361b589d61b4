"""The schemas in which AI feedback comes, recognised row by row by their keys.

    responses + prompt [+ history]    several answers to one prompt; history is the turns before:
        {text, score}                     higher is better
        {text, rank}                      0 or 1 is best, lower is better; its score is -rank, and
                                          a score beside it goes before it
        texts, and `ranks` or `ranking`   the same, the rank of each text in a list beside them
    answers + prompt                  Nectar: {answer, rank}
    completions + instruction         UltraFeedback as published, see ultrafeedback.py
    chosen + rejected [+ prompt]      ready pairs, see ready_pairs.py

A prompt is a text, a list of messages, or a transcript (`\\n\\nHuman: ...\\n\\nAssistant:`).
"""

from __future__ import annotations

from typing import Any

from zephyr_lite.data.answers import (
    Answer,
    ReadyPair,
    Rule,
    ScoredAnswers,
    get,
    get_list,
    get_objects,
    get_text,
    to_number,
    to_score,
)
from zephyr_lite.data.messages import Message, malformed, parse_messages
from zephyr_lite.data.ready_pairs import parse_prompt, parse_ready
from zephyr_lite.data.sources import Row
from zephyr_lite.data.ultrafeedback import parse_ultrafeedback

RANK_LISTS = ("ranks", "ranking")


def parse_feedback(row: Row, rule: Rule) -> ScoredAnswers | ReadyPair:
    """The row by whichever schema its keys name. `rule` says which score of UltraFeedback counts.

    Raises: DataError with file and line where no schema fits or the row does not keep to its own.
    """
    data = row.data
    if "responses" in data:
        return _parse_responses(row)
    if "completions" in data:
        return parse_ultrafeedback(row, rule)
    if "answers" in data:
        return _parse_nectar(row)
    if "chosen" in data and "rejected" in data:
        return parse_ready(row)
    found = ", ".join(sorted(map(str, data)))[:200] or "no keys"
    hint = "expected prompt + responses, instruction + completions, or prompt + chosen + rejected"
    raise malformed(row, f"no schema of AI feedback has these keys: {found}", hint=hint)


def _parse_responses(row: Row) -> ScoredAnswers:
    """{text, score}, {text, rank}, or texts with a list of ranks beside them."""
    items = get_list(row, "responses")
    ranks = next((key for key in RANK_LISTS if key in row.data), None)
    if ranks and all(isinstance(item, str) for item in items):
        return ScoredAnswers(_parse_history(row), _rank_texts(row, items, ranks))
    objects = get_objects(row, "responses")
    is_ranked = any("rank" in item for item in objects)
    is_scored = any("score" in item for item in objects) or not is_ranked
    answers = []
    for i, item in enumerate(objects):
        where = f"responses[{i}]."
        text = get_text(row, item, "text", where)
        if is_scored:
            score = to_score(row, get(row, item, "score", where), f"{where}score")
        else:
            score = _rank_score(row, get(row, item, "rank", where), f"{where}rank")
        answers.append(Answer(text, score))
    return ScoredAnswers(_parse_history(row), answers)


def _parse_history(row: Row) -> list[Message]:
    """The turns of `history`, where there are any, and then `prompt`; the user speaks last."""
    prompt = parse_prompt(row)
    if row.data.get("history"):
        prompt = parse_messages(row, [*get_list(row, "history"), *prompt], "history + prompt")
    if prompt[-1]["role"] != "user":
        raise malformed(row, f"the prompt's last role is {prompt[-1]['role']}, must be user")
    return prompt


def _rank_texts(row: Row, texts: list[str], key: str) -> list[Answer]:
    ranks = get_list(row, key)
    if len(ranks) != len(texts):
        raise malformed(
            row,
            f"`{key}` must rank every response, found {len(ranks)} ranks "
            f"for {len(texts)} responses",
        )
    return [
        Answer(text, _rank_score(row, rank, f"{key}[{i}]"))
        for i, (text, rank) in enumerate(zip(texts, ranks, strict=True))
    ]


def _parse_nectar(row: Row) -> ScoredAnswers:
    answers = []
    for i, item in enumerate(get_objects(row, "answers")):
        where = f"answers[{i}]."
        text, rank = get_text(row, item, "answer", where), get(row, item, "rank", where)
        answers.append(Answer(text, _rank_score(row, rank, f"{where}rank")))
    return ScoredAnswers(_parse_history(row), answers)


def _rank_score(row: Row, rank: Any, where: str) -> float:
    """A rank as a score: the higher the better. Raises: DataError where it is no rank."""
    number = to_number(row, rank, where, "0 or 1 is the best rank, lower is better")
    if number < 0:
        raise malformed(row, f"`{where}` must be 0 or above, found {rank!r:.40}")
    return 0.0 - number
