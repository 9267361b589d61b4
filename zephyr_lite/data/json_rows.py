"""Strict JSON: objects from JSON-lines and JSON files, each with the line it starts on.

Python's parser takes what JSON does not have (NaN, keys given twice, lone surrogates) and fails
with a RecursionError on deep nesting; all of that is refused here, with file and line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from zephyr_lite.errors import DataError

MAX_DEPTH = 64
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


class _Refused(ValueError):
    """A value that Python's parser would take and we do not."""


def iter_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line that is not blank. A byte-order mark and CRLF are accepted."""
    with file.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            text = _decode(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw, file, line)
            if not text.strip(" \t\r\n"):
                continue
            start = _SPACE.match(text).end()  # type: ignore[union-attr]  # matches the empty string
            value, end = _parse(text, start, file, line, whole=raw.endswith(b"\n"))
            if text[end:].strip(" \t\r\n"):
                hint = "JSON-lines has one object a line"
                raise DataError("more text after the object", file=file, line=line, hint=hint)
            yield line, _as_object(value, file, line)


def iter_json(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSON list of objects, of one object, or of objects one after another."""
    raw = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, file, None)
    position = _skip_space(text, 0)
    in_list = text.startswith("[", position)
    position = _skip_space(text, position + in_list)
    line, counted = 1, 0
    while position < len(text) and not (in_list and text[position] == "]"):
        line, counted = line + text.count("\n", counted, position), position
        value, position = _parse(text, position, file, line, whole=False)
        yield line, _as_object(value, file, line)
        position = _skip_space(text, position)
        if in_list:
            position = _skip_comma(text, position, file, line)
    if in_list:
        _check_end(text, position, file, line)


def _skip_comma(text: str, position: int, file: Path, line: int) -> int:
    if text.startswith("]", position):
        return position
    if not text.startswith(",", position):
        hint = "objects of a list are separated by commas; was the file cut off?"
        raise DataError("the list goes wrong after this row", file=file, line=line, hint=hint)
    position = _skip_space(text, position + 1)
    if text.startswith("]", position):
        raise DataError("a comma before the end of the list", file=file, line=line)
    return position


def _check_end(text: str, position: int, file: Path, line: int) -> None:
    if position >= len(text):
        raise DataError("the list is cut off", file=file, line=line, hint="was it saved whole?")
    if text[position + 1 :].strip(" \t\r\n"):
        raise DataError("more text after the list", file=file)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _decode(raw: bytes, file: Path, line: int | None) -> str:
    """Text of `raw`; `line` None counts the lines before the first bad byte."""

    def fail(message: str, position: int, hint: str) -> NoReturn:
        place = line if line is not None else raw.count(b"\n", 0, position) + 1
        raise DataError(message, file=file, line=place, hint=hint)

    nul = raw.find(b"\0")
    if nul >= 0:
        fail("a NUL byte", nul, "the file is damaged, or is UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fail(f"not UTF-8: byte 0x{raw[error.start]:02x}", error.start, "save the file as UTF-8")


def _parse(text: str, start: int, file: Path, line: int, *, whole: bool) -> tuple[Any, int]:
    """The JSON value at `start` and where it ends. `whole`: the text cannot have been cut off."""
    try:
        value, end = _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        is_cut = not whole and not text[error.pos :].strip()
        message = "the last row is cut off" if is_cut else f"not JSON: {error.msg}"
        column = f" (column {error.colno})" if error.lineno == 1 else f" (line {error.lineno})"
        hint = "was the file copied whole?" if is_cut else None
        raise DataError(message + column, file=file, line=line, hint=hint) from None
    except (_Refused, RecursionError, ValueError) as error:
        reason = str(error) if isinstance(error, _Refused) else _explain(error)
        raise DataError(reason, file=file, line=line) from None
    if _is_deeper(value, MAX_DEPTH):
        raise DataError(f"nested deeper than {MAX_DEPTH} levels", file=file, line=line)
    if _SURROGATE_ESCAPE.search(text, start, end):
        _refuse_surrogates(value, file, line)
    return value, end


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"nested deeper than {MAX_DEPTH} levels"
    return f"not JSON: {str(error)[:100]}"


def _as_object(value: Any, file: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"a row must be an object, found {kind}", file=file, line=line)
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    if depth == 0:
        return True
    children = value.values() if isinstance(value, dict) else value
    return any(_is_deeper(child, depth - 1) for child in children)


def _refuse_surrogates(value: Any, file: Path, line: int) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        hint = (
            "an escape \\uD800-\\uDFFF without its other half: the text was cut inside a character"
        )
        raise DataError("a lone surrogate", file=file, line=line, hint=hint) from None


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"the key {twice!r:.60} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not JSON; write null for a missing number")


_DECODER = json.JSONDecoder(object_pairs_hook=_build_object, parse_constant=_refuse_constant)
