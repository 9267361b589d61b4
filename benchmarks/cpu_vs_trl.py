"""DPO and SFT on a CPU beside TRL: pairs or tokens per second, and peak memory.

    python benchmarks/cpu_vs_trl.py --tokenizer FOLDER --pairs ultrafeedback_pairs.jsonl
    python benchmarks/cpu_vs_trl.py --toy                    tiny sizes, random ids, no files needed

A 21 M Mistral in fp32 with LoRA on all linears, nothing quantised, over the first 24 rows. Every
measurement is a process of its own; sides take turns, `--repeats` times. No speed is reported from
a run that computes something else: ids and losses of both sides must agree first. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu_prepare import TOY, Setup, prepare
from cpu_rows import DisagreementError, Results, check, describe, make_rows, table
from cpu_work import Case, command, read_work

RESULTS = Path(__file__).resolve().parent / "results"
SHARED = "ZEPHYR_LITE_SHARED_DATA"
TOKENIZER, PAIRS = "models/mistral-7b-v0.1-tokenizer", "aif/ultrafeedback_pairs.jsonl"


def main(argv: list[str] | None = None) -> int:
    """Measure, check, write. Returns the exit code: 0, or 1 when the sides do not agree."""
    arguments = parse(argv)
    setup = TOY if arguments.toy else Setup()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = prepare(setup, folder, arguments.tokenizer, arguments.pairs)
        say(f"model: {parameters / 1e6:.1f} M parameters, fp32")
        results = measure(make_cases(arguments, setup), folder, arguments.repeats)
        work = read_work(folder)
    try:
        check(results)
    except DisagreementError as error:
        say(f"error: {error}")
        say("hint: no speed is reported from a run that computes something else")
        return 1
    stamp = describe(arguments.threads, toy=arguments.toy) | {"parameters": parameters}
    rows = make_rows(results, work, stamp)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
    print(table(rows))
    say(f"rows: {arguments.out}")
    return 0


def make_cases(arguments: argparse.Namespace, setup: Setup) -> list[Case]:
    """What is measured, in the order of one round."""
    limits = {"steps": arguments.steps, "warmup": arguments.warmup, "threads": arguments.threads}
    cases = [Case(side, "imports", threads=arguments.threads) for side in ("ours", "trl")]
    for task in arguments.tasks:
        limits["batch"] = setup.dpo_batch if task == "dpo" else setup.sft_batch
        cases += [
            Case("ours", task, budget, **limits, engine=engine)
            for engine in arguments.engines
            for budget in arguments.budgets
        ]
        cases += [
            Case("trl", task, batch, **limits, options=arguments.trl) for batch in arguments.batches
        ]
    return cases


def measure(cases: list[Case], folder: Path, repeats: int) -> Results:
    """Every case in a fresh process, `repeats` rounds; what each process reported."""
    results: Results = {case: [] for case in cases}
    for turn in range(repeats):
        for case in cases:
            results[case].append(run_apart(case, folder))
            peak = results[case][-1]["peak_rss_gib"]
            say(f"{turn + 1}/{repeats}  {case.name:16} {peak:.2f} GiB")  # no speed before `check`
    return results


def run_apart(case: Case, folder: Path) -> dict[str, Any]:
    """Do one case in a process of its own. Raises: SystemExit when it fails."""
    out = folder / "result.json"
    line, environment = command(case, folder, out)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        say(done.stderr[-3000:])
        raise SystemExit(f"{case.name}: the process ended with code {done.returncode}")
    return json.loads(out.read_text(encoding="utf-8"))


def say(text: str) -> None:
    """Progress, to standard error."""
    print(text, file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises: SystemExit(2) for wrong usage and for toy rows in results/."""
    parser = argparse.ArgumentParser(description="DPO and SFT on a CPU beside TRL.")
    parser.add_argument("--tokenizer", type=Path, help="folder of Mistral's tokenizer.json")
    parser.add_argument("--pairs", type=Path, help="ultrafeedback_pairs.jsonl")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="rounds over all cases")
    parser.add_argument("--steps", type=int, default=9, help="optimizer steps of a run")
    parser.add_argument("--warmup", type=int, default=3, help="steps of these that do not count")
    parser.add_argument("--tasks", nargs="+", choices=("dpo", "sft"), default=["dpo", "sft"])
    parser.add_argument(
        "--budgets", nargs="+", type=int, default=[2048], help="our tokens per micro-batch"
    )
    parser.add_argument(
        "--engines", nargs="+", choices=("native", "hf"), default=["native", "hf"], help="ours"
    )
    parser.add_argument(
        "--batches", nargs="+", type=int, default=[1, 2], help="TRL's per-device batch sizes"
    )
    parser.add_argument(
        "--trl", type=json.loads, default={}, metavar="JSON", help="more arguments of TRL's configs"
    )
    parser.add_argument("--out", type=Path, help="JSONL file (default results/cpu_vs_trl.jsonl)")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; rows are no results")
    arguments = parser.parse_args(argv)
    if not 0 < arguments.warmup < arguments.steps:
        parser.error("argument --warmup: at least one step, and fewer than --steps")
    find_data(parser, arguments)
    find_out(parser, arguments)
    return arguments


def find_data(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Fill in the files from ZEPHYR_LITE_SHARED_DATA; a toy run needs none."""
    if arguments.toy:
        arguments.tokenizer = arguments.pairs = None
        return
    if shared := os.environ.get(SHARED):
        arguments.tokenizer = arguments.tokenizer or Path(shared) / TOKENIZER
        arguments.pairs = arguments.pairs or Path(shared) / PAIRS
    for name in ("tokenizer", "pairs"):
        path = getattr(arguments, name)
        if path is None or not path.exists():
            parser.error(f"argument --{name}: {path or 'needed'} (or set {SHARED})")


def find_out(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Choose the file for the rows; toy rows are no results."""
    if not arguments.toy:
        arguments.out = arguments.out or RESULTS / "cpu_vs_trl.jsonl"
    elif arguments.out is None:
        handle, name = tempfile.mkstemp(prefix="zephyr-lite-toy-", suffix=".jsonl")
        os.close(handle)
        arguments.out = Path(name)
    elif RESULTS in arguments.out.resolve().parents:
        parser.error(f"argument --out: {arguments.out}: toy rows are no results")


if __name__ == "__main__":
    raise SystemExit(main())
