"""Running the command line in children that can be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


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
        self, *argv: str, home: Path, kill_after: float | None = None, sig: int = signal.SIGKILL
    ) -> tuple[int, str]:
        """Exit code (or -signal) and output; a signal is sent after `kill_after` seconds."""
        self.log.unlink(missing_ok=True)
        env = {"ZEPHYR_LITE_HOME": str(home)}
        words = [*argv, "--device", os.environ.get("ZEPHYR_LITE_TEST_DEVICE", "cpu")]
        pid = self._ask({"argv": words, "env": env, "log": str(self.log)})["pid"]
        if kill_after is not None:
            time.sleep(kill_after)
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
