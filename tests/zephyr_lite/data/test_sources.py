"""Rows and their places: every unsound file is refused by file and line, sound oddities pass."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from zephyr_lite.data import sources
from zephyr_lite.data.sources import (
    Row,
    fingerprint,
    is_local,
    read_rows,
    read_source,
    source_fingerprint,
)
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source

GOOD = b'{"a": 1}\n'
# What stands in a JSON-lines file, and line and words of the error.
UNSOUND = {
    "not json": (GOOD + b"hello\n", 2, "not JSON: Expecting value"),
    "truncated last line": (GOOD * 2 + b'{"a": "lon', 3, "not JSON: Unterminated string"),
    "truncated after a comma": (GOOD + b'{"a": 1,', 2, "the last row is cut off"),
    "NUL": (GOOD + b'{"a": "x\0y"}\n', 2, "a NUL byte"),
    "UTF-16": ('{"a": 1}\n'.encode("utf-16"), 1, "a NUL byte"),
    "invalid UTF-8": (GOOD + b'{"a": "caf\xe9"}\n', 2, "not UTF-8: byte 0xe9"),
    "NaN": (GOOD + b'{"a": NaN}\n', 2, "NaN is not JSON"),
    "Infinity": (b'{"a": -Infinity}\n', 1, "-Infinity is not JSON"),
    "duplicate key": (GOOD + b'{"a": 1, "b": {"c": 1, "c": 2}}\n', 2, "the key 'c' stands twice"),
    "list row": (GOOD + b"[1]\n", 2, "a row must be an object, found list"),
    "number row": (b"3\n", 1, "a row must be an object, found int"),
    "null row": (b"null\n", 1, "a row must be an object, found NoneType"),
    "65 deep": (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}\n", 1, "nested deeper than 64"),
    "50000 deep": (b'{"a": ' + b"[" * 50000 + b"]" * 50000 + b"}\n", 1, "nested deeper than 64"),
    "lone surrogate": (GOOD + b'{"a": "\\ud83e!"}\n', 2, "a lone surrogate"),
    "two objects": (GOOD + b'{"a": 1} {"a": 2}\n', 2, "more text after the object"),
    "huge number": (b'{"a": ' + b"1" * 5000 + b"}\n", 1, "not JSON"),
    "single quotes": (b"{'a': 1}\n", 1, "not JSON: Expecting property name"),
    "empty": (b"", None, "the file is empty"),
    "blank": (b"\n \r\n", None, "the file has no rows"),
    "only a mark": (b"\xef\xbb\xbf\n", None, "the file has no rows"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_lines(tmp_path: Path, case: str) -> None:
    raw, line, words = UNSOUND[case]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(raw)
    with pytest.raises(DataError) as error:
        list(read_rows(str(file)))
    assert words in str(error.value)
    assert str(error.value).startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert error.value.exit_code == 2


UNSOUND_JSON = {
    "cut off": (b'[{"a": 1},\n{"a": 2}', 2, "the list goes wrong after this row"),
    "cut off inside": (b'[{"a": 1},\n{"a": "2', 2, "not JSON"),
    "cut off after a comma": (b'[{"a": 1},\n', 1, "the list is cut off"),
    "comma at the end": (b'[{"a": 1},\n]', 1, "a comma before the end"),
    "no comma": (b'[{"a": 1}\n{"a": 2}]', 1, "the list goes wrong"),
    "tail": (b'[{"a": 1}]\nx', None, "more text after the list"),
    "a number inside": (b'[{"a": 1},\n\n7]', 3, "a row must be an object, found int"),
    "duplicate key": (b'[{"a": 1},\n{"a": 2, "a": 3}]', 2, "stands twice"),
    "bad byte": (b'[{"a": 1},\n{"a": "\xff"}]', 2, "not UTF-8"),
    "empty list": (b"[]\n", None, "the file has no rows"),
    "blank": (b" \n", None, "the file has no rows"),
}


@pytest.mark.parametrize("case", UNSOUND_JSON)
def test_unsound_json(tmp_path: Path, case: str) -> None:
    raw, line, words = UNSOUND_JSON[case]
    file = tmp_path / "rows.json"
    file.write_bytes(raw)
    with pytest.raises(DataError) as error:
        list(read_rows(str(file)))
    assert words in str(error.value)
    assert str(error.value).startswith(f"{file}:{line}: " if line else f"{file}: ")


def test_sound_oddities(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    deep = b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}"
    lines = [b'\xef\xbb\xbf{"a": "\xc3\xa9"}\r\n', b"\r\n", b' {"a": "\\ud83e\\udd99"} \n', deep]
    file.write_bytes(b"".join(lines))
    rows = list(read_rows(str(file)))
    assert [row.line for row in rows] == [1, 3, 4]
    assert [row.data["a"] for row in rows[:2]] == ["é", "🦙"]
    assert rows[0].file == str(file)


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    data = [{"a": i, "b": [{"c": "x\ny"}]} for i in range(5)]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "list.json").write_text(json.dumps(data, indent=2))
    (tmp_path / "stream.json").write_text("\n".join(json.dumps(row, indent=1) for row in data))
    parquet.write_table(pyarrow.Table.from_pylist(data), tmp_path / "table.parquet")
    lines = {}
    for name in ("lines.jsonl", "list.json", "stream.json", "table.parquet"):
        rows = list(read_rows(str(tmp_path / name)))
        assert [row.data for row in rows] == data, name
        lines[name] = [row.line for row in rows]
    assert lines["lines.jsonl"] == lines["table.parquet"] == [1, 2, 3, 4, 5]
    assert lines["list.json"] == [2, 10, 18, 26, 34]


def test_parquet_rows_are_numbered_through(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"a": list(range(3000))}), file, row_group_size=700)
    assert [(row.line, row.data["a"]) for row in read_rows(str(file))] == [
        (i + 1, i) for i in range(3000)
    ]


@pytest.mark.parametrize("raw", [b"PAR1 not really", GOOD * 100])
def test_unsound_parquet(tmp_path: Path, raw: bytes) -> None:
    file = tmp_path / "t.parquet"
    file.write_bytes(raw)
    with pytest.raises(DataError, match="unsound parquet"):
        list(read_rows(str(file)))


def test_folders(tmp_path: Path) -> None:
    for name in ("train_sft-00001.jsonl", "train_sft-00000.jsonl", "test_sft.jsonl", ".x.jsonl"):
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")
    (tmp_path / "README.md").write_text("not data")

    def names(split: str | None = None) -> list[str]:
        return [row.data["name"] for row in read_rows(str(tmp_path), split)]

    train = ["train_sft-00000.jsonl", "train_sft-00001.jsonl"]
    assert names() == ["test_sft.jsonl", *train]
    assert names("train_sft") == train
    with pytest.raises(DataError, match="no file of split 'train'"):
        names("train")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val.jsonl").write_text('{"name": "val"}\n')
    assert names("val") == ["val"]


def test_what_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "gone.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed.jsonl.gz").write_bytes(b"x")
    (tmp_path / "table.csv").write_text("a,b\n")
    cases = {
        "pipe.jsonl": "not an ordinary file",
        "link.jsonl": "a link to nothing",
        "missing.jsonl": "no such file",
        "missing-folder": "no such file",
        "empty": "no data file in this folder",
        "packed.jsonl.gz": "unknown kind of file '.gz'",
        "table.csv": "unknown kind of file '.csv'",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words) as error:
            list(read_rows(str(tmp_path / name)))
        assert error.value.hint, name
        assert str(tmp_path / name) in str(error.value)


def test_local_or_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("HuggingFaceH4/ultrachat_200k")
    assert not is_local("squad")
    for path in ("x.jsonl", "a/b.parquet", "./x", "../x", "/x", "~/x", "package:x.jsonl", "x.csv"):
        assert is_local(path), path
    (tmp_path / "HuggingFaceH4" / "ultrachat_200k").mkdir(parents=True)
    assert is_local("HuggingFaceH4/ultrachat_200k")
    for path in ("a/b/c", "two words", ""):
        with pytest.raises(DataError, match="neither a file nor"):
            is_local(path)


def test_package_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "PACKAGED_DATA", tmp_path)
    (tmp_path / "shipped.jsonl").write_bytes(GOOD)
    assert list(read_rows("package:shipped.jsonl")) == [
        Row(str(tmp_path / "shipped.jsonl"), 1, {"a": 1})
    ]
    for name in ("../secret.jsonl", "/etc/passwd", "", ".hidden.jsonl", "a/b.jsonl"):
        with pytest.raises(DataError, match="not the name of a shipped file"):
            list(read_rows(f"package:{name}"))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows("package:other.jsonl"))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(GOOD * 3 + b"broken\n")
    assert len(list(read_source(Source(path=str(file), limit=3)))) == 3
    with pytest.raises(DataError, match=r"rows\.jsonl:4: "):
        list(read_source(Source(path=str(file))))


def test_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(GOOD)
    assert fingerprint(str(file)) == hashlib.sha256(GOOD).hexdigest()
    folder = fingerprint(str(tmp_path))
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    two = fingerprint(str(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    assert len({fingerprint(str(file)), folder, two, fingerprint(str(tmp_path))}) == 4
    with pytest.raises(DataError, match="no such file"):
        fingerprint(str(tmp_path / "gone.jsonl"))


def test_a_named_file_of_a_local_copy(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "data" / "b.jsonl").write_bytes(GOOD * 2)
    source = Source(path=str(tmp_path), file="data/b.jsonl")
    place = str(tmp_path / "data" / "b.jsonl")
    assert list(read_source(source)) == [Row(place, line, {"a": 1}) for line in (1, 2)]
    assert source_fingerprint(source) == hashlib.sha256(GOOD * 2).hexdigest()
    whole = Source(path=str(tmp_path))
    assert source_fingerprint(whole) == fingerprint(str(tmp_path)) != source_fingerprint(source)


@pytest.mark.parametrize(
    ("path", "file", "words"),
    [
        ("owner/name", "../x.jsonl", "`file` must lie in the dataset's repository: '../x.jsonl'"),
        ("owner/name", "/etc/x.jsonl", "`file` must lie in the dataset's repository"),
        ("{}", "a/../../x.jsonl", "`file` must lie in the dataset's repository"),
        ("{}", "", "`file` must lie in the dataset's repository: ''"),
        ("{}", "gone.jsonl", "gone.jsonl: no such file"),
        ("{}/a.jsonl", "a.jsonl", "`file` is given, and the path is no folder"),
        ("{}", "a.csv", "unknown kind of file '.csv'"),
    ],
)
def test_named_files_that_cannot_be(tmp_path: Path, path: str, file: str, words: str) -> None:
    for name in ("a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(GOOD)
    source = Source(path=path.format(tmp_path), file=file)
    for read in (lambda: list(read_source(source)), lambda: source_fingerprint(source)):
        with pytest.raises(DataError) as error:
            read()
        assert words in str(error.value)
