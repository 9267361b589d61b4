"""One pass for all files: each tensor made once, every file resumed where it stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from zephyr_lite.errors import DataError, LockedError, MachineError
from zephyr_lite.export import streaming as streaming_module
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.streaming import Target, stream
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.storage import file_digest


class Counted(FoldedModel):
    """Counts how often each tensor is read and folded."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        super().__init__(base, adapter)
        self.made: list[str] = []

    def tensor(self, name: str) -> torch.Tensor:
        self.made.append(name)
        return super().tensor(name)


@pytest.fixture
def model(nf4_base: Path, adapter: Path) -> Counted:
    return Counted(nf4_base, adapter)


@pytest.fixture
def targets(model: Counted, tokenizer_folder: Path, tmp_path: Path) -> Callable[..., list[Target]]:
    """`targets("f16", "q8_0")` are fresh objects for the same two files."""

    def make(*quants: str) -> list[Target]:
        return [
            GgufTarget(
                model, tokenizer_folder, "t", tmp_path / f"{quant}.gguf", quant,
                name="m", identity="id", routes={},
            )
            for quant in quants
        ]  # fmt: skip

    return make


def digests(reports: list[dict[str, Any]]) -> list[str]:
    return [report["sha256"] for report in reports]


def committed(made: list[Target]) -> None:
    for target in made:
        target.commit()


def stop_after(count: int) -> Callable[[int, int], None]:
    def on_tensor(done: int, _: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return on_tensor


def test_a_tensor_is_made_once_for_all_files(
    model: Counted, targets: Callable[..., list[Target]], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    made = targets("f32", "f16", "q8_0")
    reports = stream(model, made, lambda *at: seen.append(at))
    assert model.made == model.names()
    assert seen == [(i + 1, 21) for i in range(21)]
    assert [r["quant"] for r in reports] == ["f32", "f16", "q8_0"]
    assert not list(tmp_path.glob("*.gguf"))  # they are to be verified first
    committed(made)
    assert [file_digest(tmp_path / r["file"]) for r in reports] == digests(reports)
    assert len(list(tmp_path.iterdir())) == 3
    # Alone, a file has the same bytes as in company.
    (tmp_path / "f16.gguf").unlink()
    assert digests(stream(model, targets("f16"))) == [reports[1]["sha256"]]


def test_files_go_on_from_where_each_of_them_stopped(
    model: Counted, targets: Callable[..., list[Target]]
) -> None:
    truth = digests(stream(model, (uninterrupted := targets("f16", "q8_0"))))
    for target in uninterrupted:
        target.close()
        target.part.unlink()
    with pytest.raises(KeyboardInterrupt):
        stream(model, targets("f16"), stop_after(13))
    with pytest.raises(KeyboardInterrupt):
        stream(model, targets("q8_0"), stop_after(5))
    model.made.clear()
    resumed = targets("f16", "q8_0")
    assert digests(stream(model, resumed)) == truth
    assert model.made == model.names()[5:]
    for target in resumed:
        target.close()
    model.made.clear()
    assert digests(stream(model, targets("q8_0", "f16"))) == truth[::-1]
    assert model.made == []  # complete, only not committed


def test_an_earlier_file_survives_a_failed_export(
    model: Counted, targets: Callable[..., list[Target]], tmp_path: Path
) -> None:
    (tmp_path / "f16.gguf").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        stream(model, targets("f16"), stop_after(7))
    assert (tmp_path / "f16.gguf").read_text() == "earlier"


def test_an_error_leaves_what_can_go_on(
    model: Counted, targets: Callable[..., list[Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, bad = model.tensor, model.names()[9]

    def tensor(name: str) -> torch.Tensor:
        if name == bad:
            raise DataError(f"tensor {name} is damaged")
        return original(name)

    with monkeypatch.context() as patch:
        patch.setattr(model, "tensor", tensor)
        with pytest.raises(DataError, match=bad):
            stream(model, targets("f16", "q8_0"))
    model.made.clear()
    stream(model, targets("f16", "q8_0"))  # not locked by the objects that failed
    assert model.made == model.names()[9:]


def test_two_exports_to_one_place_do_not_mix(
    model: Counted, targets: Callable[..., list[Target]]
) -> None:
    (first,) = targets("q8_0")
    first.begin()
    first.add(model.names()[0], model.tensor(model.names()[0]))
    others = targets("f16", "q8_0")
    with pytest.raises(LockedError):
        stream(model, others)
    for name in model.names()[1:]:
        first.add(name, model.tensor(name))
    first.finish()
    first.close()
    stream(model, targets("f16"))  # what the refused export had opened is free again


class Usage:
    def __init__(self, free: int) -> None:
        self.free = free


def test_disks_are_asked_for_the_sum_before_a_byte_is_written(
    model: Counted,
    targets: Callable[..., list[Target]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = targets("f16", "q8_0")
    needed = sum(target.nbytes for target in made)
    asked = []

    def usage(folder: Path) -> Usage:
        asked.append(folder)
        return Usage(needed - 1)

    monkeypatch.setattr(streaming_module.shutil, "disk_usage", usage)
    with pytest.raises(MachineError, match="GiB free") as raised:
        stream(model, made)
    assert raised.value.exit_code == 3
    assert asked == [tmp_path]
    assert not list(tmp_path.iterdir()) and not model.made


def test_what_stands_already_needs_no_room(
    model: Counted, targets: Callable[..., list[Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream(model, targets("f16", "q8_0"), stop_after(15))
    made = targets("f16", "q8_0")
    missing = sum(target.nbytes - target.part.stat().st_size for target in made)
    free = missing - 1
    monkeypatch.setattr(streaming_module.shutil, "disk_usage", lambda _: Usage(free))
    with pytest.raises(MachineError):
        stream(model, made)
    free = missing
    stream(model, made)


# Exports in a child, again and again, killing it at random; torch is imported once, by the parent.
KILLED_EXPORT = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.streaming import stream

base, adapter, tokenizer, out = map(Path, sys.argv[1:5])
quants, files, kills = sys.argv[5].split(","), int(sys.argv[6]), int(sys.argv[7])

def export():
    model = FoldedModel(base, adapter)
    targets = [
        GgufTarget(model, tokenizer, "t", out / f"{quant}.gguf", quant, name="m", identity="id",
                   routes={})
        for quant in quants
    ]
    stream(model, targets)
    for target in targets:
        target.commit()

def child():
    pid = os.fork()
    if pid == 0:
        export()
        os._exit(0)
    return pid

def run():
    started = time.monotonic()
    _, status = os.waitpid(child(), 0)
    assert status == 0, status
    return time.monotonic() - started

def stands():
    return sum(p.stat().st_size for p in out.glob("*.part"))

whole = run()
expected = {p.name: p.read_bytes() for p in out.iterdir()}
random.seed(0)
done = inside = 0
for _ in range(files):
    for path in out.iterdir():
        path.unlink()
    for _ in range(kills):
        pid = child()
        time.sleep(random.uniform(0, whole / kills))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        done += 1
        inside += stands() > 0
    run()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == expected
print(done, inside)
"""


def test_killed_at_any_moment_the_files_are_the_same(
    nf4_base: Path, adapter: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    files, kills = 3, 4
    arguments = [nf4_base, adapter, tokenizer_folder, tmp_path, "q4_k_m,q8_0", files, kills]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_EXPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    killed, inside = map(int, done.stdout.split())
    assert killed == files * kills
    assert inside >= 4  # there were files to damage
