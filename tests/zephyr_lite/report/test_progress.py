"""What a person sees fits the terminal; what a program reads is JSON."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from zephyr_lite.report import progress
from zephyr_lite.report.progress import (
    JsonProgress,
    QuietProgress,
    TerminalProgress,
    short_figures,
)

DPO = {
    "loss": 0.6931,
    "rewards/margins": -0.0123,
    "rewards/accuracies": 0.55,
    "pairs_per_second": 12.34,
    "tokens_per_second": 12345.6,
    "peak_memory_gib": 22.345,
}
SFT = {"loss": 1.2345, "tokens_per_second": 12345.6, "peak_memory_gib": 22.345}
RATE = r"[\d.]+k? ?(tok|pair)?/s"
ETA = r"\d+:\d\d"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def _lines(label: str, total: int, done: int, record: dict, width: int = 80) -> list[str]:
    """Every line that a terminal of `width` columns is given for three steps."""
    stream, now = io.StringIO(), [0.0]
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    listener = TerminalProgress(console)
    listener.start(label, total, done)
    assert listener._progress is not None
    listener._progress.get_time = lambda: now[0]  # ETAs without waiting
    listener._progress.tasks[0]._get_time = lambda: now[0]
    for _ in range(3):
        now[0] += 9.0
        listener.step(record)
    listener.end()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.parametrize(
    ("label", "total", "record"),
    [
        ("sft", 5_000, SFT),
        ("dpo", 3_820, DPO),
        ("dpo", 123_456, DPO),
        ("pre-train", 12_345, SFT),
        ("reference", 982, {"pairs": 64}),
        ("check zephyr-7b-beta-full-Q8_0.gguf", 20, {"prompt": 1}),
        ("write q8_0", 291, {"tensor": 1}),
    ],
)
@pytest.mark.parametrize("width", [80, 120])
def test_the_line_fits_and_shows_eta_and_rate(label, total, record, width):
    lines = _lines(label, total, total // 2, record, width)
    assert max(map(len, lines)) <= width
    last = lines[-1]
    assert last.startswith(label[:20])
    assert f"{total // 2 + 3}/{total}" in last
    assert re.search(ETA, last), last
    assert re.search(RATE, last), last
    assert "…" not in last


def test_a_dpo_line_of_80_columns_has_everything_that_is_promised():
    last = _lines("dpo", 3_820, 1_900, DPO)[-1]
    for part in ("loss 0.693", "12 pair/s", "margin -0.012", "acc 0.55", "22.3G"):
        assert part in last


def test_a_narrow_terminal_drops_figures_not_the_line():
    lines = _lines("dpo", 3_820, 1_900, DPO, width=50)
    assert max(map(len, lines)) <= 50
    assert "loss 0.693" in lines[-1] and "22.3G" not in lines[-1]


def test_markup_in_a_label_is_text():
    assert _lines("[red]x[/red]", 5, 0, SFT)[-1].startswith("[red]x[/red]")


def test_a_file_gets_a_line_now_and_then(clock):
    stream = io.StringIO()
    listener = TerminalProgress(Console(file=stream, width=80))
    listener.start("sft", 100, 40)
    for _ in range(60):
        clock[0] += 1.0
        listener.step(SFT)
    listener.end()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "sft: 60 steps from 40"
    assert lines[-1] == "sft: 100/100 loss 1.234 12.3k tok/s 22.3G"
    assert 5 <= len(lines) <= 8
    assert re.fullmatch(r"sft: 51/100 0:49 left loss .*", lines[1])


def test_notes_are_not_broken_into_lines_or_coloured():
    stream = io.StringIO()
    note = "export: " + "x" * 200 + " [bold]not markup[/bold] verified"
    TerminalProgress(Console(file=stream, width=80)).note(note)
    assert stream.getvalue() == note + "\n"


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.0123, "0.012/s"), (3.21, "3.2/s"), (12.6, "13/s"), (999, "999/s"), (12345, "12.3k/s")],
)
def test_rates_have_the_figures_that_matter(rate, text):
    assert short_figures({}, rate) == text


def test_json_events_are_json_and_paired():
    stream = io.StringIO()
    listener = JsonProgress(stream)
    listener.end()
    listener.start("sft", 2, 0)
    listener.step({"loss": float("nan"), "learning_rate": 1e-4, "grad_norm": float("inf")})
    listener.note("naïve\nnote")
    listener.end()
    listener.end()

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    events = [json.loads(line, parse_constant=refuse) for line in stream.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["start", "step", "note", "end"]
    assert events[1] == {"event": "step", "loss": None, "learning_rate": 1e-4, "grad_norm": None}
    assert events[2]["text"] == "naïve\nnote"


def test_quiet_still_says_what_must_be_known(capsys):
    listener = QuietProgress()
    listener.start("sft", 2, 0)
    listener.step(SFT)
    listener.note("export: not verified, llama.cpp is not installed")
    listener.end()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "export: not verified, llama.cpp is not installed\n"
