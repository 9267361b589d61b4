"""A part file goes on from any byte it was stopped at, and trusts nothing it has not hashed."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zephyr_lite.errors import LockedError, StorageError
from zephyr_lite.export import part_file as part_file_module
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.storage import FREE_SPACE, file_digest

HEADER = b"a header of 27 bytes, no more"[:27]
DATA = {
    f"blob {i}": bytes((7 * i + j) % 251 for j in range(n)) for i, n in enumerate([50, 0, 64, 9])
}
ALIGNMENT = 16
EXPECTED = (
    HEADER + bytes(5) + DATA["blob 0"] + bytes(14) + DATA["blob 2"] + DATA["blob 3"] + bytes(7)
)


def planned(final: Path, identity: str = "id", **changes: Any) -> PartFile:
    options = {"header": HEADER, "blobs": [(n, len(d)) for n, d in DATA.items()], **changes}
    return PartFile(final, identity=identity, **{"alignment": ALIGNMENT, **options})


def complete(file: PartFile) -> int:
    """Append what is missing and commit; returns how many blobs stood."""
    stood = file.begin()
    for name, data in DATA.items():
        if not file.has(name):
            file.append(name, data)
    assert file.finish() == hashlib.sha256(EXPECTED).hexdigest()
    file.commit()
    return stood


@pytest.fixture
def final(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "model.bin"


@pytest.fixture
def stopped(final: Path) -> Path:
    """`final` with three of four blobs in its part file."""
    file = planned(final)
    file.begin()
    for name in list(DATA)[:3]:
        file.append(name, DATA[name])
    file.close()
    return final


def test_the_file_appears_whole_or_not_at_all(final: Path) -> None:
    file = planned(final)
    assert file.nbytes == len(EXPECTED)
    assert file.begin() == 0
    for name, data in DATA.items():
        assert not file.has(name)
        file.append(name, np.frombuffer(data, np.uint8))
        assert file.has(name)
    assert not final.exists()
    assert file.finish() == file_digest(file.part)
    assert not final.exists()
    assert file.commit() == final
    assert final.read_bytes() == EXPECTED
    assert list(final.parent.iterdir()) == [final]


def test_arrays_of_any_type_are_stored_as_their_bytes(tmp_path: Path) -> None:
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    }
    file = PartFile(tmp_path / "x", b"", [(n, a.nbytes) for n, a in arrays.items()], "")
    file.begin()
    for name, array in arrays.items():
        file.append(name, array)
    file.finish()
    assert file.commit().read_bytes() == b"".join(a.tobytes() for a in arrays.values())


def test_cut_at_any_byte_it_goes_on_to_the_same_file(stopped: Path) -> None:
    file = planned(stopped)
    part, journal = file.part.read_bytes(), file.journal.read_bytes()
    lines = journal.count(b"\n")
    states = [(cut, len(journal)) for cut in range(len(part), -1, -3)]
    states += [(len(part), cut) for cut in range(len(journal), 0, -11)]
    most = 0
    for part_cut, journal_cut in states:
        file.part.write_bytes(part[:part_cut] + b"torn"[: part_cut % 5])
        file.journal.write_bytes(journal[:journal_cut])
        stood = complete(planned(stopped))
        assert stopped.read_bytes() == EXPECTED, (part_cut, journal_cut)
        assert stood <= journal[:journal_cut].count(b"\n")
        most = max(most, stood)
        stopped.unlink()
    assert most == lines - 1 == 3


@pytest.mark.parametrize(
    ("at", "stands"),
    [(0, 0), (30, 0), (32, 0), (81, 0), (85, 0), (96, 2), (159, 2)],
    ids=["header", "its padding", "first", "last of first", "padding of first", "third", "its end"],
)
def test_a_changed_byte_is_seen_and_written_again(at: int, stands: int, stopped: Path) -> None:
    part = planned(stopped).part
    damaged = bytearray(part.read_bytes())
    damaged[at] ^= 1
    part.write_bytes(damaged)
    assert complete(planned(stopped)) == stands
    assert stopped.read_bytes() == EXPECTED


def swapped(journal: bytes) -> bytes:
    plan, first, second, third = journal.splitlines(keepends=True)
    return plan + second + first + third


def forged(journal: bytes) -> bytes:
    return journal.replace(b'"nbytes":50', b'"nbytes":49')


@pytest.mark.parametrize(
    "change",
    [
        lambda _: b"",
        lambda _: b"\xff\xfe\x00garbage\n\x80",
        lambda _: b"[" * 100_000 + b"\n",
        lambda _: b"[]\n{}\nnull\n3\n",
        lambda journal: journal.splitlines(keepends=True)[0] + b'{"name": []}\n',
        lambda journal: journal.splitlines(keepends=True)[0] + b"[1]\n",
        lambda journal: journal.replace(b'"sha256":"', b'"sha256":["', 1).replace(b'"}', b'"]}', 1),
        lambda journal: journal.replace(b'"part_file":1', b'"part_file":0'),
        lambda journal: json.dumps({**json.loads(journal.splitlines()[0]), "x": 1}).encode(),
        swapped,
        forged,
    ],
    ids=[
        "empty", "binary", "deep", "other JSON", "unhashable", "list", "no hash", "version",
        "more keys", "swapped", "forged",
    ],
)  # fmt: skip
def test_a_journal_that_is_not_ours_counts_for_nothing(
    change: Callable[[bytes], bytes], stopped: Path
) -> None:
    journal = planned(stopped).journal
    journal.write_bytes(change(journal.read_bytes()))
    assert complete(planned(stopped)) == 0
    assert stopped.read_bytes() == EXPECTED


def test_what_lies_behind_the_last_good_blob_is_cut_off(stopped: Path) -> None:
    file = planned(stopped)
    part, journal = file.part.read_bytes(), file.journal.read_bytes()
    file.part.write_bytes(part + b"torn" * 1000)
    file.journal.write_bytes(journal + b'{"name":"blob 9","nbytes":9,"sha256":"0"}\n' * 5)
    assert file.begin() == 3
    file.close()
    assert file.part.read_bytes() == part
    assert file.journal.read_bytes() == journal
    assert complete(planned(stopped)) == 3
    assert stopped.read_bytes() == EXPECTED


def test_a_line_without_its_end_is_written_again(stopped: Path) -> None:
    file = planned(stopped)
    file.journal.write_bytes(file.journal.read_bytes()[:-1])
    assert file.begin() == 2
    for name in ("blob 2", "blob 3"):
        file.append(name, DATA[name])
    file.close()
    assert planned(stopped).begin() == 4


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "other"},
        {"header": b"another header of 27 bytes!"},
        {"alignment": 32},
        {"blobs": [("other" if n == "blob 3" else n, len(d)) for n, d in DATA.items()]},
    ],
    ids=["identity", "header", "alignment", "blobs"],
)
def test_another_plan_starts_afresh(change: dict[str, Any], stopped: Path) -> None:
    file = planned(stopped, **change)
    assert file.begin() == 0
    assert not file.has("blob 0")
    file.close()
    assert complete(planned(stopped)) == 0  # and has left nothing for the first plan
    assert stopped.read_bytes() == EXPECTED


def test_blobs_come_in_order_and_whole(final: Path) -> None:
    file = planned(final)
    with pytest.raises(ValueError, match="not open"):
        file.append("blob 0", DATA["blob 0"])
    file.begin()
    with pytest.raises(ValueError, match="planned"):
        file.append("blob 1", b"")
    with pytest.raises(ValueError, match="of 49, planned"):
        file.append("blob 0", DATA["blob 0"][:49])
    with pytest.raises(ValueError, match="0 of 4 blobs"):
        file.finish()
    with pytest.raises(ValueError, match="not finished"):
        file.commit()
    with pytest.raises(ValueError, match="two blobs"):
        PartFile(final, b"", [("a", 1), ("a", 1)], "")


def test_two_writers_cannot_have_one_file(stopped: Path) -> None:
    first, second = planned(stopped), planned(stopped)
    assert first.begin() == 3
    with pytest.raises(LockedError, match="another process is writing") as raised:
        second.begin()
    assert raised.value.hint
    first.append("blob 3", DATA["blob 3"])  # the refused one has changed nothing
    first.finish()
    first.commit()
    assert stopped.read_bytes() == EXPECTED


def test_a_file_that_was_committed_meanwhile_is_not_touched(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = planned(stopped), planned(stopped)
    first.begin()
    first.append("blob 3", DATA["blob 3"])
    first.finish()
    flock, calls = fcntl.flock, []

    def late(handle: int, operation: int) -> None:
        if not calls:  # `second` has opened the part file; it gets its final name now
            first.commit()
        calls.append(handle)
        flock(handle, operation)

    monkeypatch.setattr(part_file_module.fcntl, "flock", late)
    assert second.begin() == 0
    assert len(calls) == 2
    assert stopped.read_bytes() == EXPECTED


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """What the kernel does when a quota is full, for real: a short write, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_rest_goes_on_later(tmp_path: Path) -> None:
    data = {f"{i}": np.full(40_000, i, np.uint8) for i in range(4)}
    file = PartFile(tmp_path / "x", b"head", [(n, d.nbytes) for n, d in data.items()], "")
    file.begin()
    file.append("0", data["0"])
    with files_of_at_most(60_000), pytest.raises(StorageError, match="cannot be written") as raised:
        file.append("1", data["1"])  # written behind our back: the next call says it
        file.append("2", data["2"])
    assert raised.value.hint == FREE_SPACE
    assert file.part.stat().st_size == 60_000
    file.append("1", data["1"])  # the same process may try again
    file.close()
    again = PartFile(tmp_path / "x", b"head", [(n, d.nbytes) for n, d in data.items()], "")
    assert again.begin() == 2
    for name in ("2", "3"):
        again.append(name, data[name])
    again.finish()
    assert again.commit().read_bytes() == b"head" + b"".join(d.tobytes() for d in data.values())


def test_the_journal_waits_for_the_disk(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, fsync, seen = planned(stopped), os.fsync, []

    def slow(handle: int) -> None:
        time.sleep(0.05)  # the caller is long behind `append`
        seen.append((os.fstat(handle).st_size, file.journal.read_bytes().count(b"\n")))
        fsync(handle)

    file.begin()
    monkeypatch.setattr(part_file_module.os, "fsync", slow)
    file.append("blob 3", DATA["blob 3"])
    file.close()  # waits
    assert [lines for size, lines in seen if size == len(EXPECTED)] == [4]
    assert planned(stopped).begin() == 4


def test_what_the_disk_refuses_later_is_said_and_written_again(
    final: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = planned(final)
    file.begin()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(part_file_module.os, "fsync", full)
        file.append("blob 0", DATA["blob 0"])
        with pytest.raises(StorageError, match="No space left") as raised:
            file.append("blob 1", b"")
    assert raised.value.hint == FREE_SPACE
    assert not file.has("blob 0")
    for name, data in DATA.items():
        file.append(name, data)
    file.finish()
    assert file.commit().read_bytes() == EXPECTED


def test_what_cannot_be_opened_is_an_error_of_storage(final: Path) -> None:
    planned(final).part.mkdir(parents=True)
    with pytest.raises(StorageError, match="cannot be written"):
        planned(final).begin()
    planned(final).part.rmdir()
    planned(final).part.symlink_to("elsewhere")
    with pytest.raises(StorageError, match="cannot be written"):
        planned(final).begin()


def test_a_kill_inside_commit_leaves_nothing_wrong(stopped: Path) -> None:
    file = planned(stopped)
    file.begin()
    file.append("blob 3", DATA["blob 3"])
    file.finish()
    file.close()
    file.part.rename(stopped)  # killed before the journal was removed
    assert file.journal.exists()
    assert complete(planned(stopped)) == 0
    assert list(stopped.parent.iterdir()) == [stopped]


def test_finish_reads_the_disk(stopped: Path) -> None:
    file = planned(stopped)
    file.begin()
    file.append("blob 3", DATA["blob 3"])
    with file.part.open("r+b") as handle:
        handle.seek(100)
        handle.write(b"?")
    with pytest.raises(StorageError, match="not what was written") as raised:
        file.finish()
    assert "same command" in str(raised.value.hint)
    file.close()
    assert complete(planned(stopped)) == 2


def test_bytes_behind_the_end_are_not_passed_on(stopped: Path) -> None:
    file = planned(stopped)
    file.begin()
    file.append("blob 3", DATA["blob 3"])
    with file.part.open("r+b") as handle:  # the blob itself may be on its way still
        handle.seek(len(EXPECTED))
        handle.write(b"?")
    with pytest.raises(StorageError, match="not what was written"):
        file.finish()
