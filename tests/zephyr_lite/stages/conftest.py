"""Running the command line in children that can be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file


class CommandLine:
    """Runs `zephyr-lite` in children of a server that imported everything once."""

    def __init__(self, log: Path) -> None:
        self.log = log
        script = Path(__file__).with_name("fork_server.py")
        self._server = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._answer() == {"ready": True}

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()

    def run(
        self,
        *argv: str,
        home: Path,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] | None = None,
        sig: int = signal.SIGKILL,
        env: Mapping[str, str] | None = None,
        without: Sequence[str] = (),
    ) -> tuple[int, str]:
        """Exit code (or -signal) and output; a signal is sent after `kill_after` seconds.

        Args:
            kill_when: the signal is sent, or the seconds begin, once this holds.
            env: more variables. without: packages that cannot be imported.
        """
        self.log.unlink(missing_ok=True)
        request = {
            "argv": [*argv, "--device", os.environ.get("ZEPHYR_LITE_TEST_DEVICE", "cpu")],
            "env": {"ZEPHYR_LITE_HOME": str(home), **(env or {})},
            "log": str(self.log),
            "without": list(without),
        }
        pid = self._ask(request)["pid"]
        if kill_when is not None:
            while not kill_when() and not _has_ended(pid):
                time.sleep(0.001)
        if kill_after is not None or kill_when is not None:
            time.sleep(kill_after or 0.0)
            os.kill(pid, sig)  # a child that ended is a zombie until waited for: this is safe
        status = self._ask({"wait": pid})["status"]
        return status, self.log.read_text() if self.log.exists() else ""

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the fork server died"
        return json.loads(line)


def _has_ended(pid: int) -> bool:
    """Whether a process is a zombie."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The command line, in children."""
    line = CommandLine(tmp_path_factory.mktemp("command") / "log")
    yield line
    line.close()


@pytest.fixture(scope="session")
def micro(root: Path) -> str:
    """The micro recipe: every stage in seconds."""
    return str(root / "tests" / "recipes" / "micro.yaml")


@pytest.fixture(scope="session")
def spiky_base(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_mistral` with two columns of many matrices a thousand times larger, and the norms
    before them as much smaller: the same function, which few bits a block cannot hold."""
    folder = Path(shutil.copytree(tiny_mistral, tmp_path_factory.mktemp("spiky") / "base"))
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if any(
            part in name for part in (".q_proj", ".k_proj", ".v_proj", ".gate", ".up", "lm_head")
        ):
            tensor[:, ::32] *= 1000
        if "norm" in name:
            tensor[::32] /= 1000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder
