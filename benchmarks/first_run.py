"""The main job as a stranger meets it: clean clone, fresh environment, the README's first command.

    python benchmarks/first_run.py            clone, install, run; a row in results/first_run.jsonl
    python benchmarks/first_run.py --here     run only, in this environment, with an empty cache

The row holds seconds of installation and of the run, peak memory of the largest process, and the
run's own figures: held-out losses and accuracies, the exported file's drift, questions right.
Needs nothing but Python and git.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure and append the row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--here", action="store_true", help="no clone, no installation")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/first_run.jsonl")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Path(folder), arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Do the job in an empty folder; the row."""
    began = time.monotonic()
    program, checkout = Path(sys.executable).with_name("zephyr-lite"), ROOT
    if not arguments.here:
        checkout = folder / "zephyr-lite"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(checkout)], check=True)
        subprocess.run([sys.executable, "-m", "venv", ".venv"], cwd=checkout, check=True)
        pip = [str(checkout / ".venv/bin/pip"), "install", "-q", "-e", ".[llama]"]
        subprocess.run(pip, cwd=checkout, check=True)
        program = checkout / ".venv/bin/zephyr-lite"
    installed = time.monotonic()
    command = [str(program), "run", arguments.recipe, "--run", str(folder / "run")]
    for override in arguments.overrides:
        command += ["--set", override]
    environment = os.environ | {"ZEPHYR_LITE_HOME": str(folder / "home")}
    process = subprocess.Popen(command, cwd=checkout, env=environment)
    peak = _watch(process)
    if process.wait():
        sys.exit(process.returncode)
    return {
        "benchmark": "first_run",
        "recipe": arguments.recipe,
        "overrides": arguments.overrides,
        "install_seconds": None if arguments.here else round(installed - began, 1),
        "run_seconds": round(time.monotonic() - installed, 1),
        "peak_rss_gib": round(peak / (1 << 30), 3),
        **_figures(folder / "run"),
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for the process; peak resident bytes of the largest child, by the kernel's count."""
    process.wait()
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024


def _commit() -> str:
    """Commit that was measured, with `+dirty` where the checkout differs from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("+dirty" if git("status", "--porcelain") else "")


def _figures(run: Path) -> dict[str, Any]:
    """What the run says of itself."""
    sft = json.loads((run / "sft/eval.json").read_text())
    dpo = json.loads((run / "dpo/eval.json").read_text())
    export = json.loads((run / "export/report.json").read_text())
    stages = json.loads((run / "manifest.json").read_text())["stages"]
    base_loss, sft_loss = (sft[k]["eval_loss_assistant"] for k in ("base", "sft"))
    return {
        "machine": stages["sft"]["machine"],
        "stage_seconds": {name: stage["seconds"] for name, stage in stages.items()},
        "sft_eval_loss_assistant": sft_loss,
        "base_eval_loss_assistant": base_loss,
        "sft_below_base": round(1 - sft_loss / base_loss, 4),
        "dpo_rewards_accuracy": dpo["dpo"]["eval_rewards/accuracies"],
        "dpo_logps_accuracy": dpo["dpo"]["eval_logps/accuracies"],
        "sft_logps_accuracy": dpo["sft"]["eval_logps/accuracies"],
        "audit": stages["dpo"].get("audit"),
        "export": {f["file"]: f.get("verify", {}).get("drift") for f in export["files"]},
        "questions": {k: export["questions"][k] for k in ("asked", "right", "ended")}
        if "questions" in export
        else None,
    }


if __name__ == "__main__":
    main()
