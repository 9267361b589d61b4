"""UltraFeedback as published: `instruction`, and per completion aspect ratings and overall_score.

A rating is text or a number ("4", "4.0", 4); "N/A", null and a missing aspect are no rating; an
aspect may stand in a list of one. The mean is over the aspects that were rated; where there is
none, a `fine-grained_score`, which is that mean, stands in for it.

The overall_score of 2,628 completions was read as 10 where the critic had written 1. The publisher
told them apart by the mean rating (`fix_overall_score_issue.py`), and so do we, under rule
`overall`: a score of 10 whose mean rating is

    at most 2         is a 1, as in the repaired release     overall_10_repaired
    above 4           is believed                            overall_10_kept
    between           was asked for anew; here it is none    overall_10_unrated
    not there         is believed: nothing speaks against    overall_10_unchecked

each counted in the report. The repaired release passes the same check: what it kept is kept.

`custom_system_prompt` steered the teacher that wrote the answer and differs from answer to answer;
the student never sees it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zephyr_lite.data.answers import (
    Answer,
    Rule,
    ScoredAnswers,
    get_objects,
    get_text,
    to_score,
)
from zephyr_lite.data.messages import malformed
from zephyr_lite.data.sources import Row

ASPECT_RANGE = (1.0, 5.0)
OVERALL_RANGE = (1.0, 10.0)
SUSPECT, REPAIRED = 10.0, 1.0
REPAIR_UP_TO, BELIEVE_ABOVE = 2.0, 4.0


def parse_ultrafeedback(row: Row, rule: Rule) -> ScoredAnswers:
    """The instruction and its completions, scored as `rule` wants it.

    A score outside its range (aspects 1 to 5, overall 1 to 10) is the answer's fault `score_range`.
    Raises: DataError with file and line where the row is not of this schema.
    """
    prompt = [{"role": "user", "content": get_text(row, row.data, "instruction")}]
    answers = []
    for i, item in enumerate(get_objects(row, "completions")):
        where = f"completions[{i}]."
        text = get_text(row, item, "response", where)
        ratings = _ratings(row, item, where)
        if rule == "overall":
            overall = to_score(row, item.get("overall_score"), f"{where}overall_score")
            answers.append(_score_overall(text, overall, ratings))
        else:
            answers.append(Answer(text, _mean(ratings), _find_fault(ratings, ASPECT_RANGE)))
    return ScoredAnswers(prompt, answers)


def _score_overall(text: str, overall: float | None, ratings: Sequence[float]) -> Answer:
    """The answer by its overall score, which is checked where it is 10."""
    if overall is None:
        return Answer(text, None)
    if overall != SUSPECT:
        return Answer(text, overall, _find_fault([overall], OVERALL_RANGE))
    fault, mean = _find_fault(ratings, ASPECT_RANGE), _mean(ratings)
    if mean is None:
        return Answer(text, overall, note="overall_10_unchecked")
    if mean <= REPAIR_UP_TO:
        return Answer(text, REPAIRED, fault, note="overall_10_repaired")
    if mean > BELIEVE_ABOVE:
        return Answer(text, overall, fault, note="overall_10_kept")
    return Answer(text, None, fault, note="overall_10_unrated")


def _ratings(row: Row, item: Mapping[str, Any], where: str) -> list[float]:
    """Ratings of the aspects that were rated, else the fine-grained score alone, else nothing."""
    aspects = item.get("annotations") or {}
    if not isinstance(aspects, dict):
        found = type(aspects).__name__
        raise malformed(row, f"`{where}annotations` must be an object, found {found}")
    ratings = [
        _aspect_rating(row, aspect, f"{where}annotations.{name}")
        for name, aspect in aspects.items()
    ]
    rated = [rating for rating in ratings if rating is not None]
    if rated:
        return rated
    mean = to_score(row, item.get("fine-grained_score"), f"{where}fine-grained_score")
    return [] if mean is None else [mean]


def _aspect_rating(row: Row, aspect: Any, where: str) -> float | None:
    if isinstance(aspect, list):
        if len(aspect) > 1:
            raise malformed(row, f"`{where}` must hold one rating, found {len(aspect)}")
        aspect = aspect[0] if aspect else None
    if aspect is None:
        return None
    if not isinstance(aspect, dict):
        raise malformed(row, f"`{where}` must be an object, found {type(aspect).__name__}")
    return to_score(row, aspect.get("Rating"), f"{where}.Rating")


def _mean(ratings: Sequence[float]) -> float | None:
    return sum(ratings) / len(ratings) if ratings else None


def _find_fault(scores: Sequence[float], within: tuple[float, float]) -> str | None:
    low, high = within
    return None if all(low <= score <= high for score in scores) else "score_range"
