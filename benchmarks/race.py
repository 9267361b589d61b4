"""SFT or DPO throughput beside rivals: the same rows, the same adapter, one process a measurement.

    python benchmarks/race.py dpo                       21 M fp32 on a CPU, Mistral-7B NF4 on a GPU
    python benchmarks/race.py sft --cap-gib 22.5        as a card of 24 GB would
    python benchmarks/race.py dpo --rival-python trl=PATH --rival-python unsloth=PATH
    python benchmarks/race.py sft --toy                 seconds; rows go to a temporary file

Sides and their settings stand in races/sides.py, environments for rivals in rivals/. Sides take
turns, `--rounds` times. No speed is reported from a run that computes something else: ids and
losses must agree first. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from races.model import GEOMETRIES
from races.plan import known_gpu, least_seconds
from races.prepare import SETUPS, find_base, prepare
from races.rows import Row, Runs, absent, make_rows, table
from races.sides import RIVALS, missing, run_apart, variants
from races.work import Case, read_work
from rows.provenance import cpu_name, read_commit, read_smi

RESULTS = Path(__file__).resolve().parent / "results"
OPTIMIZERS = {"sft": "adamw_8bit", "dpo": "paged_adamw_32bit"}  # the 7B recipe's, on a GPU


def main(argv: list[str] | None = None) -> int:
    """Measure, compare, write. Returns the exit code: 1 when our own side is not sound."""
    arguments = parse(argv)
    pythons, rows = find_rivals(arguments)
    with work_folder(arguments.work) as folder:
        base = arguments.model or find_base(arguments.geometry, folder, arguments.device)
        total = arguments.steps + arguments.warmup
        about = prepare(arguments.task, arguments.geometry, folder, total, base)
        say(f"{arguments.geometry}: {about['parameters'] / 1e6:.1f} M weights on {base}")
        cases = make_cases(arguments, ["ours", *pythons], base, about["batch"])
        results = race(cases, pythons, folder, arguments.rounds)
        stamp = describe(arguments) | about
        work, gpu = read_work(folder), known_gpu() if arguments.device == "cuda" else None
        least = least_seconds(cases[0], work, gpu) if gpu else None
        rows = make_rows(results, work, stamp, least) + [stamp | row for row in rows]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    print(table(rows))
    say(f"rows: {arguments.out}")
    return 0 if all(map(is_sound, rows)) else 1


def is_sound(row: Row) -> bool:
    """Whether a row speaks for our side, or not of it; a best that does not fit is no fault."""
    if row.get("side") != "ours" or row["status"] == "ok":
        return True
    return row["setting"] == "best" and row["status"] != "disagrees"


def find_rivals(arguments: argparse.Namespace) -> tuple[dict[str, str], list[Row]]:
    """The Python of each rival that can race, and a row for each that cannot."""
    pythons, rows = {}, []
    for side in arguments.rivals:
        python = arguments.pythons.get(side, sys.executable)
        if reason := missing(side, python):
            say(f"{side}: absent: {reason}")
            rows.append(absent(side, arguments.task, reason))
        else:
            pythons[side] = python
    return pythons, rows


def make_cases(
    arguments: argparse.Namespace, sides: list[str], base: Path, batch: int
) -> list[Case]:
    """What is measured, in the order of one round."""
    on_gpu = arguments.device == "cuda"
    return [
        Case(
            side, arguments.task, setting, options | arguments.more.get(side, {}), engine, batch,
            steps=arguments.steps + arguments.warmup,
            warmup=arguments.warmup,
            threads=arguments.threads,
            device=arguments.device,
            cap_gib=arguments.cap_gib,
            base=str(base),
            beta=SETUPS[arguments.geometry, arguments.task].beta,
            optimizer=OPTIMIZERS[arguments.task] if on_gpu else "adamw",
            dropout=arguments.dropout,
        )
        for side in sides
        for engine, setting, options in variants(
            side, arguments.task, arguments.geometry, batch, on_gpu=on_gpu
        )
        if setting in arguments.settings or side == "ours"
    ]  # fmt: skip


def race(cases: list[Case], pythons: dict[str, str], folder: Path, rounds: int) -> dict[Case, Runs]:
    """Every case in a fresh process, `rounds` times; who failed once is not asked again.

    What each reported is kept in the folder, so that a race that was stopped goes on from there.
    """
    results: dict[Case, Runs] = {case: [] for case in cases}
    kept, commit = folder / "runs.jsonl", read_commit()
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    known = {line["key"]: line["run"] for line in map(json.loads, lines)}
    for turn in range(rounds):
        for case in cases:
            if any(run["status"] != "ok" for run in results[case]):
                continue
            key = json.dumps([commit, turn, asdict(case)])
            run = known.get(key)
            if run is None:
                run = run_apart(case, folder, pythons.get(case.side, sys.executable))
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "run": run}) + "\n")
            results[case].append(run)
            # No speed before the comparison.
            say(f"{turn + 1}/{rounds}  {case.name}: {run['status']} {run.get('reason', '')}")
    return results


@contextmanager
def work_folder(named: Path | None) -> Iterator[Path]:
    """The folder of the work: the one that was named, which stays, or a temporary one."""
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
        yield named.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="zephyr-lite-race-") as name:
        yield Path(name)


def describe(arguments: argparse.Namespace) -> Row:
    """What is the same in all rows of a race."""
    on_gpu, now = arguments.device == "cuda", datetime.now(UTC)
    driver = read_smi("driver_version") if on_gpu else None
    return {
        "benchmark": "race",
        "race": f"{now:%Y%m%dT%H%M%S}-{os.getpid()}",
        "geometry": "other" if arguments.model else arguments.geometry,
        "device": arguments.device,
        "gpu": torch.cuda.get_device_name(0) if on_gpu else None,
        "driver": driver[0] if driver else None,
        "cap_gib": arguments.cap_gib,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "load": round(os.getloadavg()[0], 2),
        "dtype": "bfloat16" if on_gpu else "float32",
        "rounds": arguments.rounds,
        "python": platform.python_version(),
        "commit": read_commit(),
        "date": now.isoformat(timespec="seconds"),
        "toy": arguments.geometry == "toy",
    }


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises: SystemExit(2) for wrong usage and for toy rows in results/."""
    parser = argparse.ArgumentParser(description="SFT or DPO throughput beside rivals.")
    parser.add_argument("task", choices=("sft", "dpo"))
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, default=list(RIVALS))
    parser.add_argument(
        "--rival-python", action="append", default=[], metavar="NAME=PATH", dest="pythons",
        help="a rival's Python; without, the one that runs this",
    )  # fmt: skip
    parser.add_argument(
        "--settings", type=lambda text: text.split(","), default=["default", "best"]
    )
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES))
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a Mistral in place of it")
    parser.add_argument("--steps", type=int, help="optimizer steps that are timed")
    parser.add_argument("--warmup", type=int, help="steps before these")
    parser.add_argument("--rounds", type=int, help="rounds over all cases")
    parser.add_argument("--cap-gib", type=float, help="GPU memory that a side may reserve")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapter (sft)")
    parser.add_argument(
        "--more", action="append", default=[], metavar="SIDE=JSON", help="more options of a side"
    )
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="kept, and gone on from when it was stopped"
    )
    parser.add_argument("--out", type=Path, help="JSONL file (default results/race.jsonl)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; rows are no results")
    arguments = parser.parse_args(argv)
    _settle(parser, arguments)
    return arguments


def _settle(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fill in what hangs on the device, and refuse what cannot be."""
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = arguments.device == "cuda"
    if arguments.toy:
        arguments.geometry = "toy"
    arguments.geometry = arguments.geometry or ("mistral-7b" if on_gpu else "21m")
    arguments.steps = arguments.steps or (20 if on_gpu else 6)
    arguments.warmup = arguments.warmup or (12 if on_gpu else 3)
    arguments.rounds = arguments.rounds or (1 if on_gpu else 3)
    if min(arguments.steps, arguments.warmup, arguments.rounds) < 1:
        parser.error("arguments --steps, --warmup and --rounds: at least 1")
    if bad := set(arguments.settings) - {"default", "best"}:
        parser.error(f"argument --settings: {', '.join(sorted(bad))}: default, best or both")
    if arguments.dropout and arguments.task == "dpo":
        parser.error("argument --dropout: DPO is without, in the recipe and in TRL's trainer")
    if arguments.geometry == "mistral-7b" and not on_gpu:
        parser.error("argument --geometry: mistral-7b needs a GPU")
    if arguments.cap_gib and not on_gpu:
        parser.error("argument --cap-gib: a CPU has no such limit")
    arguments.pythons = dict(_named(parser, "--rival-python", p) for p in arguments.pythons)
    more = dict(_named(parser, "--more", m) for m in arguments.more)
    try:
        arguments.more = {side: json.loads(text) for side, text in more.items()}
    except ValueError as error:
        parser.error(f"argument --more: not JSON: {error}")
    _find_out(parser, arguments)


def _named(parser: argparse.ArgumentParser, option: str, text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if name not in (*RIVALS, "ours") or not value:
        parser.error(f"argument {option}: {text}: NAME=VALUE, NAME one of {', '.join(RIVALS)}")
    return name, value


def _find_out(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Choose the file for the rows; toy rows are no results."""
    if arguments.geometry != "toy":
        arguments.out = arguments.out or RESULTS / "race.jsonl"
    elif arguments.out is None:
        handle, name = tempfile.mkstemp(prefix="zephyr-lite-toy-", suffix=".jsonl")
        os.close(handle)
        arguments.out = Path(name)
    elif RESULTS in arguments.out.resolve().parents:
        parser.error(f"argument --out: {arguments.out}: toy rows are no results")


def _stop(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # through subprocess.run, which ends the process of the case


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    raise SystemExit(main())
