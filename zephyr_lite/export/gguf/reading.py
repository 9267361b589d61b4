"""A GGUF file by the `gguf` package's reader, without an object for each piece of the vocabulary.

`gguf.GGUFReader` makes two arrays of every entry of an array: 128,000 tokens and their 280,000
merges cost it 10 s of CPU, and who asks for tensors, the chat template or a number needs none of
them. Here arrays are stepped over, in 0.1 s; everything else is the package's own work.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValueType as Type

from zephyr_lite.errors import StorageError

_HEAD, _LENGTH = struct.Struct("<IQ"), struct.Struct("<Q")  # an array's type and count; a string's
_NUMBERS = {
    Type.UINT8: 1, Type.INT8: 1, Type.BOOL: 1, Type.UINT16: 2, Type.INT16: 2, Type.UINT32: 4,
    Type.INT32: 4, Type.FLOAT32: 4, Type.UINT64: 8, Type.INT64: 8, Type.FLOAT64: 8,
}  # fmt: skip


class LayoutReader(gguf.GGUFReader):
    """Tensors and fields of a file; `contents()` of a field that is an array is empty."""

    @classmethod
    def opened(cls, path: Path) -> LayoutReader:
        """Read a file's header. Raises: StorageError when it is none, or cut short."""
        try:
            return cls(path)
        except (ValueError, IndexError, KeyError, OSError) as error:
            raise StorageError(f"{path}: is not readable as GGUF: {error}") from None

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
        """The package's step over one value: (bytes, arrays, which of them are values, types)."""
        if raw_type == Type.ARRAY and self.byte_order == "I":
            size = _array_size(self.data.data, int(orig_offs))
            if size is not None:
                return size, [], [], [Type.ARRAY]
        return super()._get_field_parts(orig_offs, raw_type)


def _array_size(data: Any, start: int) -> int | None:
    """Bytes of the array at `start`; None for one of arrays. Raises: ValueError past the end."""
    _in_file(data, start + _HEAD.size)
    kind, count = _HEAD.unpack_from(data, start)
    at = start + _HEAD.size
    if kind == Type.STRING:
        for _ in range(count):
            _in_file(data, at + _LENGTH.size)
            at += _LENGTH.size + _LENGTH.unpack_from(data, at)[0]
    elif kind in _NUMBERS:
        at += count * _NUMBERS[kind]
    else:
        return None
    _in_file(data, at)
    return at - start


def _in_file(data: Any, end: int) -> None:
    if end > len(data):
        raise ValueError(f"a value ends at byte {end}, the file at {len(data)}")
