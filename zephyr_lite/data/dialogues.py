"""Rows become dialogues for dSFT, or plain documents for pre-training.

A row passes, in this order: the mixture (is it drawn?), soundness (`dialogue_rows`, `messages`),
the refusal filter, decontamination, truecasing. It is used whole or not at all: nothing is cut, so
a dialogue that ends with the user is a counted fault (`last_turn_not_assistant`), no shorter one.
A malformed row stops the run even where the mixture would leave it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.dialogue_rows import missing, parse_dialogue
from zephyr_lite.data.messages import (
    SPECIAL_TOKENS,
    Message,
    content_hash,
    find_fault,
    find_text_fault,
    malformed,
    row_id,
    row_source,
)
from zephyr_lite.data.mixture import copies
from zephyr_lite.data.refusals import find_refusal
from zephyr_lite.data.report import OnFault, Report
from zephyr_lite.data.sources import Row, SourceSpec, read_source
from zephyr_lite.data.truecase import truecase
from zephyr_lite.errors import DataError


@dataclass(frozen=True, slots=True)
class Dialogue:
    """`messages`: an optional system turn, then user and assistant alternating, assistant last."""

    id: str
    source: str
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class Document:
    """A plain text for pre-training."""

    id: str
    source: str
    text: str


@dataclass(frozen=True, slots=True)
class DialogueRule:
    """What is done to dialogues: which are left out, what in them is repaired.

    `special_tokens`: `ChatTokenizer.special_tokens` of the base. `seed`: of the mixture's draws.
    """

    truecase: bool = False
    drop_refusals: bool = False
    special_tokens: Sequence[str] = SPECIAL_TOKENS
    decontaminator: Decontaminator | None = None
    seed: int = 42


def iter_dialogues(
    sources: Sequence[SourceSpec],
    rule: DialogueRule,
    report: Report,
    limit: int | None = None,
    *,
    offline: bool = False,
) -> Iterator[Dialogue]:
    """Dialogues of `sources`, in their order, one row in memory; ends after `limit` kept rows.

    A row of a source of weight 2 comes twice, as the same object; it is counted once as kept, and
    the other time as `repeated`. `report` is complete, and checked, when the last one was taken.

    Faults: `empty_answer`, `empty_user`, `special_token_text`, `nul_text`, `no_assistant_turn`,
    `last_turn_not_assistant`, and those of `dialogue_rows.parse_dialogue`. Under `on_fault="stop"`
    the first one raises, under "drop" it is counted; `not_sampled`, `refusal` and `contaminated`
    are only counted.
    Raises: DataError at a malformed row always, at a faulty one under "stop".
    """
    _list_steps(sources, rule, report)
    kept = 0
    for source in sources:
        for row in read_source(source, offline=offline):
            if limit is not None and kept >= limit:
                break
            report.read(row)
            times = copies(source.weight, rule.seed, row)
            dialogue = _make_dialogue(row, times, rule, report)
            if dialogue is None:
                continue
            kept += 1
            report.keep(row)
            if times > 1:
                report.note(row, "repeated", times - 1)
            yield from itertools.repeat(dialogue, times)
    report.check()


def load_dialogues(
    sources: Sequence[SourceSpec],
    limit: int | None = None,
    *,
    on_fault: OnFault = "stop",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    offline: bool = False,
) -> tuple[list[Dialogue], Report]:
    """`iter_dialogues` as a list: weights count, every filter is off."""
    report = Report(on_fault)
    rule = DialogueRule(special_tokens=special_tokens)
    return list(iter_dialogues(sources, rule, report, limit, offline=offline)), report


def _list_steps(sources: Sequence[SourceSpec], rule: DialogueRule, report: Report) -> None:
    switches = {
        "mixture": any(source.weight != 1 for source in sources),
        "refusals": rule.drop_refusals,
        "decontamination": rule.decontaminator is not None,
        "truecasing": rule.truecase,
    }
    report.steps_on |= {step for step, is_on in switches.items() if is_on}
    if rule.decontaminator is not None:
        report.benchmarks = dict(rule.decontaminator.counts)


def _make_dialogue(row: Row, times: int, rule: DialogueRule, report: Report) -> Dialogue | None:
    """The row's dialogue, or None where it was dropped; `report` then holds the reason."""
    messages, fault = parse_dialogue(row)
    if times == 0:
        report.drop(row, "not_sampled")
        return None
    name = row_id(row, lambda: messages)
    if fault := fault or _find_dialogue_fault(messages, rule.special_tokens):
        report.drop(row, fault)
        return None
    if rule.drop_refusals and find_refusal(messages) is not None:
        report.drop(row, "refusal")
        return None
    if rule.decontaminator and (benchmark := rule.decontaminator.match(_contents(messages))):
        report.drop(row, "contaminated", benchmark)
        return None
    if rule.truecase:
        messages = _truecase(row, messages, report)
    return Dialogue(name, row_source(row), messages)


def _contents(messages: Sequence[Message]) -> Iterator[str]:
    return (message["content"] for message in messages)


def _truecase(row: Row, messages: Sequence[Message], report: Report) -> list[Message]:
    repaired = []
    for message in messages:
        content = message["content"]
        if message["role"] == "user":
            content = truecase(content)
        if content != message["content"]:
            report.note(row, "truecased_turns")
        repaired.append({"role": message["role"], "content": content})
    return repaired


def _find_dialogue_fault(messages: list[Message], special_tokens: Sequence[str]) -> str | None:
    if not any(message["role"] == "assistant" for message in messages):
        return "no_assistant_turn"
    if messages[-1]["role"] != "assistant":
        return "last_turn_not_assistant"
    return find_fault(messages, special_tokens)


def read_texts(
    sources: Sequence[SourceSpec],
    limit: int | None = None,
    *,
    on_fault: OnFault = "stop",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    offline: bool = False,
) -> tuple[list[Document], Report]:
    """Documents of rows {"text": ...}; arguments and errors as in `load_dialogues`.

    Faults: `empty_text`, `special_token_text`, `nul_text`.
    """
    report, documents = Report(on_fault), []
    for source in sources:
        for row in read_source(source, offline=offline):
            if limit is not None and len(documents) >= limit:
                break
            report.read(row)
            text = _parse_text(row)
            fault = find_text_fault(text, special_tokens) if text.strip() else "empty_text"
            if fault:
                report.drop(row, fault)
                continue
            report.keep(row)
            name = row_id(row, lambda text=text: content_hash(text))
            documents.append(Document(name, row_source(row), text))
    report.check()
    return documents, report


def _parse_text(row: Row) -> str:
    if "text" not in row.data:
        raise malformed(row, missing("text", row), hint='a document row is {"text": ...}')
    text = row.data["text"]
    if not isinstance(text, str):
        raise DataError(
            f"`text` must be text, found {type(text).__name__}", file=row.file, line=row.line
        )
    return text
