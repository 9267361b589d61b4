"""Progress: bars with ETA on a terminal, sparse lines elsewhere, NDJSON events for programs.

Data goes to stdout, people read stderr.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0


class TerminalProgress:
    """A bar per piece of work on a terminal; a line now and then when stderr is a file."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._last, self._began = "", 0, 0, 0.0, 0.0

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""
        self.end()
        self._label, self._total, self._done = label, total, done
        self._last = self._began = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description:<10.26}"),
                BarColumn(bar_width=12),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(label, total=total, completed=done, figures="")
        else:
            self._console.print(
                f"{label}: {total - done} steps" + (f" from {done}" if done else "")
            )

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""
        self._done += 1
        figures = short_figures(record)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=1, figures=escape(figures))
        elif time.monotonic() - self._last > LINE_SECONDS or self._done == self._total:
            self._last = time.monotonic()
            self._console.print(
                f"{self._label}: {self._done}/{self._total} {figures}", soft_wrap=True
            )

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self._console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


class JsonProgress:
    """One JSON object a line on stdout: start, step, note, end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""
        self._emit("start", label=label, total=total, done=done)

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""
        self._emit("step", **record)

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self._emit("note", text=text)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        self._emit("end")

    def _emit(self, event: str, **fields: Any) -> None:
        print(json.dumps({"event": event, **fields}), file=self._stream, flush=True)


class QuietProgress:
    """Nothing but what must be known: notes."""

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""

    def end(self) -> None:
        """See `train.loop.Listener`."""


def short_figures(record: dict[str, Any]) -> str:
    """The figures of a step in a few words: they must fit beside a bar in 80 columns."""
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "rewards/margins" in record:
        parts.append(f"acc {record['rewards/accuracies']:.2f}")
        parts.append(f"{record['pairs_per_second']:.1f} pair/s")
    elif "tokens_per_second" in record:
        parts.append(f"{_short(record['tokens_per_second'])} tok/s")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f} GiB")
    return " ".join(parts)


def _short(number: float) -> str:
    return f"{number / 1000:.1f}k" if number >= 1000 else f"{number:.0f}"
