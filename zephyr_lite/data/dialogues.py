"""Rows become dialogues for dSFT, or plain documents for pre-training.

A dialogue row has `messages` [{role, content}] as ultrachat_200k does; other columns are ignored.
A row is used whole or not at all: nothing is cut or repaired, so a dialogue that ends with the user
is a counted fault (`last_turn_not_assistant`), not a shorter dialogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zephyr_lite.data.messages import (
    SPECIAL_TOKENS,
    Message,
    content_hash,
    find_fault,
    find_text_fault,
    malformed,
    parse_messages,
    row_id,
    row_source,
)
from zephyr_lite.data.report import OnFault, Report
from zephyr_lite.data.sources import Row, SourceSpec, read_source
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


def load_dialogues(
    sources: Sequence[SourceSpec],
    limit: int | None = None,
    *,
    on_fault: OnFault = "stop",
    special_tokens: Sequence[str] = SPECIAL_TOKENS,
    offline: bool = False,
) -> tuple[list[Dialogue], Report]:
    """Dialogues of `sources`, in their order; reading ends after `limit` kept ones.

    Faults: `empty_answer`, `empty_user`, `special_token_text`, `nul_text`, `no_assistant_turn`,
    `last_turn_not_assistant`. Under `on_fault="stop"` the first one raises, under "drop" it is
    counted in the report. `special_tokens`: `ChatTokenizer.special_tokens` of the base.
    Raises: DataError at a malformed row always, at a faulty one under "stop".
    """
    report, dialogues = Report(on_fault), []
    for source in sources:
        for row in read_source(source, offline=offline):
            if limit is not None and len(dialogues) >= limit:
                break
            report.read(row)
            dialogue = _parse_dialogue(row)
            fault = _find_dialogue_fault(dialogue.messages, special_tokens)
            if fault:
                report.drop(row, fault)
                continue
            report.keep(row)
            dialogues.append(dialogue)
    report.check()
    return dialogues, report


def _parse_dialogue(row: Row) -> Dialogue:
    if "messages" not in row.data:
        raise malformed(row, _missing("messages", row), hint=_schema_hint(row))
    messages = parse_messages(row, row.data["messages"])
    return Dialogue(row_id(row, lambda: messages), row_source(row), messages)


def _find_dialogue_fault(messages: list[Message], special_tokens: Sequence[str]) -> str | None:
    if not any(message["role"] == "assistant" for message in messages):
        return "no_assistant_turn"
    if messages[-1]["role"] != "assistant":
        return "last_turn_not_assistant"
    return find_fault(messages, special_tokens)


def _missing(key: str, row: Row) -> str:
    found = ", ".join(sorted(map(str, row.data)))
    return f"no key `{key}`; the row has {found[:200] or 'no keys'}"


def _schema_hint(row: Row) -> str:
    if "chosen" in row.data or "completions" in row.data or "responses" in row.data:
        return "this looks like preference data: it belongs under data.feedback"
    return 'a dialogue row is {"messages": [{"role": ..., "content": ...}, ...]}'


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
        raise malformed(row, _missing("text", row), hint='a document row is {"text": ...}')
    text = row.data["text"]
    if not isinstance(text, str):
        raise DataError(
            f"`text` must be text, found {type(text).__name__}", file=row.file, line=row.line
        )
    return text
