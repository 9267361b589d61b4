"""Signals: a first Ctrl-C or SIGTERM stops at the next safe point, a second one at once.

Outside a training loop every write is atomic, so any point is safe; inside, the loop asks
`requested` at step boundaries, saves, and stops.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from zephyr_lite.errors import Stopped

RESUME = "run the same command again to go on from here"


class Stop:
    """Whether the user or the system asked this process to stop."""

    def __init__(self) -> None:
        self.requested: int | None = None  # signal number
        self._deferring = False

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM inside the block."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside the block a first signal only sets `requested`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def check(self, state: str) -> None:
        """Raise Stopped when a signal came; `state` says what was saved."""
        if self.requested is not None:
            raise Stopped(state, exit_code=128 + self.requested, hint=RESUME)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_first = self.requested is None
        # Noted in any case: where a library swallows the exception, the next check still stops.
        self.requested = number
        if self._deferring and is_first:
            with suppress(OSError):  # print is not safe in a signal handler
                os.write(2, b"\nstopping after this step; once more stops at once\n")
            return
        raise Stopped("stopped", exit_code=128 + number, hint=RESUME)
