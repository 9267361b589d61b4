"""Headers of safetensors files: which tensors a checkpoint has, without reading one.

A header is 8 bytes, its own length as a little-endian number, and JSON: name -> dtype, shape, place
among the data, which follow to the end of the file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zephyr_lite.errors import StorageError
from zephyr_lite.storage import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ELEMENT = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1,
           "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes, the format's own limit
Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype as the format spells it, shape)."""


def read_headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor of a checkpoint's folder, of one file or sharded by an index.

    Raises: StorageError for a file that is missing, cut off or damaged.
    """
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file, names in shards(folder):
        found = read_header(file)
        if missing := sorted((names or set()) - found.keys()):
            raise StorageError(f"{file}: lacks {missing[0]}, which the index says is in it")
        headers |= {n: found[n] for n in found if names is None or n in names}
    return headers


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (dtype, shape) of every tensor of a safetensors file, which is not read further.

    Raises: StorageError for a file that is missing, shorter than its header says, or none at all.
    """
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise _damaged(file, f"a header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from None
    except ValueError:
        raise _damaged(file, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _damaged(file, "its header is not an object")
    header.pop("__metadata__", None)
    found, end = {}, 0
    for name, entry in header.items():
        dtype, shape, last = _tensor(entry) or (None, (), 0)
        if dtype is None:
            raise _damaged(file, f"the entry of {name:.80} is unsound")
        found[name], end = (dtype, shape), max(end, last)
    if size != 8 + length + end:
        raise _damaged(file, f"{size} bytes, and its header says {8 + length + end}")
    return found


def shards(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The files that are loaded, and of a sharded checkpoint the tensors that each is for.

    Raises: StorageError where there is neither, or where the index is unsound.
    """
    if (folder / SINGLE).is_file():  # some repositories hold the same weights in other files too
        return [(folder / SINGLE, None)]
    if not (folder / INDEX).is_file():
        raise StorageError(f"{folder}: has neither {SINGLE} nor {INDEX}")
    placed = read_json(folder / INDEX)
    placed = placed.get("weight_map") if isinstance(placed, dict) else None
    if not isinstance(placed, dict) or not all(_is_file_name(f) for f in placed.values()):
        raise StorageError(f"{folder / INDEX}: has no sound weight_map")
    files: dict[str, set[str]] = {}
    for name, file in placed.items():
        files.setdefault(file, set()).add(name)
    return [(folder / file, names) for file, names in sorted(files.items())]


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _tensor(entry: Any) -> tuple[str, tuple[int, ...], int] | None:
    """(dtype, shape, end of its data) of a header's entry; None where it makes no sense."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)):
            return None
        sound = end - start == math.prod(shape) * ELEMENT[dtype]
    except (KeyError, TypeError, ValueError):
        return None
    return (dtype, tuple(shape), end) if sound else None


def _damaged(file: Path, what: str) -> StorageError:
    return StorageError(f"{file}: not a sound safetensors file: {what}", hint="download it again")
