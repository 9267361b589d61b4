"""A kill at any instant leaves the old state or the new one, and damage never loads."""

from __future__ import annotations

import builtins
import errno
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from zephyr_lite import storage
from zephyr_lite.errors import DataError, StorageError
from zephyr_lite.storage import (
    SEAL,
    file_digest,
    held,
    is_sealed,
    open_sealed,
    read_json,
    seal_digest,
    sealed_folder,
    sweep,
    write_json,
    write_text,
)

OLD, NEW = {"v": "old"}, {"v": "new"}
CALLS = ("fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "open")
KILLED, ALIVE = 9, 0


def _write_folder(final: Path, meta: dict[str, str]) -> None:
    with sealed_folder(final, meta) as part:
        for name in ("a.bin", "deep/b.bin"):
            (part / name).parent.mkdir(exist_ok=True)
            (part / name).write_bytes(meta["v"].encode() * 100)


def _in_child(work: Callable[[], None], kill_at: int | None = None) -> int:
    """Run in a forked child that dies, as by SIGKILL, at its `kill_at`-th call of the system.

    Even numbers die before a call, odd ones right after it.
    """
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if kill_at is not None:
        _arm(kill_at)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(ALIVE)


def _arm(kill_at: int) -> None:
    count = 0

    def wrap(call: Callable) -> Callable:
        def counted(*args, **kwargs):
            nonlocal count
            if count >= kill_at:
                os._exit(KILLED)
            result = call(*args, **kwargs)
            if count + 1 >= kill_at:
                os._exit(KILLED)
            count += 2
            return result

        return counted

    for name in CALLS:
        setattr(os, name, wrap(getattr(os, name)))
    builtins.open = wrap(builtins.open)
    storage.file_digest = wrap(storage.file_digest)
    io_open = Path.open
    Path.open = wrap(io_open)


def _kill_everywhere(prepare: Callable[[], None], work: Callable[[], None], check: Callable) -> int:
    """Try every crash point until the work survives; how many there were."""
    for kill_at in range(1000):
        prepare()
        status = _in_child(work, kill_at)
        check(status)
        if status == ALIVE:
            return kill_at
        assert status == KILLED, "the child failed instead of being killed"
    raise AssertionError("the work never ended")


# ---------------------------------------------------------------- crash points


@pytest.fixture
def no_disk(monkeypatch):
    """Nothing written is lost by a kill; the disk is waited for only for the sake of power loss."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize("old", [None, OLD], ids=["fresh", "replacing"])
def test_every_crash_point_of_a_sealed_folder(tmp_path, no_disk, old):
    final = tmp_path / "step-1"
    seen = set()

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if old:
            _write_folder(final, old)

    def check(status: int) -> None:
        sweep(tmp_path)
        if final.exists():
            meta = open_sealed(final)
            assert (final / "deep" / "b.bin").read_bytes() == meta["v"].encode() * 100
        else:
            meta = None
        assert meta in (old, NEW)
        assert meta == NEW or status == KILLED
        seen.add(None if meta is None else meta["v"])
        rest = {path.name for path in tmp_path.iterdir()} - {final.name}
        assert not rest, f"sweep left {rest}"
        _write_folder(final, NEW)  # the next writer is not in its way
        assert open_sealed(final) == NEW

    points = _kill_everywhere(prepare, lambda: _write_folder(final, NEW), check)
    assert points >= 40
    assert seen == {None if old is None else "old", "new"}


def test_a_reader_finds_old_or_new_without_a_sweep_but_for_one_instant(tmp_path, no_disk):
    """Between the two renames there is nothing: a reader sees "not there", never a mix."""
    final = tmp_path / "adapter"
    states = []

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        _write_folder(final, OLD)

    def check(_: int) -> None:
        states.append(open_sealed(final)["v"] if final.exists() else "absent")

    _kill_everywhere(prepare, lambda: _write_folder(final, NEW), check)
    order = [state for i, state in enumerate(states) if i == 0 or states[i - 1] != state]
    assert order == ["old", "absent", "new"]


@pytest.mark.parametrize("old", [None, OLD], ids=["fresh", "replacing"])
def test_every_crash_point_of_write_json(tmp_path, no_disk, old):
    path = tmp_path / "deep" / "manifest.json"

    def prepare() -> None:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if old:
            write_json(path, old)

    def check(status: int) -> None:
        value = read_json(path) if path.exists() else None
        assert value in (old, NEW)
        assert value == NEW or status == KILLED
        sweep(path.parent)
        assert {p.name for p in path.parent.glob("*")} <= {path.name}

    assert _kill_everywhere(prepare, lambda: write_json(path, NEW), check) >= 8


def test_manifest_is_written_last_and_after_its_files(tmp_path, monkeypatch):
    """Power loss: a rename may reach the disk before what it names, unless that was fsynced."""
    order: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def name_of(descriptor: int) -> str:
        return Path(os.readlink(f"/proc/self/fd/{descriptor}")).name

    monkeypatch.setattr(os, "fsync", lambda d: (order.append(name_of(d)), fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (order.append("RENAME"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("SEAL"), replace(a, b)))
    _write_folder(tmp_path / "x", NEW)
    assert {"a.bin", "b.bin", "deep"} <= set(order[: order.index("SEAL")])
    part = next(name for name in order if name.startswith(".x."))
    assert order.index("SEAL") < order.index(part) < order.index("RENAME")
    assert order[-1] == tmp_path.name


# ---------------------------------------------------------------- damage


@pytest.fixture
def sealed(tmp_path) -> Path:
    """A sealed folder."""
    _write_folder(tmp_path / "adapter", NEW)
    return tmp_path / "adapter"


def test_a_whole_folder_opens(sealed):
    assert open_sealed(sealed) == NEW
    assert is_sealed(sealed)
    before = seal_digest(sealed)
    (sealed / "deep" / "b.bin").write_bytes(b"other")
    storage.seal(sealed, OLD)
    assert seal_digest(sealed) != before


def test_every_flipped_bit_is_found(sealed):
    file = sealed / "a.bin"
    whole = file.read_bytes()
    for at in range(0, len(whole) * 8, 97):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        file.write_bytes(damaged)
        with pytest.raises(StorageError, match=r"a\.bin: damaged"):
            open_sealed(sealed)
    file.write_bytes(whole)
    assert is_sealed(sealed)


@pytest.mark.parametrize("size", [0, 1, 299, 301])
def test_another_size_is_found(sealed, size):
    os.truncate(sealed / "a.bin", size)
    with pytest.raises(StorageError, match=r"a\.bin: not a file of the size"):
        open_sealed(sealed)


def test_missing_and_swapped_files_are_found(sealed):
    first, second = sealed / "a.bin", sealed / "deep" / "b.bin"
    first.unlink()
    with pytest.raises(StorageError, match=r"a\.bin: missing"):
        open_sealed(sealed)
    first.mkdir()
    assert not is_sealed(sealed)
    first.rmdir()
    first.symlink_to(second)  # the same bytes, but not ours to vouch for
    assert not is_sealed(sealed)


@pytest.mark.parametrize(
    "manifest",
    [
        *("", "{", "[]", "null", "{}", '{"files": []}', '{"files": {}}', '{"meta": {}}'),
        '{"files": {"a.bin": {"size": 300}}, "meta": {}}',
        '{"files": {"x": null}, "meta": {}}',
        '{"files": {"a.bin": null}, "meta": {}}',
    ],
)
def test_every_damaged_manifest_is_a_storage_error(sealed, manifest):
    (sealed / SEAL).write_text(manifest)
    with pytest.raises(StorageError):
        open_sealed(sealed)
    assert not is_sealed(sealed)


def test_a_truncated_manifest_never_opens(sealed):
    whole = (sealed / SEAL).read_bytes()
    for length in range(0, len(whole) - 2, 7):
        (sealed / SEAL).write_bytes(whole[:length])
        assert not is_sealed(sealed)
    (sealed / SEAL).write_bytes(b"\xff" + whole)
    assert not is_sealed(sealed)
    (sealed / SEAL).unlink()
    with pytest.raises(StorageError, match="never completed"):
        open_sealed(sealed)


# ---------------------------------------------------------------- failing writes


def _limited(work: Callable[[], None], limit: int) -> int:
    """Run in a child that may write files of at most `limit` bytes."""

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            work()
        except StorageError as error:
            assert error.exit_code == 5
            assert "cannot be written" in str(error)
            assert error.hint and "space" in error.hint
            os._exit(5)

    return _in_child(run)


@pytest.mark.parametrize(("limit", "meta"), [(0, NEW), (299, NEW), (500, {"v": "x" * 500})])
def test_a_full_disk_keeps_the_old_folder(tmp_path, limit, meta):
    """No room at all, not for the last byte of a file, not for the manifest."""
    final = tmp_path / "adapter"
    _write_folder(final, OLD)

    def write() -> None:
        with sealed_folder(final, meta) as part:
            (part / "a.bin").write_bytes(b"x" * 300)

    assert _limited(write, limit) == 5
    assert open_sealed(final) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_full_disk_keeps_the_old_json(tmp_path):
    path = tmp_path / "manifest.json"
    write_json(path, OLD)
    assert _limited(lambda: write_json(path, {"v": "x" * 5000}), 1000) == 5
    assert read_json(path) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_full_disk_under_safetensors_is_a_storage_error(tmp_path):
    """safetensors raises a class of its own, which is no OSError."""
    import numpy as np
    from safetensors.numpy import save_file

    def write() -> None:
        with sealed_folder(tmp_path / "adapter") as part:
            save_file({"w": np.zeros(4096)}, part / "adapter_model.safetensors")

    assert _limited(write, 1000) == 5
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_the_block_leaves_nothing_and_stays_itself(tmp_path):
    _write_folder(tmp_path / "x", OLD)
    errors = (DataError("row"), StorageError("inner", hint="as it was"), KeyboardInterrupt())
    for error in errors:
        with pytest.raises(type(error)) as caught, sealed_folder(tmp_path / "x") as part:
            (part / "half").write_text("half")
            raise error
        assert caught.value is error
    assert open_sealed(tmp_path / "x") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_parent_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_json(tmp_path / "file" / "x.json", NEW)
    with pytest.raises(StorageError), sealed_folder(tmp_path / "file" / "x"):
        pass


def test_a_value_that_is_not_json_touches_nothing(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, OLD)
    with pytest.raises(TypeError):
        write_json(path, {"v": object()})
    assert read_json(path) == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_texts_are_utf_8_whatever_the_locale(tmp_path):
    write_json(tmp_path / "x.json", {"v": "naïve 中文 😀"})
    assert "中文" in (tmp_path / "x.json").read_bytes().decode()
    write_text(tmp_path / "x.txt", "ä\n")
    assert (tmp_path / "x.txt").read_bytes() == "ä\n".encode()


# ---------------------------------------------------------------- links, sweeping, locks


def test_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("keep")
    parent = tmp_path / "run"
    parent.mkdir()
    (parent / ".x.abc.part").symlink_to(outside)
    (parent / ".y.abc.old").symlink_to(outside)
    (parent / "y").mkdir()
    (parent / "x").symlink_to(outside)
    sweep(parent)
    assert not list(parent.glob(".*"))
    _write_folder(parent / "x", NEW)  # a link in the final place is replaced, not written through
    assert (parent / "x").is_dir() and not (parent / "x").is_symlink()
    assert [p.name for p in outside.iterdir()] == ["precious"]
    with pytest.raises(StorageError, match="a link cannot be"), sealed_folder(parent / "z") as part:
        (part / "link").symlink_to(outside / "precious")
    assert not (parent / "z").exists()


def test_sweep_leaves_others_alone(tmp_path):
    for name in (".a.1.part", ".b.1.part", "a", "plain.part", ".hidden"):
        (tmp_path / name).mkdir()
    sweep(tmp_path, "a")
    assert {p.name for p in tmp_path.iterdir()} == {".b.1.part", "a", "plain.part", ".hidden"}
    sweep(tmp_path / "absent")


def test_a_file_in_the_final_place_is_replaced(tmp_path):
    (tmp_path / "x").write_text("a file")
    _write_folder(tmp_path / "x", NEW)
    assert open_sealed(tmp_path / "x") == NEW
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_read_json_names_the_file(tmp_path):
    with pytest.raises(StorageError, match=r"absent\.json: cannot be read"):
        read_json(tmp_path / "absent.json")
    (tmp_path / "x.json").write_text('{"a": ')
    with pytest.raises(StorageError, match=r"x\.json: cannot be read"):
        read_json(tmp_path / "x.json")


def test_held_waits_and_is_freed_by_death(tmp_path):
    lock = tmp_path / "lock"

    def die_holding() -> None:
        with held(lock):
            os._exit(KILLED)

    assert _in_child(die_holding) == KILLED
    with held(lock):
        pass


def test_canonical_json_has_one_spelling():
    assert storage.digest({"a": 1, "b": [1.5, None]}) == storage.digest({"b": [1.5, None], "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": "1"})
    assert storage.canonical({"b": "ä", "a": True}) == '{"a":true,"b":"ä"}'


def test_file_digest_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert file_digest(tmp_path / "x") == expected


def test_an_unknown_os_error_keeps_its_reason(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    write_json(tmp_path / "x.json", OLD)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        write_json(tmp_path / "x.json", NEW)
    assert json.loads((tmp_path / "x.json").read_text()) == OLD
