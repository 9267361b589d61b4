"""The paper's ablations on the built-in example: run, judge the answers, print and draw.

    python benchmarks/ablations.py                     what is not there yet, then the tables
    python benchmarks/ablations.py --only ablations    without the grid of epochs; or: --only grid
    python benchmarks/ablations.py --figure docs/ablations-dpo-epochs.svg
    python benchmarks/ablations.py --set seed=1 --runs runs/ablations-seed1

Runs lie side by side in one folder (`--runs`), where `zephyr-lite run` takes over the finished
stages of a sibling that had the same inputs. Stopped anywhere, the same command goes on. Each run
becomes one row of results/ablations.jsonl; `docs/ablations.md` says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ablation import tables
from ablation.judge import Judged, held_out_prompts, judge, win_rate
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.storage import read_json, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/ablations.jsonl"
EPOCHS = (1, 2, 3)
LONGEST_ANSWER = 64  # tokens
ROW = "ablation.json"  # in a run's folder: its row, written when everything else is
# An F16 file is what was trained to within 1e-5 nats; five prompts show that it was written well.
EXPORT = ("export.quants=[f16]", "export.verify_prompts=5")
BASELINE = "dsft"  # whose answers the others' are compared with
FIGURE_RUN = "sft3-dpo3"
# How often a run looks at itself, never what it computes.
WATCHED = ("dpo.log_every=1", "dpo.eval_every=12")


@dataclass(frozen=True)
class Experiment:
    """One run: a recipe of recipes/ablations and what is set on top."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()

    @property
    def watched(self) -> tuple[str, ...]:
        """Settings that show more and change nothing."""
        return WATCHED if self.name == FIGURE_RUN else ()


def main() -> None:
    """Run what is missing, then print the tables and draw the figure."""
    arguments = parse(sys.argv[1:])
    chosen = experiments(arguments.only, tuple(arguments.overrides))
    rows = [row(each, arguments.runs, arguments.out) for each in chosen]
    print(tables.everything(rows))
    if arguments.figure:
        lines = read_lines(arguments.runs / FIGURE_RUN / "dpo/metrics.jsonl")
        write_text(arguments.figure, tables.figure(lines))


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"), metavar="DIR")
    parser.add_argument("--only", choices=("ablations", "grid"))
    parser.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw it, as in docs/")
    return parser.parse_args(words)


def experiments(only: str | None, overrides: tuple[str, ...]) -> list[Experiment]:
    """All runs, each after those that it is compared with or takes stages over from."""
    found = [Experiment(BASELINE, "ablations/tiny-dsft")]
    if only != "grid":
        names = ("dsft-ddpo", "dsft-2", "ddpo")
        found += [Experiment(name, f"ablations/tiny-{name}") for name in names]
        pure = ("dpo.sft_weight=0",)  # the paper's loss has no such term, tiny's has
        found += [
            Experiment(f"{name}-pure", f"ablations/tiny-{name}", pure)
            for name in ("dsft-ddpo", "ddpo")
        ]
    if only != "ablations":
        found += grid()
    return [Experiment(each.name, each.recipe, each.overrides + overrides) for each in found]


def grid() -> Iterator[Experiment]:
    """1 to 3 epochs of dSFT, then none to 3 of dDPO."""
    for sft in EPOCHS:
        epochs = f"sft.epochs={sft}"
        yield Experiment(f"sft{sft}-dpo0", "ablations/tiny-dsft", (epochs,))
        for dpo in EPOCHS:
            both = (epochs, f"dpo.epochs={dpo}")
            yield Experiment(f"sft{sft}-dpo{dpo}", "ablations/tiny-dsft-ddpo", both)


def row(experiment: Experiment, runs: Path, out: Path) -> dict[str, Any]:
    """An experiment's row: from its folder, or by doing it now."""
    folder = runs / experiment.name
    settings = {"recipe": experiment.recipe, "overrides": list(experiment.overrides)}
    if (folder / ROW).exists():
        found = read_json(folder / ROW)
        if {key: found[key] for key in settings} == settings:
            return found
    print(f"{datetime.now():%H:%M:%S} {experiment.name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    train(experiment, folder)
    judged = answers(folder)
    found = {"benchmark": "ablations", "name": experiment.name, **settings}
    found |= {"wins": round(win_rate(judged, stored_answers(runs / BASELINE)), 2)}
    found |= figures(folder, judged) | {
        "wall_seconds": round(time.monotonic() - began, 1),
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_json(folder / ROW, found)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(found) + "\n")
    return found


def train(experiment: Experiment, folder: Path) -> None:
    """`zephyr-lite run` in a process of its own; its error ends this program."""
    command = [sys.executable, "-m", "zephyr_lite.cli", "run", experiment.recipe, "--quiet"]
    command += ["--run", str(folder.resolve()), "--offline", "--device", "cpu"]
    for override in (*experiment.overrides, *EXPORT, *experiment.watched):
        command += ["--set", override]
    done = subprocess.run(command, cwd=ROOT)  # the checkout's own code, installed or not
    if done.returncode:
        sys.exit(done.returncode)


def answers(folder: Path) -> list[Judged]:
    """The exported model's greedy answers to the held-out prompts, judged; kept in the folder."""
    file = read_json(folder / "export/report.json")["files"][0]["file"]
    judged = []
    with LlamaCppModel(folder / "export" / file, n_ctx=512, threads=1) as model:
        for prompt in held_out_prompts():
            text, _ = model.generate([{"role": "user", "content": prompt}], LONGEST_ANSWER)
            judged.append(judge(prompt, text))
    lines = [json.dumps(asdict(each)) + "\n" for each in judged]
    write_text(folder / "answers.jsonl", "".join(lines))
    return judged


def stored_answers(folder: Path) -> list[Judged]:
    """What `answers` kept."""
    return [Judged(**line) for line in read_lines(folder / "answers.jsonl")]


def figures(folder: Path, judged: Sequence[Judged]) -> dict[str, Any]:
    """What the answers and the run itself say; None where there was no such stage."""
    scores = [j.score for j in judged]
    verdicts = [j.verdict for j in judged]
    # A model that answers and then talks on, as its base's texts do, shows here.
    first_lines = [judge(j.prompt, j.answer.strip().split("\n")[0]).verdict for j in judged]
    stages = read_json(folder / "manifest.json")["stages"]
    sft, dpo = (
        read_json(folder / f"{name}/eval.json") if name in stages else {} for name in ("sft", "dpo")
    )
    return {
        "prompts": len(judged),
        "score": round(statistics.fmean(scores), 4),
        "score_standard_error": round(statistics.stdev(scores) / len(scores) ** 0.5, 4),
        "verdicts": {name: verdicts.count(name) for name in tables.VERDICTS},
        "first_lines_right": first_lines.count("right"),
        "sft_eval_loss": sft.get("sft", {}).get("eval_loss"),
        "sft_eval_loss_assistant": sft.get("sft", {}).get("eval_loss_assistant"),
        "logps_accuracy": dpo.get("dpo", {}).get("eval_logps/accuracies"),
        "rewards_accuracy": dpo.get("dpo", {}).get("eval_rewards/accuracies"),
        "parent_logps_accuracy": dpo.get("sft", {}).get("eval_logps/accuracies"),
        "logps_chosen": dpo.get("dpo", {}).get("eval_logps/chosen"),
        "parent_logps_chosen": dpo.get("sft", {}).get("eval_logps/chosen"),
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "taken_over": [name for name, stage in stages.items() if "linked_from" in stage],
        "machine": stages["export"]["machine"],
    }


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file of ours."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def commit() -> str:
    """Commit that was measured, with `+dirty` where the checkout differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")


if __name__ == "__main__":
    main()
