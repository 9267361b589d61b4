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
from typing import Any

from zephyr_lite.errors import Stopped

RESUME = "run the same command again to go on from here"


class Interrupted(BaseException):
    """A signal at a safe point, anywhere in the code.

    Not an Exception: libraries swallow those while they import optional parts, and go on.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.stopped = Stopped("stopped", exit_code=128 + number, hint=RESUME)


class Stop:
    """Whether the user or the system asked this process to stop."""

    def __init__(self) -> None:
        self.requested: int | None = None  # signal number
        self._deferring = False
        self._outer: Stop | None = None

    @contextmanager
    def installed(self) -> Iterator[Stop]:
        """Handle SIGINT and SIGTERM inside the block. Raises: Interrupted outside `deferred`."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            self._take_over(before[signal.SIGINT])
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

    def safe_point(self) -> None:
        """Raise Interrupted where a signal came outside `deferred` and its exception was lost.

        numpy, for one, clears whatever is raised while it looks up an attribute.
        """
        if self.requested is not None and not self._deferring:
            raise Interrupted(self.requested)

    def _handle(self, number: int, _: FrameType | None) -> None:
        is_first = self.requested is None
        # Noted in any case: should the exception be lost in a library, the next check stops.
        self.requested = number
        if self._outer is not None:
            self._outer.requested = number
        if self._deferring and is_first:
            with suppress(OSError):  # print is not safe in a signal handler
                os.write(2, b"\nstopping after this step; once more stops at once\n")
            return
        raise Interrupted(number)

    def _take_over(self, handler: Any) -> None:
        """A signal that the surrounding Stop noted, and that was lost on its way, counts here."""
        outer = getattr(handler, "__self__", None)
        if isinstance(outer, Stop):
            self._outer = outer
            if outer.requested is not None:
                self._handle(outer.requested, None)
