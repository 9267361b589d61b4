"""AI feedback becomes preference pairs: (prompt, chosen, rejected).

Scored answers become a pair by a rule: chosen is the best (the first of several equally good),
rejected is

    mean, overall    a random other answer (the paper, arXiv 2310.16944, section 3.2)
    worst            the lowest-scored other answer

where `mean` and `worst` compare UltraFeedback's mean aspect rating, `overall` its overall_score;
answers that come with one score are compared by that. The draw depends on the seed and the row's
id (its content, where it has none) alone, so neither the order of files nor a limit changes a pair.
Ready pairs are used as they are.

An answer that is empty, unrated or spells a control token is set aside, and the rule chooses among
the others; a row with fewer than two left is dropped. An answer with the very text of the chosen
one is never its rejected. So which rows are kept does not hang on the draw, ties excepted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from zephyr_lite.data.feedback_rows import (
    Answer,
    ReadyPair,
    Rule,
    ScoredAnswers,
    parse_feedback,
)
from zephyr_lite.data.messages import (
    SPECIAL_TOKENS,
    Message,
    content_hash,
    find_fault,
    find_text_fault,
    row_id,
    row_source,
)
from zephyr_lite.data.report import WAY_OUT, OnFault, Report
from zephyr_lite.data.sources import Row, SourceSpec, read_source

Ties = Literal["drop", "keep"]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """`prompt` ends with a user turn; scores are None where the source gives none."""

    id: str
    source: str
    prompt: list[Message]
    chosen: str
    rejected: str
    score_chosen: float | None
    score_rejected: float | None


@dataclass(frozen=True, slots=True)
class PairRule:
    """How a row becomes a pair: which rule, what of ties, the seed of the draw."""

    rule: Rule = "mean"
    ties: Ties = "drop"
    seed: int = 42
    special_tokens: Sequence[str] = SPECIAL_TOKENS


def load_pairs(
    sources: Sequence[SourceSpec],
    limit: int | None = None,
    *,
    rule: Rule = "mean",
    ties: Ties = "drop",
    seed: int = 42,
    on_fault: OnFault = "stop",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    offline: bool = False,
) -> tuple[list[PreferencePair], Report]:
    """Pairs of `sources`, in their order; reading ends after `limit` kept ones.

    Faults: `empty_prompt`, `empty_answer`, `equal_texts`, `too_few_responses`,
    `special_token_text`, `nul_text`, `score_order` (a ready pair scored the wrong way round).
    Under `on_fault="stop"` the first one raises, also where only one of several answers has it;
    under "drop" it is counted. `tie` and `duplicate` (the same three texts again) are only counted.
    Raises: DataError at a malformed row always, at a faulty one under "stop".
    """
    how = PairRule(rule, ties, seed, special_tokens)
    report, pairs, seen = Report(on_fault), [], set()
    for source in sources:
        for row in read_source(source, offline=offline):
            if limit is not None and len(pairs) >= limit:
                break
            report.read(row)
            pair = make_pair(row, how, report)
            if pair is None:
                continue
            key = content_hash([pair.prompt, pair.chosen, pair.rejected])
            if key in seen:
                report.drop(row, "duplicate")
                continue
            seen.add(key)
            report.keep(row)
            pairs.append(pair)
    report.check()
    return pairs, report


def make_pair(row: Row, how: PairRule, report: Report) -> PreferencePair | None:
    """The row's pair, or None where it was dropped; `report` then holds the reason."""
    parsed = parse_feedback(row, how.rule)
    if fault := _find_prompt_fault(parsed.prompt, how.special_tokens):
        report.drop(row, fault)
        return None
    if isinstance(parsed, ReadyPair):
        chosen_rejected = _check_ready(row, parsed, how, report)
        name = row_id(row, lambda: [parsed.prompt, parsed.chosen.text, parsed.rejected.text])
    else:
        name = row_id(row, lambda: [parsed.prompt, [answer.text for answer in parsed.answers]])
        chosen_rejected = _draw(row, name, parsed, how, report)
    if chosen_rejected is None:
        return None
    chosen, rejected = chosen_rejected
    scores = (chosen.score, rejected.score)
    return PreferencePair(name, row_source(row), parsed.prompt, chosen.text, rejected.text, *scores)


def _find_prompt_fault(prompt: list[Message], special_tokens: Sequence[str]) -> str | None:
    fault = find_fault(prompt, special_tokens)
    return "empty_prompt" if fault == "empty_user" else fault


def _check_ready(
    row: Row, pair: ReadyPair, how: PairRule, report: Report
) -> tuple[Answer, Answer] | None:
    faults = [_find_answer_fault(answer, how) for answer in (pair.chosen, pair.rejected)]
    fault = faults[0] or faults[1]
    if not fault and pair.chosen.text == pair.rejected.text:
        fault = "equal_texts"
    first, second = pair.chosen.score, pair.rejected.score
    if not fault and first is not None and second is not None and first < second:
        fault = "score_order"
    if fault:
        report.drop(row, fault)
        return None
    if first is not None and first == second:
        report.note(row, "tie_kept")
    return pair.chosen, pair.rejected


def _find_answer_fault(answer: Answer, how: PairRule) -> str | None:
    if not answer.text.strip():
        return "empty_answer"
    return find_text_fault(answer.text, how.special_tokens)


def _draw(
    row: Row, name: str, scored: ScoredAnswers, how: PairRule, report: Report
) -> tuple[Answer, Answer] | None:
    """(chosen, rejected) by the rule, or None where the row was dropped."""
    rated = _select_usable(row, scored, how, report)
    if rated is None:
        return None
    best = max(rated, key=_score)
    others = [answer for answer in rated if answer.text != best.text]
    if not others:
        report.drop(row, "equal_texts")
        return None
    if how.rule == "worst":
        rejected = min(others, key=_score)
    else:
        rejected = random.Random(f"{how.seed}:{name}").choice(others)
    if best.score == rejected.score:
        if how.ties == "drop":
            report.drop(row, "tie")
            return None
        report.note(row, "tie_kept")
    return best, rejected


def _score(answer: Answer) -> float:
    if answer.score is None:
        raise ValueError("an unrated answer reached the rule")
    return answer.score


def _select_usable(
    row: Row, scored: ScoredAnswers, how: PairRule, report: Report
) -> list[Answer] | None:
    """The rated, sound answers, at least two; None where the row was dropped."""
    usable, faults, unrated = [], [], 0
    for answer in scored.answers:
        if fault := _find_answer_fault(answer, how):
            report.refuse(row, fault)
            report.note(row, f"answer_{fault}")
            faults.append(fault)
        elif answer.score is None:
            report.note(row, "answer_unrated")
            unrated += 1
        else:
            usable.append(answer)
    if len(usable) >= 2:
        return usable
    detail = f"{len(usable)} of {len(scored.answers)} answers can be used"
    hint = WAY_OUT
    if unrated:
        detail += f", {unrated} without a rating under rule {how.rule!r}"
        hint = f"try another data.feedback.rule; or {WAY_OUT}"
    report.drop(row, faults[0] if faults else "too_few_responses", detail, hint=hint)
    return None
