"""Messages of a dialogue: what shape they must have, and which texts are faults.

Two kinds of wrong are kept apart. A row whose *shape* is wrong (missing key, unknown role, two user
turns in a row) was not written for us: that stops with file and line. A row of the right shape with
an unusable *text* (an empty answer, a literal `</s>`) is a fault of the data: it has a short name,
and the reader stops at it or counts it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from zephyr_lite.data.sources import Row
from zephyr_lite.errors import DataError

Message: TypeAlias = dict[str, str]
ROLES = ("system", "user", "assistant")
# Special tokens of the Llama and Mistral tokenizers; `ChatTokenizer.special_tokens` has the real
# list of the tokenizer in use.
SPECIAL_TOKENS = ("<s>", "</s>", "<unk>")


def parse_messages(row: Row, value: Any, where: str = "messages") -> list[Message]:
    """Copy of `value` as messages: an optional system turn, then user and assistant alternating.

    Whether the texts are empty and who speaks last is not judged here.
    Raises: DataError with the row's file and line where the shape is anything else.
    """
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else type(value).__name__
        raise malformed(row, f"`{where}` must be a list of messages, found {found}")
    messages = [_parse_message(row, item, f"{where}[{i}]") for i, item in enumerate(value)]
    _check_order(row, messages, where)
    return messages


def _parse_message(row: Row, item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise malformed(row, f"`{where}` must be an object, found {type(item).__name__}")
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            found = type(item[key]).__name__ if key in item else "no such key"
            raise malformed(row, f"`{where}.{key}` must be text, found {found}")
    if item["role"] not in ROLES:
        hint = f"roles are {', '.join(ROLES)}"
        raise malformed(row, f"`{where}.role` is {item['role']!r:.40}", hint=hint)
    return {"role": item["role"], "content": item["content"]}


def _check_order(row: Row, messages: Sequence[Message], where: str) -> None:
    place = find_disorder(messages)
    if place is None:
        return
    after_user = place > 0 and messages[place - 1]["role"] == "user"
    expected = "assistant" if after_user else "user"
    message = f"`{where}[{place}].role` is {messages[place]['role']}, must be {expected}"
    hint = "an optional system turn first, then user and assistant alternating"
    raise malformed(row, message, hint=hint)


def find_disorder(messages: Sequence[Message]) -> int | None:
    """Index of the first message out of order, or None.

    The order is an optional system turn, then user and assistant alternating.
    """
    first = 1 if messages and messages[0]["role"] == "system" else 0
    for i in range(first, len(messages)):
        if messages[i]["role"] != ("assistant" if (i - first) % 2 else "user"):
            return i
    return None


def malformed(row: Row, message: str, *, hint: str | None = None) -> DataError:
    """The error for a row of the wrong shape."""
    return DataError(message, file=row.file, line=row.line, hint=hint)


def find_fault(messages: Sequence[Message], special_tokens: Sequence[str]) -> str | None:
    """The first fault of the texts of `messages`, or None.

    `empty_user`, `empty_answer`: a turn without a visible character (an empty system turn is fine).
    `special_token_text`, `nul_text`: see `find_text_fault`.
    """
    names = {"user": "empty_user", "assistant": "empty_answer"}
    for message in messages:
        if message["role"] in names and not message["content"].strip():
            return names[message["role"]]
        if fault := find_text_fault(message["content"], special_tokens):
            return fault
    return None


def find_text_fault(text: str, special_tokens: Sequence[str]) -> str | None:
    """`special_token_text` where the text spells a control token, `nul_text` where it has U+0000.

    A spelled control token would become that token: a forged end of turn. A NUL ends the text in
    every program that holds strings as C does, llama.cpp among them.
    """
    if any(token in text for token in special_tokens):
        return "special_token_text"
    return "nul_text" if "\0" in text else None


def row_id(row: Row, content: Callable[[], Any]) -> str:
    """The row's `id` or `prompt_id`, else the first 16 hex digits of its content's SHA-256.

    Either way it depends on the row alone, never on where the row stands.
    """
    for key in ("id", "prompt_id"):
        value = row.data.get(key)
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
    return content_hash(content())[:16]


def row_source(row: Row) -> str:
    """The row's own `source`, else the stem of its file's name."""
    value = row.data.get("source")
    if isinstance(value, str) and value:
        return value
    return row.file.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def content_hash(value: Any) -> str:
    """SHA-256 (hex) of a JSON value's canonical form."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
