"""AI feedback becomes preference pairs: (prompt, chosen, rejected).

Scored answers become a pair by a rule: chosen is the best (the first of several equally good),
rejected is

    mean, overall    a random other answer (the paper, arXiv 2310.16944, section 3.2)
    worst            the lowest-scored other answer

where `mean` and `worst` compare UltraFeedback's mean aspect rating, `overall` its overall_score;
answers that come with one score are compared by that, ranked ones by their rank. The draw depends
on the seed and the row's id (its content, where it has none) alone, so neither the order of files
nor a limit changes a pair. Ready pairs are used as they are.

An answer that is empty, unrated or spells a control token is set aside, and the rule chooses among
the others; a row with fewer than two left is dropped. An answer with the very text of the chosen
one is never its rejected. So which rows are kept does not hang on the draw, ties excepted.

A row passes, in this order: its schema, the mixture (excluded sources, weights), soundness,
decontamination, the rule. A malformed row stops the run even where the mixture would leave it out:
which rows are taken hangs on a seed, whether a file can be read must not.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from zephyr_lite.data.answers import Answer, FaultyRow, ReadyPair, Rule, ScoredAnswers
from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.feedback_rows import parse_feedback
from zephyr_lite.data.messages import (
    SPECIAL_TOKENS,
    Message,
    content_hash,
    find_fault,
    find_text_fault,
    row_id,
    row_source,
)
from zephyr_lite.data.mixture import copies
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
    """How a row becomes a pair: which rule, what of ties, the seed of the draw; what is left out.

    `exclude_sources`: values of a row's own `source`. `decontaminator`: of the benchmarks whose
    prompts are left out.
    """

    rule: Rule = "mean"
    ties: Ties = "drop"
    seed: int = 42
    special_tokens: Sequence[str] = SPECIAL_TOKENS
    exclude_sources: Sequence[str] = ()
    decontaminator: Decontaminator | None = None


def load_pairs(
    sources: Sequence[SourceSpec],
    limit: int | None = None,
    *,
    rule: Rule = "mean",
    ties: Ties = "drop",
    seed: int = 42,
    on_fault: OnFault = "stop",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    exclude_sources: Sequence[str] = (),
    decontaminator: Decontaminator | None = None,
    offline: bool = False,
) -> tuple[list[PreferencePair], Report]:
    """Pairs of `sources`, in their order; reading ends after `limit` kept rows.

    A row of a source with weight 2 gives its pair twice (`repeated` is noted for each further one),
    under weight 0.5 a seeded half of the rows is taken (`not_sampled` are the others).

    Faults: `empty_prompt`, `empty_answer`, `equal_texts`, `too_few_responses`, `score_range`,
    `special_token_text`, `nul_text`, `score_order` (a ready pair scored the wrong way round),
    `different_prompts`, `transcript_order`. Under `on_fault="stop"` the first one raises, also
    where only one of several answers has it; under "drop" it is counted. `tie`, `duplicate` (the
    same three texts in another row), `not_sampled`, `excluded_source` and `contaminated` are only
    counted.
    Raises: DataError at a malformed row always, at a faulty one under "stop".
    """
    how = PairRule(rule, ties, seed, special_tokens, exclude_sources, decontaminator)
    report, pairs, seen = Report(on_fault), [], set()
    report.steps_on |= _steps_on(sources, how)
    if decontaminator is not None:
        report.benchmarks = dict(decontaminator.counts)
    for source in sources:
        for row in read_source(source, offline=offline):
            if limit is not None and report.kept.total() >= limit:
                break
            report.read(row)
            times = copies(source.weight, seed, row)
            pair = make_pair(row, how, report, times=times)
            if pair is None:
                continue
            key = content_hash([pair.prompt, pair.chosen, pair.rejected])
            if key in seen:
                report.drop(row, "duplicate")
                continue
            seen.add(key)
            report.keep(row)
            if times > 1:
                report.note(row, "repeated", times - 1)
            pairs += [pair] * times
    report.check()
    return pairs, report


def _steps_on(sources: Sequence[SourceSpec], how: PairRule) -> set[str]:
    is_mixed = bool(how.exclude_sources) or any(source.weight != 1 for source in sources)
    steps = {"mixture": is_mixed, "decontamination": how.decontaminator is not None, "pairs": True}
    return {step for step, is_on in steps.items() if is_on}


def make_pair(row: Row, how: PairRule, report: Report, *, times: int = 1) -> PreferencePair | None:
    """The row's pair, or None where it was dropped; `report` then holds the reason.

    Args:
        times: how often the mixture takes the row; 0 drops it.
    """
    try:
        parsed = parse_feedback(row, how.rule)
    except FaultyRow as fault:
        parsed = fault
    if left_out := _find_left_out(row, how, times):
        report.drop(row, *left_out)
        return None
    if isinstance(parsed, FaultyRow):
        report.drop(row, parsed.reason, parsed.detail)
        return None
    answers = _select_sound(row, parsed, how, report)
    if answers is None:
        return None
    if benchmark := _find_benchmark(parsed.prompt, how):
        report.drop(row, "contaminated", benchmark)
        return None
    name = row_id(row, lambda: _content(parsed))
    if isinstance(parsed, ScoredAnswers):
        answers = _draw(row, name, answers, how, report)
        if answers is None:
            return None
    chosen, rejected = answers
    if chosen.score is not None and chosen.score == rejected.score:
        report.note(row, "tie_kept")
    scores = (chosen.score, rejected.score)
    return PreferencePair(name, row_source(row), parsed.prompt, chosen.text, rejected.text, *scores)


def _find_left_out(row: Row, how: PairRule, times: int) -> tuple[str, str] | None:
    """(reason, detail) for which the mixture leaves the row out, or None."""
    own = row.data.get("source")
    names = own if isinstance(own, list) else [own]  # Nectar's is a list
    excluded = [name for name in names if name in how.exclude_sources]
    if excluded:
        return "excluded_source", str(excluded[0])
    return None if times else ("not_sampled", "")


def _find_benchmark(prompt: Sequence[Message], how: PairRule) -> str | None:
    """The benchmark whose prompt the user asks here; the answers are not looked at."""
    if how.decontaminator is None:
        return None
    return how.decontaminator.match([m["content"] for m in prompt if m["role"] == "user"])


def _content(parsed: ScoredAnswers | ReadyPair) -> list[Any]:
    """What identifies a row that has no id."""
    if isinstance(parsed, ReadyPair):
        return [parsed.prompt, parsed.chosen.text, parsed.rejected.text]
    return [parsed.prompt, [answer.text for answer in parsed.answers]]


def _select_sound(
    row: Row, parsed: ScoredAnswers | ReadyPair, how: PairRule, report: Report
) -> list[Answer] | None:
    """The answers that can be used, at least two that differ; None where the row was dropped."""
    fault = find_fault(parsed.prompt, how.special_tokens)
    if fault:
        report.drop(row, "empty_prompt" if fault == "empty_user" else fault)
        return None
    if isinstance(parsed, ScoredAnswers):
        answers = _select_usable(row, parsed, how, report)
        if answers is None:
            return None
    else:
        answers = [parsed.chosen, parsed.rejected]
        fault = next(filter(None, (_find_answer_fault(answer, how) for answer in answers)), None)
    if not fault and len({answer.text for answer in answers}) == 1:
        fault = "equal_texts"
    if not fault and isinstance(parsed, ReadyPair) and _is_reversed(parsed):
        fault = "score_order"
    if fault:
        report.drop(row, fault)
        return None
    return answers


def _is_reversed(pair: ReadyPair) -> bool:
    first, second = pair.chosen.score, pair.rejected.score
    return first is not None and second is not None and first < second


def _find_answer_fault(answer: Answer, how: PairRule) -> str | None:
    if not answer.text.strip():
        return "empty_answer"
    return find_text_fault(answer.text, how.special_tokens) or answer.fault


def _draw(
    row: Row, name: str, rated: Sequence[Answer], how: PairRule, report: Report
) -> list[Answer] | None:
    """[chosen, rejected] by the rule, or None where they tie and ties are dropped."""
    best = max(rated, key=_score)
    others = [answer for answer in rated if answer.text != best.text]
    if how.rule == "worst":
        rejected = min(others, key=_score)
    else:
        rejected = random.Random(f"{how.seed}:{name}").choice(others)
    if best.score == rejected.score and how.ties == "drop":
        report.drop(row, "tie")
        return None
    return [best, rejected]


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
        if answer.note:
            report.note(row, answer.note)
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
