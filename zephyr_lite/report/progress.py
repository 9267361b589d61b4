"""Progress: bars with ETA on a terminal, sparse lines elsewhere, NDJSON events for programs.

Data goes to stdout, people read stderr.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0
LABEL_COLUMNS, BAR_COLUMNS = 26, 6
TIME_COLUMNS = 9  # an ETA of up to 999:59:59


class TerminalProgress:
    """A bar per piece of work on a terminal; a line now and then when stderr is a file."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._label, self._total, self._done, self._steps = "", 0, 0, 0
        self._last = self._began = 0.0

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""
        self.end()
        self._label, self._total, self._done, self._steps = label, total, done, 0
        self._last = self._began = time.monotonic()
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=BAR_COLUMNS),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[figures]}", markup=False),
                console=self._console,
            )
            self._progress.start()
            label = label[:LABEL_COLUMNS]
            self._task = self._progress.add_task(label, total=total, completed=done, figures="")
        else:
            self.note(f"{label}: {total - done} steps" + (f" from {done}" if done else ""))

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""
        self._done += 1
        self._steps += 1
        now = time.monotonic()
        rate = self._steps / max(now - self._began, 1e-9)
        if self._progress is not None and self._task is not None:
            figures = short_figures(record, rate, self._columns_left())
            self._progress.update(self._task, advance=1, figures=figures)
        elif now - self._last > LINE_SECONDS or self._done == self._total:
            self._last = now
            figures = short_figures(record, rate)
            left = f" {_clock((self._total - self._done) / rate)} left"
            left = left if self._done < self._total else ""
            self.note(f"{self._label}: {self._done}/{self._total}{left} {figures}")

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self._console.print(text, soft_wrap=True, markup=False)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _columns_left(self) -> int:
        """Columns beside label, bar, count and ETA, with the blanks between them."""
        label = min(len(self._label), LABEL_COLUMNS)
        count = 2 * len(str(self._total)) + 1
        return self._console.width - label - BAR_COLUMNS - count - TIME_COLUMNS - 4


class JsonProgress:
    """One JSON object a line on stdout: start, step, note, end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._open = False

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""
        self._open = True
        self._emit("start", label=label, total=total, done=done)

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""
        self._emit("step", **record)

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self._emit("note", text=text)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        if self._open:
            self._open = False
            self._emit("end")

    def _emit(self, event: str, **fields: Any) -> None:
        plain = {k: _as_json(v) for k, v in fields.items()}
        print(json.dumps({"event": event, **plain}, allow_nan=False), file=self._stream, flush=True)


class QuietProgress:
    """Nothing but notes: a path not taken, a check not made, a row set aside must be known."""

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        print(text, file=sys.stderr)

    def end(self) -> None:
        """See `train.loop.Listener`."""


class AttentiveProgress:
    """Another listener behind a check, before each piece and step, whether to go on at all."""

    def __init__(self, listener: Any, check: Callable[[], None]) -> None:
        self._listener, self._check = listener, check

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`. Raises: what the check raises."""
        self._check()
        self._listener.start(label, total, done)

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`. Raises: what the check raises."""
        self._check()
        self._listener.step(record)

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self._listener.note(text)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        self._listener.end()


def short_figures(record: dict[str, Any], steps_per_second: float, columns: int = 80) -> str:
    """The figures of a step in a few words, the most telling ones first, as many as fit.

    Args:
        record: metrics under TRL's names. steps_per_second: shown where the record has no rate.
        columns: room for them.
    """
    chosen, used = [], 0
    for part in _figures(record, steps_per_second):
        used += len(part) + bool(chosen)
        if used > columns:
            break
        chosen.append(part)
    return " ".join(chosen)


def _figures(record: dict[str, Any], steps_per_second: float) -> list[str]:
    parts = []
    if "loss" in record:
        parts.append(f"loss {record['loss']:.3f}")
    if "pairs_per_second" in record:
        parts.append(f"{_short(record['pairs_per_second'])} pair/s")
    elif "tokens_per_second" in record:
        parts.append(f"{_short(record['tokens_per_second'])} tok/s")
    else:
        parts.append(f"{_short(steps_per_second)}/s")
    if "rewards/margins" in record:
        parts.append(f"margin {record['rewards/margins']:.2g}")
        parts.append(f"acc {record['rewards/accuracies']:.2f}")
    if "peak_memory_gib" in record:
        parts.append(f"{record['peak_memory_gib']:.1f}G")
    return parts


def _short(number: float) -> str:
    """Three figures or so: 0.21, 4.5, 120, 3.4k."""
    if number >= 1000:
        return f"{number / 1000:.1f}k"
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _as_json(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
