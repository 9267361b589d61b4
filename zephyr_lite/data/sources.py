"""Rows from files and from the Hugging Face hub, each with the place it came from.

A path is local when it has a known suffix, starts with `.`, `/` or `~`, or exists here; anything
else is a hub dataset id. `package:NAME` is a file shipped with zephyr-lite. `file` names one file
of a hub dataset's repository (or of a local copy of it), which is then read here and not by
`datasets`: that refuses a repository which holds a script.

What is not a sound row never passes: bytes that are not UTF-8, a literal NaN, a key given twice, a
line that was cut off; each is a DataError with file and line. A byte-order mark, CRLF line ends and
blank lines are accepted.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

from zephyr_lite.data.json_rows import iter_json, iter_json_lines
from zephyr_lite.errors import DataError, StorageError

PACKAGE_PREFIX = "package:"
SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
# Recognised as files, so that they are refused by name and not looked up on the hub.
UNREADABLE_SUFFIXES = (
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tar",
    ".csv",
    ".tsv",
    ".txt",
    ".arrow",
)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PACKAGED_DATA = Path(__file__).parents[1] / "tiny" / "data"


class Row(NamedTuple):
    """One row and its place: `line` is 1-based (in parquet and on the hub: the row's number)."""

    file: str
    line: int
    data: dict[str, Any]


class SourceSpec(Protocol):
    """Where rows come from; the recipe's `Source` is one."""

    @property
    def path(self) -> str:
        """File, folder, `package:NAME` or hub dataset id."""
        ...

    @property
    def split(self) -> str | None:
        """Split of a hub dataset, or of a folder that names its files after splits."""
        ...

    @property
    def file(self) -> str | None:
        """One file of a hub dataset's repository, read instead of a split."""
        ...

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub dataset."""
        ...

    @property
    def limit(self) -> int | None:
        """Read at most this many rows."""
        ...

    @property
    def weight(self) -> float:
        """Share of its rows in the mixture: see `mixture.copies`."""
        ...


def read_source(source: SourceSpec, *, offline: bool = False) -> Iterator[Row]:
    """Rows of one source, at most its `limit`; a hub file's rows are of file `ID/FILE`.

    Raises: as `read_rows`.
    """
    if source.file is None:
        rows = read_rows(source.path, source.split, revision=source.revision, offline=offline)
    else:
        rows = _read_named_file(source, offline=offline)
    return itertools.islice(rows, source.limit)


def read_rows(
    path_or_id: str,
    split: str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> Iterator[Row]:
    """Rows of a file, of the files of a folder in name order, or of a hub dataset.

    `split` picks the files of a folder whose names start with it (`train_sft-0.parquet`) and a hub
    dataset's split; a single file has none, there it is unused, and so is `revision`. `offline`: no
    connection is opened, a hub dataset must be in the cache.
    Raises: DataError for what is missing or unsound; StorageError where reading itself fails.
    """
    if is_local(path_or_id):
        for file in find_files(path_or_id, split):
            yield from _read_file(file)
    else:
        from zephyr_lite.data.hub import read_hub  # `datasets` takes a second to import

        rows = read_hub(path_or_id, split, revision, offline=offline)
        for line, data in enumerate(rows, start=1):
            yield Row(f"{path_or_id}:{split}", line, data)


def source_fingerprint(source: SourceSpec, *, offline: bool = False) -> str:
    """SHA-256 (hex) of what `read_source` would read, its `limit` aside.

    As `fingerprint`; a hub file: of its id, file, revision and bytes.
    """
    if source.file is None:
        revision = source.revision
        return fingerprint(source.path, source.split, revision=revision, offline=offline)
    digest = _hash_file(_locate(source, offline=offline))
    if is_local(source.path):
        return digest
    parts = f"{source.path}\n{source.file}\n{source.revision}\n{digest}\n"
    return hashlib.sha256(parts.encode()).hexdigest()


def fingerprint(
    path_or_id: str,
    split: str | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> str:
    """SHA-256 (hex) of the bytes that `read_rows` would read.

    One file: of its bytes. A folder: of the names and hashes of its files. A hub dataset: of its
    id, split, revision, row count and the fingerprint that `datasets` derives from the repository's
    commit.
    """
    if not is_local(path_or_id):
        from zephyr_lite.data.hub import hub_fingerprint

        return hub_fingerprint(path_or_id, split, revision, offline=offline)
    files = find_files(path_or_id, split)
    hashes = [_hash_file(file) for file in files]
    if files == [resolve(path_or_id)]:
        return hashes[0]
    lines = [f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_local(path_or_id: str) -> bool:
    """Whether a recipe's path means something on this machine rather than on the hub."""
    if path_or_id.startswith((PACKAGE_PREFIX, ".", "/", "~")):
        return True
    if path_or_id.lower().endswith(SUFFIXES + UNREADABLE_SUFFIXES) or os.path.exists(path_or_id):
        return True
    if not HUB_ID.fullmatch(path_or_id):
        hint = "give a .jsonl, .json or .parquet file, a folder of them, or a hub id OWNER/NAME"
        raise DataError(f"neither a file nor a hub dataset id: {path_or_id!r:.200}", hint=hint)
    return False


def resolve(path: str) -> Path:
    """The local path that `path` means: `package:NAME` and `~` are expanded.

    Raises: DataError for a `package:` name that leaves the package's data folder.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    name = path.removeprefix(PACKAGE_PREFIX)
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise DataError(f"not the name of a shipped file: {path!r:.200}")
    return PACKAGED_DATA / name


def find_files(path: str, split: str | None = None) -> list[Path]:
    """The data files that `path` means, sorted by name; none of them is opened.

    Raises: DataError where there is none, or where one is not an ordinary file.
    """
    root = resolve(path)
    if not root.is_dir():
        _check_file(root)
        return [root]
    # A snapshot of a hub dataset keeps its files under data/.
    try:
        found = [*sorted(root.iterdir()), *sorted(root.glob("data/*"))]
    except OSError as error:
        raise StorageError(f"{root}: cannot be read: {error.strerror or error}") from error
    files = [file for file in found if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    chosen = [file for file in files if split is None or _is_of_split(file, split)]
    if not chosen:
        wanted = "data file" if split is None else f"file of split {split!r}"
        names = ", ".join(file.name for file in files[:8])
        hint = f"it has {names}" if names else f"expected {', '.join(SUFFIXES)}"
        raise DataError(f"no {wanted} in this folder", file=root, hint=hint)
    for file in chosen:
        _check_file(file)
    return chosen


def _read_named_file(source: SourceSpec, *, offline: bool) -> Iterator[Row]:
    place = f"{source.path}/{source.file}"
    for row in _read_file(_locate(source, offline=offline)):
        yield row if is_local(source.path) else row._replace(file=place)


def _locate(source: SourceSpec, *, offline: bool) -> Path:
    """Where the source's `file` lies on this machine, downloaded if need be."""
    name = PurePosixPath(source.file or "")
    if name.is_absolute() or ".." in name.parts or not name.parts:
        raise DataError(f"`file` must lie in the dataset's repository: {source.file!r:.200}")
    if is_local(source.path):
        found = resolve(source.path)
        if not found.is_dir():
            hint = "leave `file` out; it names a file of a folder or of a hub dataset"
            raise DataError("`file` is given, and the path is no folder", file=found, hint=hint)
        found = found / name
    else:
        from zephyr_lite.data.hub import fetch_file

        found = fetch_file(source.path, str(name), source.revision, offline=offline)
    _check_file(found)
    return found


def _is_of_split(file: Path, split: str) -> bool:
    return re.match(rf"{re.escape(split)}(?![A-Za-z0-9_])", file.name) is not None


def _check_file(file: Path) -> None:
    try:
        status = file.stat()
    except FileNotFoundError:
        what = "a link to nothing" if file.is_symlink() else "no such file"
        raise DataError(what, file=file, hint="check the path in the recipe") from None
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not an ordinary file", file=file, hint="give a data file or a folder")
    if file.suffix.lower() not in SUFFIXES:
        hint = f"{', '.join(SUFFIXES)} are read; unpack or convert it first"
        raise DataError(f"unknown kind of file {file.suffix!r}", file=file, hint=hint)
    if status.st_size == 0:
        raise DataError("the file is empty", file=file, hint="was its download finished?")


def _read_file(file: Path) -> Iterator[Row]:
    suffix = file.suffix.lower()
    read = {".json": iter_json, ".parquet": _iter_parquet}.get(suffix, iter_json_lines)
    is_empty = True
    try:
        for line, data in read(file):
            is_empty = False
            yield Row(str(file), line, data)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from error
    if is_empty:
        raise DataError("the file has no rows", file=file, hint="was its download finished?")


def _iter_parquet(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise DataError("a column name stands twice", file=file)
            line = 0
            for batch in table.iter_batches(batch_size=1024):
                for line, data in enumerate(batch.to_pylist(), start=line + 1):  # noqa: B020
                    yield line, data
    except pyarrow.ArrowException as error:
        hint = "is it whole, and really parquet?"
        raise DataError(f"unsound parquet: {str(error)[:200]}", file=file, hint=hint) from error


def _hash_file(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from error
