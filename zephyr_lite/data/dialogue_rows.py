"""The schemas in which dialogues come, recognised row by row by their keys.

    messages                        [{role, content}], ultrachat_200k's and everybody's
    conversations, conversation     ShareGPT's [{from, value}]; also [{role, content}]
    instruction + output [+ input]  Alpaca's single exchange
    data                            raw UltraChat: a list of texts, the user's first

Other columns are ignored, ultrachat_200k's `prompt` (its first user turn again) among them.

Alpaca's instruction and non-empty input become one user turn with a blank line between them. Its
own prompt has a blank line and a heading there; chat conversions disagree (a line break alone, or a
line `Input:`), and the blank line is the one that adds no words.

ShareGPT dumps are exports of whatever a web page held, so turns out of order are faults there; a
row in `messages` was written by a program, which did something else than it should: that stops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from zephyr_lite.data.messages import Message, find_disorder, malformed, parse_messages
from zephyr_lite.data.sources import Row

# ShareGPT's speakers; several assistants answered there.
SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class ParsedDialogue(NamedTuple):
    """Messages as the row has them, and the fault of their order if there is one."""

    messages: list[Message]
    fault: str | None = None


def parse_dialogue(row: Row) -> ParsedDialogue:
    """The row by whichever schema its keys name. Whether its texts are usable is not judged here.

    Faults (ShareGPT only): `no_assistant_turn` (an empty list), `assistant_first`, `turn_order`.
    Raises: DataError with file and line where no schema fits or the row does not keep to its own.
    """
    data = row.data
    if "messages" in data:
        return ParsedDialogue(parse_messages(row, data["messages"]))
    for key in ("conversations", "conversation"):
        if key in data:
            return _parse_sharegpt(row, key)
    if "instruction" in data and "output" in data:
        return ParsedDialogue(_parse_alpaca(row))
    if "data" in data:
        return ParsedDialogue(_parse_ultrachat(row))
    raise malformed(row, missing("messages", row), hint=_schema_hint(row))


def missing(key: str, row: Row) -> str:
    """Words for a row without `key`."""
    found = ", ".join(sorted(map(str, row.data)))
    return f"no key `{key}`; the row has {found[:200] or 'no keys'}"


def _parse_sharegpt(row: Row, key: str) -> ParsedDialogue:
    items = row.data[key]
    if not isinstance(items, list):
        raise malformed(row, f"`{key}` must be a list of turns, found {type(items).__name__}")
    if not items:
        return ParsedDialogue([], "no_assistant_turn")
    if isinstance(items[0], dict) and "role" in items[0]:
        return ParsedDialogue(parse_messages(row, items, key))
    turns = [_parse_turn(row, item, f"{key}[{i}]") for i, item in enumerate(items)]
    messages = _with_system(row, turns)
    disorder = find_disorder(messages)
    if disorder is None:
        return ParsedDialogue(messages)
    first = 1 if messages[0]["role"] == "system" else 0
    is_led = disorder == first and messages[first]["role"] == "assistant"
    return ParsedDialogue(messages, "assistant_first" if is_led else "turn_order")


def _parse_turn(row: Row, item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise malformed(row, f"`{where}` must be an object, found {type(item).__name__}")
    speaker, value = (_text(row, item, key, f"{where}.") for key in ("from", "value"))
    if speaker not in SPEAKERS:
        hint = f"speakers are {', '.join(SPEAKERS)}"
        raise malformed(row, f"`{where}.from` is {speaker!r:.40}", hint=hint)
    return {"role": SPEAKERS[speaker], "content": value}


def _parse_alpaca(row: Row) -> list[Message]:
    if row.data.get("history"):
        hint = "write dialogues of several turns as `messages`"
        raise malformed(row, "`history` beside `instruction` is not read", hint=hint)
    instruction, output = (_text(row, row.data, key) for key in ("instruction", "output"))
    context = _text(row, row.data, "input") if row.data.get("input") is not None else ""
    # An empty instruction stays empty whatever the input, so that it is seen as the fault it is.
    if context.strip() and instruction.strip():
        instruction = f"{instruction}\n\n{context}"
    turns = [{"role": "user", "content": instruction}, {"role": "assistant", "content": output}]
    return _with_system(row, turns)


def _parse_ultrachat(row: Row) -> list[Message]:
    texts = row.data["data"]
    if not isinstance(texts, list) or not texts:
        found = "an empty list" if texts == [] else type(texts).__name__
        raise malformed(row, f"`data` must be a list of texts, found {found}")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise malformed(row, f"`data[{i}]` must be text, found {type(text).__name__}")
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    """`turns` after the row's own `system` text, where some dumps keep it."""
    if not row.data.get("system"):
        return turns
    return [{"role": "system", "content": _text(row, row.data, "system")}, *turns]


def _text(row: Row, item: dict[str, Any], key: str, where: str = "") -> str:
    if not isinstance(item.get(key), str):
        found = type(item[key]).__name__ if key in item else "no such key"
        raise malformed(row, f"`{where}{key}` must be text, found {found}")
    return item[key]


def _schema_hint(row: Row) -> str:
    if "chosen" in row.data or "completions" in row.data or "responses" in row.data:
        return "this looks like preference data: it belongs under data.feedback"
    return (
        'a dialogue row is {"messages": [{"role": ..., "content": ...}, ...]}, or has ShareGPT\'s '
        "`conversations`, Alpaca's `instruction` and `output`, or UltraChat's `data`"
    )
