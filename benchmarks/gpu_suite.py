"""The GPU suite: one command that asks a card every question this project's design rests on.

    python benchmarks/gpu_suite.py [--only PART ...] [--list] [--out FILE] [--minutes 9]
                                   [--toy] [--device cuda|cpu]

Parts run one after another, each in a process of its own, and append rows to a JSONL file; cases
that have their rows are skipped, so the command is simply repeated until it says that all is done.
Without a GPU the same code runs at toy size on the CPU into a temporary file: toy rows are no
results. Exit code 1 if anything failed or was wrong; see README.md for the parts and the rows.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import torch

from gpu.bench import Bench, Case
from gpu.rows import DONE, Ledger, Measure, Part, describe_machine, failed
from rows.provenance import REPO

PARTS = (
    "suite",
    "tiny",
    "machine",
    "kernels_correct",
    "kernels_speed",
    "kernels_gemm",
    "steps_sft",
    "steps_dpo",
    "plan_memory",
    "planned_runs",
    "fp16acc",
    "augmented_k",
    "attention_packed",
    "attention_shared",
    "nf4",
    "head",
    "gqa_memory",
    "fragmentation",
)
RESULTS = REPO / "benchmarks" / "results"
DEVICE_LOST = 3  # a worker's exit code: its process cannot use the device any more
GRACE_SECONDS = 45  # a case begun before the deadline may end after it; a hung one is killed then


class DeviceLost(Exception):
    """After an illegal access every later call of the process fails; a fresh process works."""


def say(text: str) -> None:
    """Progress, for people: standard error."""
    print(text, file=sys.stderr, flush=True)


def load_part(name: str) -> tuple[Part, ModuleType]:
    """Import gpu/questions/NAME.py: its PART says what it is, `cases(bench)` what it measures."""
    module = importlib.import_module(f"gpu.questions.{name}")
    return module.PART, module


def show(part: Part, case: dict[str, object], measure: Measure) -> None:
    """One line per row, so that a terminal shows what the file gets."""
    value = "" if measure.p50 is None else f"{measure.p50:.4g} {measure.unit}"
    rates = ", ".join(
        f"{key} {value:.4g}" for key, value in measure.derived.items() if type(value) is float
    )
    where = " ".join(f"{key}={value}" for key, value in case.items())
    state = "" if measure.status == "ok" else f"{measure.status}: {measure.note[:160]}"
    say(f"{part.name}  {where}  {measure.metric}  {value}  {rates}{state}")


def run_part(name: str, bench: Bench, ledger: Ledger, since: str = "") -> bool:
    """Measure every case of a part that has no rows yet. Returns whether all went well.

    since: a date; cases that were tried after it are passed over, whatever came of them.
    Raises: DeviceLost, when a row says so.
    """
    part, module = load_part(name)
    if bench.on_gpu:  # what the libraries hold for good, no case's collection need look at
        gc.freeze()
    ran = skipped = 0
    went_well = True
    for case in module.cases(bench):
        if ledger.has(part, case.shape) or (since and ledger.tried(part, case.shape) >= since):
            skipped += 1
            continue
        if bench.seconds_left() <= 0:
            report(part, {}, [failed("part", "out of time: run the command again")], ledger)
            return False
        measures = run_case(case)
        report(part, case.shape, measures, ledger)
        ran += 1
        went_well &= all(measure.status in DONE for measure in measures)
        if not is_alive(bench):
            report(part, {}, [failed("part", "the device stopped answering")], ledger)
            raise DeviceLost
    say(f"{name}: {ran} cases measured, {skipped} present")
    return went_well


def run_case(case: Case) -> list[Measure]:
    """The rows of one case. What it raises becomes a row: the suite outlives its questions."""
    try:
        measures = list(case.run())
    except Exception as error:
        traceback.print_exc()
        return [failed("case", f"{type(error).__name__}: {error}")]
    return measures or [failed("case", "the case measured nothing")]


def is_alive(bench: Bench) -> bool:
    """Whether the device still works: after an illegal access every later call fails too."""
    try:
        bench.release()
        bench.synchronize()
    except RuntimeError as error:
        say(f"device: {error}")
        return False
    return True


def report(part: Part, case: dict[str, object], measures: list[Measure], ledger: Ledger) -> None:
    """Rows to the file, then to the terminal."""
    ledger.append(part, case, measures)
    for measure in measures:
        show(part, case, measure)


def run_apart(name: str, arguments: argparse.Namespace, ledger: Ledger) -> bool:
    """Run a part in its own process: a crash, a hang or a leak ends there, memory starts clean.

    A process that lost the device is followed by another, which passes over what was tried, as
    long as each one adds rows and there is time.
    """
    since = datetime.now(UTC).isoformat(timespec="seconds")
    deadline = time.monotonic() + arguments.minutes * 60
    went_well = True
    while True:
        before = ledger.path.stat().st_size if ledger.path.exists() else 0
        minutes = (deadline - time.monotonic()) / 60
        code, reason = run_worker(name, arguments, ledger, minutes, [] if went_well else [since])
        went_well &= code == 0
        if code not in (0, 1, DEVICE_LOST):  # at these the worker has written a row itself
            report(load_part(name)[0], {}, [failed("part", reason)], ledger)
        has_grown = ledger.path.exists() and ledger.path.stat().st_size > before
        if code != DEVICE_LOST or not has_grown or time.monotonic() > deadline:
            return went_well


def run_worker(
    name: str, arguments: argparse.Namespace, ledger: Ledger, minutes: float, since: list[str]
) -> tuple[int | None, str]:
    """Exit code of one process over a part, None where it was killed; and that in words."""
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--only", name]
    command += ["--out", str(ledger.path), "--minutes", str(minutes)]
    command += ["--device", arguments.device, *(f"--since={date}" for date in since)]
    child = subprocess.Popen(command)
    try:
        code = child.wait(timeout=minutes * 60 + GRACE_SECONDS)
        return code, f"the part's process ended with code {code}"
    except subprocess.TimeoutExpired:
        return None, f"killed: still running {GRACE_SECONDS} s past its limit"
    finally:
        stop(child)


def stop(child: subprocess.Popen[bytes]) -> None:
    """End a worker: politely first, so that it ends what it started itself."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=10)
    except subprocess.TimeoutExpired:  # stuck in the driver
        child.kill()
        child.wait()


def leave(number: int, frame: object) -> NoReturn:
    """SIGTERM unwinds the stack like Ctrl-C does: no worker is left behind on the GPU."""
    raise SystemExit(128 + number)


def run_here(name: str, bench: Bench, ledger: Ledger, since: str) -> bool:
    """Run a part in this process; a part that fails before its first case gets a row as well.

    Raises: DeviceLost, as `run_part` does.
    """
    try:
        return run_part(name, bench, ledger, since)
    except DeviceLost:
        raise
    except Exception as error:
        traceback.print_exc()
        reason = failed("part", f"{type(error).__name__}: {error}")
        report(Part(name, 0, "the part did not start"), {}, [reason], ledger)
        return False


def choose_out(arguments: argparse.Namespace) -> Path:
    """Where rows go. Raises: SystemExit(2) for toy rows among the results."""
    if not arguments.toy:
        return arguments.out or RESULTS / "gpu.jsonl"
    if arguments.out is None:
        handle, name = tempfile.mkstemp(prefix="zephyr-lite-toy-", suffix=".jsonl")
        os.close(handle)
        return Path(name)
    if RESULTS in arguments.out.resolve().parents:
        say(f"error: {arguments.out}: toy rows are no results")
        say("hint: leave --out away, or name a file outside benchmarks/results")
        raise SystemExit(2)
    return arguments.out


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--toy` is implied on a CPU. Raises: SystemExit(2) for wrong usage."""
    parser = argparse.ArgumentParser(description="Ask this GPU the questions of benchmarks/.")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS)
    parser.add_argument("--list", action="store_true", help="print parts and their questions")
    parser.add_argument(
        "--out", type=Path, help="JSONL file (default benchmarks/results/gpu.jsonl)"
    )
    parser.add_argument("--toy", action="store_true", help="tiny sizes; rows are no results")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one"
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of each part")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--since", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device is None:
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: torch sees no CUDA GPU here")
    arguments.toy |= arguments.device == "cpu"
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the chosen parts. Returns the exit code: 0, 1 if a row is `error` or `wrong`, or 3 where
    the device was lost to this process."""
    arguments = parse(argv)
    if arguments.list:
        for name in PARTS:
            part, _ = load_part(name)
            print(f"{name:18} v{part.version}  {part.question}")
        return 0
    signal.signal(signal.SIGTERM, leave)
    device = torch.device(arguments.device)
    ledger = Ledger(choose_out(arguments), describe_machine(device, toy=arguments.toy))
    failures = []
    for name in arguments.only:
        deadline = time.monotonic() + arguments.minutes * 60
        if arguments.toy or arguments.worker:
            bench = Bench(device, toy=arguments.toy, deadline=deadline)
            try:
                went_well = run_here(name, bench, ledger, arguments.since)
            except DeviceLost:
                return DEVICE_LOST
        else:
            went_well = run_apart(name, arguments, ledger)
        failures += [] if went_well else [name]
    say(f"rows: {ledger.path}" + (f"; failed: {', '.join(failures)}" if failures else ""))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
