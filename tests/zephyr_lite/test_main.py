"""The entry point: whatever is raised becomes one line, a hint and an exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from zephyr_lite.cli import main
from zephyr_lite.errors import MachineError, Stopped
from zephyr_lite.stopping import Interrupted, Stop


@pytest.fixture(autouse=True)
def _no_debug(monkeypatch):
    monkeypatch.delenv("ZEPHYR_LITE_DEBUG", raising=False)


def _raises(error: BaseException):
    def invoke(_: object) -> None:
        raise error

    return invoke


def _outcome(capsys, error: BaseException) -> tuple[int, str]:
    with pytest.raises(SystemExit) as caught:
        main([], _raises(error))
    return int(caught.value.code or 0), capsys.readouterr().err


def test_a_bug_is_short_and_asks_for_a_report(capsys):
    status, err = _outcome(capsys, KeyError("x\nrow contents on a second line"))
    assert status == 1
    assert "Traceback" not in err and "second line" not in err.splitlines()[1]
    assert err.startswith("error: unexpected KeyError: ")
    assert "cli.py:" in err
    assert "report it" in err and "ZEPHYR_LITE_DEBUG=1" in err


def test_debug_shows_the_traceback(capsys, monkeypatch):
    monkeypatch.setenv("ZEPHYR_LITE_DEBUG", "1")
    status, err = _outcome(capsys, KeyError("x"))
    assert status == 1
    assert "Traceback (most recent call last)" in err and err.count("error: ") == 1


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (OSError(28, "No space left on device", "x"), 5, "No space left on device: 'x'"),
        (MemoryError(), 3, "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), 3, "tokens_per_micro_batch"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), 3, "tokens_per_micro_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "out of memory"),
        (MachineError("no GPU", hint="get one"), 3, "hint: get one"),
        (KeyboardInterrupt(), 130, "stopped: stopped"),
        (Stopped("saved", exit_code=143), 143, "stopped: saved"),
    ],
)
def test_every_error_has_its_exit_code(capsys, error, status, text):
    found, err = _outcome(capsys, error)
    assert found == status
    assert text in err and "Traceback" not in err


def test_a_library_that_is_missing_is_no_traceback(capsys, monkeypatch):
    """Nothing that needs it may be imported to say so."""
    for name in [name for name in sys.modules if name.startswith("zephyr_lite.train")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    status, err = _outcome(capsys, ModuleNotFoundError("No module named 'bitsandbytes'"))
    assert status == 1 and "'bitsandbytes'" in err and "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_library_turned_into_an_error_is_a_stop(capsys, number):
    """transformers does: a lazy import that is interrupted becomes ModuleNotFoundError."""

    def invoke(_: object) -> None:
        with Stop().installed():
            with suppress(Interrupted):
                os.kill(os.getpid(), number)
            raise ModuleNotFoundError("could not import module")

    with pytest.raises(SystemExit) as caught:
        main([], invoke)
    assert caught.value.code == 128 + number
    assert capsys.readouterr().err.startswith("stopped: stopped\nhint: run the same")


@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_ctrl_c_while_it_is_still_importing_exits_130(tmp_path, root, delay):
    recipe = tmp_path / "x.yaml"
    recipe.write_text("name: x\nbase: ./absent\nsft: {}\ndata: {dialogues: {train: d.jsonl}}\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from zephyr_lite import cli\n"
        "print('ready', flush=True)\n"
        "cli.main(['sft', sys.argv[2]])\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(root), str(recipe)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout and child.stdout.readline() == "ready\n"
    time.sleep(0.05 + delay)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "stopped" in err and "Traceback" not in err
