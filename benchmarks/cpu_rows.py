"""From what the processes of cpu_vs_trl.py reported to rows: agreement first, then figures.

A side's rate is that of its measured steps: per step the median over rounds, summed. Step i holds
the same examples on both sides and in every round, so nothing hangs on which step was lucky.
CPU seconds (of all threads) stand beside wall-clock seconds: they hardly change when something else
runs on the machine, and a row whose `load` was high at its end is to be read by them.

Memory is the process's highest resident set minus the resident set of a process that imported the
same libraries and did nothing else, both by the kernel's count.
"""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from statistics import median
from typing import Any

from cpu_work import Case, Work
from gpu_rows import installed_version, read_commit

# Relative difference of the sides' losses that is rounding: first step, and any later one.
FIRST_STEP, ANY_STEP = 1e-4, 1e-3
LIBRARIES = ("torch", "transformers", "peft", "trl")
Results = dict[Case, list[dict[str, Any]]]


class DisagreementError(Exception):
    """The sides do not compute the same."""


def check(results: Results) -> None:
    """Raise DisagreementError unless all runs of a task saw the same ids and had equal losses."""
    for task in sorted({case.task for case in results} - {"imports"}):
        runs = [(c, run) for c, found in results.items() if c.task == task for run in found]
        first, truth = runs[0]
        for case, run in runs[1:]:
            if run["digests"] != truth["digests"]:
                raise DisagreementError(f"{case.name} and {first.name}: other token ids")
            worst = _differences(run["losses"], truth["losses"])
            if len(worst) != case.steps:
                raise DisagreementError(f"{case.name}: {len(worst)} steps, not {case.steps}")
            if not (worst[0] <= FIRST_STEP and max(worst) <= ANY_STEP):
                raise DisagreementError(
                    f"{case.name} and {first.name}: losses differ, {worst[0]:.2g} in the first "
                    f"step, {max(worst):.2g} in the worst (relative)"
                )


def _differences(losses: list[float], truth: list[float]) -> list[float]:
    return [abs(a - b) / abs(b) for a, b in zip(losses, truth, strict=True)]


def describe(threads: int, *, toy: bool) -> dict[str, Any]:
    """What is the same in all rows of a run."""
    return {
        "benchmark": "cpu_vs_trl",
        "threads": threads,
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **{name: installed_version(name) for name in LIBRARIES},
        "load": round(os.getloadavg()[0], 2),
        "commit": read_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "toy": toy,
    }


def make_rows(results: Results, work: Work, stamp: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per case, then one with the ratios per task."""
    imports = {c.side: found for c, found in results.items() if c.task == "imports"}
    baseline = {side: median(run["rss_gib"] for run in runs) for side, runs in imports.items()}
    rows = []
    for task in ("dpo", "sft"):
        cases = {case: runs for case, runs in results.items() if case.task == task}
        figures = [_figures(c, runs, work, baseline[c.side]) for c, runs in cases.items()]
        if figures:
            worst = _worst_difference(cases)
            rows += [stamp | row for row in figures]
            rows.append(stamp | {"loss_worst_relative": worst} | _compare(task, figures))
    return rows


def _figures(
    case: Case, runs: list[dict[str, Any]], work: Work, imports_gib: float
) -> dict[str, Any]:
    """The figures of one case over all rounds."""
    measured = range(case.warmup, case.steps)
    seconds, cpu_seconds = (
        sum(median(run[clock][step] for run in runs) for step in measured)
        for clock in ("seconds", "cpu_seconds")
    )
    tokens = sum(len(ids) for step in measured for ids in work.sequences(case.task, step))
    examples = len(measured) * case.batch
    peak = median(run["peak_rss_gib"] for run in runs)
    unit = "pairs" if case.task == "dpo" else "rows"
    row: dict[str, Any] = {
        "task": case.task,
        "side": case.side,
        "engine": case.engine if case.side == "ours" else None,
        "setting": case.setting,
        "setting_is": "tokens_per_micro_batch" if case.side == "ours" else "per_device_batch",
        "options": case.options,
        "batch": case.batch,
        "steps": case.steps,
        "warmup_steps": case.warmup,
        "repeats": len(runs),
        unit: examples,
        "tokens": tokens,
        "seconds": round(seconds, 4),
        "cpu_seconds": round(cpu_seconds, 4),
        "slowest_round_seconds": round(max(sum(r["seconds"][case.warmup :]) for r in runs), 4),
        f"{unit}_per_second": round(examples / seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_rss_gib": round(peak, 4),
        "imports_rss_gib": round(imports_gib, 4),
        "peak_rss_above_imports_gib": round(peak - imports_gib, 4),
        "loss": runs[0]["losses"][0],
        "last_loss": runs[0]["losses"][-1],
    }
    if case.task == "dpo":
        epochs = examples / len(work.pairs)
        for clock, spent in (("seconds", seconds), ("cpu_seconds", cpu_seconds)):
            reference = median(run[f"reference_{clock}"][0] for run in runs)
            row[f"reference_{clock}"] = round(reference, 4)
            row[f"epoch_with_reference_{clock}"] = round(spent / epochs + reference, 4)
    return row


def _compare(task: str, figures: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of either side; memory against TRL's fastest setting and against its leanest."""
    ours = max((f for f in figures if f["side"] == "ours"), key=lambda f: f["tokens_per_second"])
    others = [f for f in figures if f["side"] == "ours" and f["engine"] != ours["engine"]]
    theirs = [f for f in figures if f["side"] == "trl"]
    fastest = max(theirs, key=lambda f: f["tokens_per_second"])
    memory = "peak_rss_above_imports_gib"
    row = {
        "task": task,
        "side": "ratio",
        "engine": ours["engine"],
        "setting": ours["setting"],
        "trl_setting": fastest["setting"],
        "speed_ratio": round(fastest["seconds"] / ours["seconds"], 3),
        "cpu_ratio": round(min(f["cpu_seconds"] for f in theirs) / ours["cpu_seconds"], 3),
        "memory_ratio": round(ours[memory] / fastest[memory], 3),
        "memory_ratio_to_leanest": round(ours[memory] / min(f[memory] for f in theirs), 3),
    }
    if others:
        other = min(others, key=lambda f: f["seconds"])
        row["other_engine"] = other["engine"]
        row["speed_ratio_to_other_engine"] = round(other["seconds"] / ours["seconds"], 3)
    if task == "dpo":
        for name, clock in (("speed", "seconds"), ("cpu", "cpu_seconds")):
            whole = f"epoch_with_reference_{clock}"
            best = min(f[whole] for f in theirs)
            row[f"{name}_ratio_with_reference"] = round(best / ours[whole], 3)
    return row


def _worst_difference(cases: Results) -> float:
    """Largest relative difference of any step's loss between the sides' first runs."""
    first = [runs[0]["losses"] for runs in cases.values()]
    return max(max(_differences(losses, first[0])) for losses in first)


def cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for a terminal of 80 columns."""
    heads = ("pairs/s", "tokens/s", "CPU s", "ref. s", "GiB", "- imports")
    lines = [" " * 18 + "".join(f"{head:>10}" for head in heads)]
    for row in rows:
        if row["side"] == "ratio":
            lines += [_ratios(row), ""]
            continue
        pairs = f"{row['pairs_per_second']:.3f}" if row["task"] == "dpo" else ""
        reference = f"{row['reference_seconds']:.2f}" if row["task"] == "dpo" else ""
        name = f"{row['task']} {row['engine'] or row['side']} {row['setting']}"
        lines.append(
            f"{name:18}{pairs:>10}{row['tokens_per_second']:>10.0f}{row['cpu_seconds']:>10.2f}"
            f"{reference:>10}{row['peak_rss_gib']:>10.2f}{row['peak_rss_above_imports_gib']:>10.3f}"
        )
    return "\n".join(lines)


def _ratios(row: dict[str, Any]) -> str:
    parts = [f"{row['speed_ratio']:.2f}x the speed ({row['cpu_ratio']:.2f}x by CPU)"]
    if row["task"] == "dpo":
        parts.append(f"{row['speed_ratio_with_reference']:.2f}x with reference")
    parts.append(f"{row['memory_ratio']:.2f}x the memory")
    if "other_engine" in row:
        parts.append(f"{row['speed_ratio_to_other_engine']:.2f}x {row['other_engine']}")
    return f"{row['task']}: " + ", ".join(parts)
