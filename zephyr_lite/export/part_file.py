"""A large file written blob by blob that a kill at any byte does not damage and costs two blobs.

    NAME.part         header, then the blobs in a fixed order, each padded to the alignment
    NAME.part.jsonl   the journal: a line for the plan, then {name, nbytes, sha256} for each blob,
                      where sha256 is that of the whole file up to the end of the blob

A blob is written, fsynced and vouched for in the journal, in this order, by one thread while the
caller makes the next one. Who opens the part file again hashes it once, keeps the blobs up to the
last one whose line agrees, cuts off the rest and goes on there: the file that results is the file
of an uninterrupted run, byte for byte. Another plan starts afresh. NAME itself appears by one
rename, once the caller has checked the whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from zephyr_lite.errors import LockedError, StorageError
from zephyr_lite.storage import cannot_write, canonical, digest, fsync_folder

VERSION = 1
CHUNK = 1 << 20  # bytes hashed at a time


class PartFile:
    """`final`, written as `final.part`: begin, append every blob, finish, commit."""

    def __init__(
        self,
        final: Path,
        header: bytes,
        blobs: Sequence[tuple[str, int]],
        identity: str,
        *,
        alignment: int = 1,
    ) -> None:
        """Plan the file; nothing is opened yet.

        Args:
            blobs: (name, bytes without padding) in the order of the file; names are unique.
            identity: of everything the bytes depend on beside header and sizes, as a digest.
            alignment: header and blobs are padded with zeros to a multiple of it.
        """
        self.final = final
        self.part = final.with_name(f"{final.name}.part")
        self.journal = final.with_name(f"{final.name}.part.jsonl")
        self._header = _padded(header, alignment)
        self._blobs = list(blobs)
        self._index = {name: at for at, (name, _) in enumerate(self._blobs)}
        if len(self._index) != len(self._blobs):
            raise ValueError(f"{final}: two blobs of one name")
        self._alignment = alignment
        self._ends = [len(self._header)]  # where blob i starts; one more than there are blobs
        for _, nbytes in self._blobs:
            self._ends.append(self._ends[-1] + nbytes + -nbytes % alignment)
        self.nbytes = self._ends[-1]
        self._plan = {
            "part_file": VERSION,
            "identity": identity,
            "header": hashlib.sha256(self._header).hexdigest(),
            "blobs": digest([alignment, self._blobs]),
        }
        self._handle: int | None = None
        self._journal_handle: int | None = None
        self._names: list[str] = []  # of the blobs that are written, or being written
        self._hash = hashlib.sha256(self._header)  # of the file as far as it stands
        self._journal_end = 0
        self._writer: ThreadPoolExecutor | None = None
        self._unsettled: Future[int] | None = None
        self._is_finished = False

    def begin(self) -> int:
        """Open, or resume where the last good blob ends; returns how many blobs stand.

        Raises: LockedError when another process writes this file, StorageError when it cannot be
            opened or the disk is full.
        """
        self.close()
        try:
            with self._writing():
                self.final.parent.mkdir(parents=True, exist_ok=True)
                self._handle = _open_locked(self.part)
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
                self._journal_handle = os.open(self.journal, flags, 0o666)
                self._resume()
        except BaseException:
            self.close()
            raise
        return len(self._names)

    def has(self, name: str) -> bool:
        """Whether a blob is written."""
        return self._index[name] < len(self._names)

    def append(self, name: str, data: np.ndarray | bytes) -> None:
        """Write the next blob; fsync it, and vouch for it in the journal, behind the caller's back.

        Raises: StorageError, for this blob or the one before (the part file stays, for the same
            command again); ValueError for a blob that is not the next one, or not of the planned
            size.
        """
        at = len(self._names)
        array = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        planned = self._blobs[at] if at < len(self._blobs) else None
        if (name, array.nbytes) != planned:
            raise ValueError(f"{self.part}: blob {name!r} of {array.nbytes}, planned {planned}")
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        self._handles()
        self._settle()
        self._names.append(name)
        self._writer = self._writer or ThreadPoolExecutor(1, "part-file")
        self._unsettled = self._writer.submit(self._write, at, raw)

    def finish(self) -> str:
        """Read everything back and compare with what was written; returns the file's SHA-256.

        The file keeps its `.part` name, and may be opened by others for reading.
        Raises: StorageError when the bytes on the disk are not the ones that were written.
        """
        if len(self._names) != len(self._blobs):
            raise ValueError(f"{self.part}: {len(self._names)} of {len(self._blobs)} blobs")
        handle, _ = self._handles()
        self._settle()
        found = hashlib.sha256()
        with self._writing():
            size = os.fstat(handle).st_size
            for chunk in _chunks(handle, 0, size):
                found.update(chunk)
        if size != self.nbytes or found.digest() != self._hash.digest():
            raise StorageError(
                f"{self.part}: what is on the disk is not what was written",
                hint="run the same command again; if this comes back, check the disk",
            )
        self._is_finished = True
        return found.hexdigest()

    def commit(self) -> Path:
        """Give the file its final name, replacing an earlier one. Raises: StorageError."""
        if not self._is_finished:
            raise ValueError(f"{self.part}: not finished")
        with self._writing():
            os.replace(self.part, self.final)
            fsync_folder(self.final.parent)
            self.journal.unlink(missing_ok=True)
        self.close()
        return self.final

    def close(self) -> None:
        """Let go of files and lock; what is written stays for the next `begin`."""
        with suppress(StorageError):  # a blob that is not vouched for is written again
            self._settle()
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None
        for handle in (self._journal_handle, self._handle):
            if handle is not None:
                os.close(handle)
        self._handle = self._journal_handle = None
        self._is_finished = False

    def _write(self, at: int, raw: memoryview) -> int:
        """Write blob `at`, then vouch for it; returns the length of the journal's new line."""
        handle, journal = self._handles()
        padding = bytes(-len(raw) % self._alignment)
        whole = self._hash.copy()  # a blob that cannot be written leaves no trace in it
        for start, data in ((self._ends[at], raw), (self._ends[at] + len(raw), padding)):
            _write_at(handle, start, data)
            whole.update(data)
        os.fsync(handle)
        line = {"name": self._names[at], "nbytes": len(raw), "sha256": whole.hexdigest()}
        length = _write_line(journal, self._journal_end, line)
        self._hash = whole
        return length

    def _settle(self) -> None:
        """Wait until the last blob is vouched for. Raises: StorageError; it is then unwritten."""
        unsettled, self._unsettled = self._unsettled, None
        if unsettled is None:
            return
        try:
            with self._writing():
                self._journal_end += unsettled.result()
        except StorageError:
            del self._names[-1]
            raise

    def _resume(self) -> None:
        """Keep the leading blobs that stand, cut off the rest."""
        handle, journal = self._handles()
        lines, ends = self._read_journal()
        standing = self._standing(lines) if lines and self._starts_with_header() else 0
        self._names = [line["name"] for line in lines[:standing]]
        if self._names:
            self._journal_end = ends[standing]
            os.ftruncate(journal, self._journal_end)
            os.ftruncate(handle, self._ends[standing])
        else:
            self._start_afresh()

    def _start_afresh(self) -> None:
        handle, journal = self._handles()
        os.ftruncate(journal, 0)
        os.ftruncate(handle, 0)
        _write_at(handle, 0, self._header)
        os.fsync(handle)
        self._journal_end = _write_line(journal, 0, self._plan)
        self._hash = hashlib.sha256(self._header)
        fsync_folder(self.final.parent)

    def _read_journal(self) -> tuple[list[dict[str, Any]], list[int]]:
        """Lines that fit the plan, and where the plan's and each of theirs ends in the journal."""
        _, journal = self._handles()
        lines: list[dict[str, Any]] = []
        ends: list[int] = []
        with os.fdopen(os.dup(journal), "rb") as stream:
            for raw in stream:
                line = _parsed(raw)
                if not ends and line != self._plan:
                    break
                if ends and not self._fits(line, len(lines)):
                    break
                if ends:
                    lines.append(line)
                ends.append((ends[-1] if ends else 0) + len(raw))
        return lines, ends

    def _fits(self, line: Any, at: int) -> bool:
        if not isinstance(line, dict) or at >= len(self._blobs):
            return False
        return (line.get("name"), line.get("nbytes")) == self._blobs[at] and "sha256" in line

    def _starts_with_header(self) -> bool:
        handle, _ = self._handles()
        return b"".join(_chunks(handle, 0, len(self._header))) == self._header

    def _standing(self, lines: Sequence[dict[str, Any]]) -> int:
        """Leading blobs whose bytes are as the journal says; `_hash` is then of the file so far."""
        handle, _ = self._handles()
        whole = hashlib.sha256(self._header)
        for at, line in enumerate(lines):
            nbytes = self._ends[at + 1] - self._ends[at]
            for chunk in _chunks(handle, self._ends[at], nbytes):
                whole.update(chunk)
            if whole.hexdigest() != line["sha256"]:
                return at
            self._hash = whole.copy()
        return len(lines)

    def _handles(self) -> tuple[int, int]:
        if self._handle is None or self._journal_handle is None:
            raise ValueError(f"{self.part}: not open")
        return self._handle, self._journal_handle

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self.part, error) from error


def _open_locked(path: Path) -> int:
    """A descriptor of `path` that no other process has, by a lock that ends with ours."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its owner may have renamed it to the finished file while we were about to lock it.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise LockedError(
                f"{path}: another process is writing it",
                hint="wait for it, or export to another place",
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def _parsed(raw: bytes) -> Any:
    """A journal line, or None: a line that a kill cut short has no newline or is no JSON."""
    try:
        return json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def _chunks(handle: int, start: int, nbytes: int) -> Iterator[bytes]:
    """`nbytes` from `start`, fewer where the file ends."""
    end = start + nbytes
    while start < end and (chunk := os.pread(handle, min(CHUNK, end - start), start)):
        yield chunk
        start += len(chunk)


def _write_at(handle: int, start: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, start)
        view, start = view[written:], start + written


def _write_line(handle: int, start: int, line: dict[str, Any]) -> int:
    raw = canonical(line).encode() + b"\n"
    _write_at(handle, start, raw)
    os.fsync(handle)
    return len(raw)
