"""Stepping over arrays changes nothing else of what the package's reader finds."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from zephyr_lite.errors import StorageError
from zephyr_lite.export.gguf.reading import LayoutReader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Arrays of every kind, values of every kind between and behind them, two tensors."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_array("a.strings", ["", "a", "\u2581the", "漢" * 100])
    writer.add_string("a.text", "between é")
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        value = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"a.{kind}s", [1, 2, 3], gguf.GGUFValueType.ARRAY, value)
        writer.add_key_value(f"a.{kind}", 77, value)
    for kind in ("float32", "float64"):
        value = gguf.GGUFValueType[kind.upper()]
        writer.add_key_value(f"a.{kind}s", [0.5] * 5, gguf.GGUFValueType.ARRAY, value)
    writer.add_array("a.bools", [True, False, True])
    writer.add_bool("a.bool", True)
    writer.add_tensor("one", np.ones((3, 5), np.float32))
    writer.add_tensor("two", np.ones((2, 2, 4), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "m.gguf"


def test_everything_but_arrays_is_the_same(path: Path) -> None:
    whole, ours = gguf.GGUFReader(path), LayoutReader.opened(path)
    assert ours.data_offset == whole.data_offset
    assert list(ours.fields) == list(whole.fields)
    arrays = 0
    for key, field in whole.fields.items():
        if field.types[0] == gguf.GGUFValueType.ARRAY:
            arrays += 1
            assert ours.fields[key].contents() == []
            assert len(ours.fields[key].parts) == 3  # an object an entry is what costs
        else:
            assert ours.fields[key].contents() == field.contents(), key
    assert arrays == 12
    for mine, theirs in zip(ours.tensors, whole.tensors, strict=True):
        assert mine.name == theirs.name and mine.tensor_type == theirs.tensor_type
        assert mine.shape.tolist() == theirs.shape.tolist()
        assert (mine.data_offset, mine.n_bytes) == (theirs.data_offset, theirs.n_bytes)
        assert np.array_equal(mine.data, theirs.data)


def test_a_file_cut_anywhere_is_refused(path: Path, tmp_path: Path) -> None:
    data = path.read_bytes()
    last = gguf.GGUFReader(path).tensors[-1]
    cut = tmp_path / "cut.gguf"
    for size in range(0, last.data_offset + last.n_bytes, 3):
        cut.write_bytes(data[:size])
        with pytest.raises(StorageError, match=r"cut\.gguf: is not readable as GGUF"):
            LayoutReader.opened(cut)


@pytest.mark.parametrize("key", ["a.strings", "a.int32s"])
def test_a_count_beyond_the_file_is_refused(key: str, path: Path) -> None:
    field = gguf.GGUFReader(path, "r+").fields[key]
    field.parts[4][0] = 1 << 63
    with pytest.raises(StorageError, match="a value ends at byte"):
        LayoutReader.opened(path)


def test_no_file_and_another_kind_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        LayoutReader.opened(tmp_path / "none.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" * 99)
    with pytest.raises(StorageError, match="magic"):
        LayoutReader.opened(tmp_path / "zip.gguf")
