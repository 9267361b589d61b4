"""From what the processes of a race reported to rows: agreement first, then figures.

No speed without agreement. The truth is the run with whose losses most other programs agree; who
saw other token ids or lost otherwise is `disagrees`, and its row has both losses and no figure.

A side's rate is that of its timed steps: per step the median over rounds, summed. Step i holds the
same examples on all sides and in every round, so nothing hangs on which step was lucky. Memory on a
CPU is the highest resident set minus the one after the imports, both by the kernel's count; on a
GPU what torch's allocator held at most in the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from races.work import Case, Work

# Largest relative difference of losses that is rounding: (first step, any step).
TOLERANCES = {"cpu": (1e-4, 1e-3), "cuda": (2e-2, 5e-2)}
WITH_DROPOUT = 5e-2  # any step but the first, which is without
FLOOR = 0.05  # nats: what a smaller loss is compared to
COMPILED = 150  # seconds that Unsloth may take to compile, by its own account 100
Runs = list[dict[str, Any]]
Row = dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What agreement says of one case.

    status: ok | disagrees | unchecked, where no other run was there to agree with.
    """

    status: str
    reason: str = ""
    truth: str = ""
    first: float | None = None
    worst: float | None = None


def judge(results: dict[Case, Runs]) -> dict[Case, Verdict]:
    """Verdicts on all cases that ran."""
    done = {case: runs for case, runs in results.items() if _is_ok(runs)}
    if len(done) < 2:
        return {case: Verdict("unchecked", "no other run to agree with") for case in done}
    agree = {a: {b for b in done if _compare(b, done[b], a, done[a]).status == "ok"} for a in done}

    def support(case: Case) -> tuple[int, int]:
        return len({b.side for b in agree[case]} | {case.side}), len(agree[case])

    truth = max(done, key=support)  # the first of equals
    return {case: _compare(case, runs, truth, done[truth]) for case, runs in done.items()}


def _compare(case: Case, runs: Runs, other: Case, truth: Runs) -> Verdict:
    """Whether all runs of a case saw the ids and had the losses of another's first run."""
    first = worst = 0.0
    for run in runs:
        if run["digests"] != truth[0]["digests"]:
            return Verdict("disagrees", f"other token ids than {other.name}", other.name)
        each = _differences(run["losses"], truth[0]["losses"])
        if len(each) != case.steps:
            return Verdict("disagrees", f"losses of {len(each)} steps", other.name)
        first, worst = max(first, each[0]), max(worst, *each)
    limit, any_step = TOLERANCES[case.device]
    any_step = max(any_step, WITH_DROPOUT) if case.dropout else any_step
    if first <= limit and worst <= any_step:
        return Verdict("ok", "", other.name, first, worst)
    reason = f"losses differ from those of {other.name}"
    return Verdict("disagrees", reason, other.name, _finite(first), _finite(worst))


def _differences(losses: list[float], truth: list[float]) -> list[float]:
    """Relative differences of the steps that both have; infinite where one is not a number."""
    pairs = zip(losses, truth, strict=False)
    each = [abs(a - b) / max(abs(b), FLOOR) for a, b in pairs]
    return [x if x < float("inf") else float("inf") for x in each]


def make_rows(
    results: dict[Case, Runs], work: Work, stamp: Row, least: list[float] | None = None
) -> list[Row]:
    """A row per case, then the ratios.

    Args: least: seconds that each optimizer step takes at least on this card, where that is known.
    """
    verdicts = judge(results)
    by_name = {case.name: runs for case, runs in results.items()}
    rows = []
    for case, runs in results.items():
        row = stamp | identity(case)
        if case not in verdicts:
            bad = next(run for run in runs if run["status"] != "ok")
            rows.append(row | {"status": bad["status"], "reason": bad["reason"]})
            continue
        verdict, last = verdicts[case], runs[-1]
        row |= {"status": verdict.status, "reason": verdict.reason, "versions": last["versions"]}
        row |= {"truth": verdict.truth, "difference_first": verdict.first}
        row |= {"difference_worst": verdict.worst, "loss": _finite(last["losses"][0])}
        if verdict.truth:
            row["truth_loss"] = by_name[verdict.truth][0]["losses"][0]
        rows.append(row | (_figures(case, runs, work, least) if verdict.status == "ok" else {}))
    return rows + [stamp | ratio for ratio in ratios(rows)]


def identity(case: Case) -> Row:
    """What a row says of its case, whether or not it ran."""
    return {
        "row": case.name,
        "kind": "side",
        "task": case.task,
        "side": case.side,
        "engine": case.engine,
        "setting": case.setting,
        "options": case.options,
        "steps": case.steps - case.warmup,
        "warmup_steps": case.warmup,
        "optimizer": case.optimizer,
        "dropout": case.dropout,
        "beta": case.beta if case.task == "dpo" else None,
    }


def absent(side: str, task: str, reason: str) -> Row:
    """The row of a rival that is not there."""
    row: Row = {"row": f"{task} {side}", "kind": "side", "task": task, "side": side, "engine": None}
    return row | {"setting": None, "options": {}, "status": "absent", "reason": reason}


def ratios(rows: list[Row]) -> Iterator[Row]:
    """Ours beside each rival: fastest beside fastest, default beside default.

    A default that is the fastest is also a side's best. Ours by default is the native engine.
    """
    fine = [row for row in rows if row["kind"] == "side" and row["status"] == "ok"]
    for setting in ("best", "default"):
        kept = [row for row in fine if setting in ("best", row["setting"])]
        sides = list(dict.fromkeys(row["side"] for row in kept))
        fastest = {side: min(_of(kept, side), key=lambda row: row["seconds"]) for side in sides}
        ours = fastest.pop("ours", None)
        for side, theirs in fastest.items():
            if ours is not None:
                yield _ratio(ours, theirs, side, setting)


def _of(rows: list[Row], side: str) -> list[Row]:
    return [row for row in rows if row["side"] == side]


def _ratio(ours: Row, theirs: Row, side: str, setting: str) -> Row:
    """Above 1 we are faster; below 1 we take less memory."""
    row: Row = {
        "row": f"{ours['task']} ratio {side} {setting}",
        "kind": "ratio",
        "task": ours["task"],
        "setting": setting,
        "rival": side,
        "ours_row": ours["row"],
        "rival_row": theirs["row"],
        "speed_ratio": round(theirs["seconds"] / ours["seconds"], 3),
        "cpu_ratio": round(theirs["cpu_seconds"] / ours["cpu_seconds"], 3),
        "memory_ratio": round(ours["peak_memory_gib"] / theirs["peak_memory_gib"], 3),
    }
    if ours["task"] == "dpo":
        key = "pairs_per_second_with_reference"
        row["speed_ratio_with_reference"] = round(ours[key] / theirs[key], 3)
    return row


def _figures(case: Case, runs: Runs, work: Work, least: list[float] | None) -> Row:
    """The figures of one case over all rounds."""
    timed = range(case.warmup, case.steps)
    each = [median(run["seconds"][step] for run in runs) for step in timed]
    cpu = sum(median(run["cpu_seconds"][step] for run in runs) for step in timed)
    tokens = sum(len(ids) for step in timed for ids in work.sequences(step))
    examples, unit = len(timed) * case.batch, "pairs" if case.task == "dpo" else "rows"
    p20, _, _, p80 = quantiles(each, n=5, method="inclusive") if len(each) > 1 else each * 4
    row: Row = {
        unit: examples,
        "tokens": tokens,
        "seconds": round(sum(each), 4),
        "cpu_seconds": round(cpu, 4),
        "slowest_round_seconds": round(max(sum(r["seconds"][case.warmup :]) for r in runs), 4),
        "tokens_per_second": round(tokens / sum(each), 1),
        f"{unit}_per_second": round(examples / sum(each), 4),
        "step_ms_p20": round(1e3 * p20, 2),
        "step_ms_p50": round(1e3 * median(each), 2),
        "step_ms_p80": round(1e3 * p80, 2),
        "warmup_seconds": round(median(sum(r["seconds"][: case.warmup]) for r in runs), 3),
        "load_seconds": round(median(run["load_seconds"] for run in runs), 3),
        "energy_joules": _median(runs, "energy_joules"),
        "attention": runs[-1]["attention"],
        "last_loss": runs[-1]["losses"][-1],
    }
    if case.side == "unsloth" and case.device == "cuda" and row["warmup_seconds"] < COMPILED:
        row["note"] = f"warmed up for less than {COMPILED} s, which it may take to compile"
    if least is not None:
        row["percent_of_roofline"] = round(100 * sum(least[s] for s in timed) / sum(each), 1)
    row |= {key: runs[-1][key] for key in ("planned", "notches") if key in runs[-1]}
    if case.task == "dpo":
        row |= _with_reference(runs, examples, sum(each), len(work.pairs))
    return row | _memory(runs)


def _with_reference(runs: Runs, examples: int, seconds: float, n_pairs: int) -> Row:
    """The rate over an epoch, the pass over its pairs included; None: it is in every step."""
    reference = _median(runs, "reference_seconds")
    whole = seconds + (reference or 0.0) * examples / n_pairs
    return {
        "reference_seconds": reference,
        "pairs_per_second_with_reference": round(examples / whole, 4),
    }


def _memory(runs: Runs) -> Row:
    row: Row = {key: _median(runs, key) for key in ("peak_rss_gib", "imports_rss_gib")}
    above = row["peak_rss_gib"] - row["imports_rss_gib"]
    row["peak_rss_above_imports_gib"] = round(above, 4)
    row |= {key: _median(runs, key) for key in ("peak_allocated_gib", "peak_reserved_gib")}
    row["peak_memory_gib"] = row["peak_allocated_gib"] or row["peak_rss_above_imports_gib"]
    return row


def _median(runs: Runs, key: str) -> float | None:
    values = [run[key] for run in runs if run.get(key) is not None]
    return round(median(values), 4) if values else None


def _is_ok(runs: Runs) -> bool:
    return bool(runs) and all(run["status"] == "ok" for run in runs)


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def table(rows: list[Row]) -> str:
    """The rows for a terminal of 100 columns."""
    heads = ("tokens/s", "pairs/s", "rows/s", "step ms", "ref. s", "GiB", "warm-up s")
    keys = ("tokens_per_second", "pairs_per_second", "rows_per_second", "step_ms_p50",
            "reference_seconds", "peak_memory_gib", "warmup_seconds")  # fmt: skip
    lines = []
    for row in rows:
        if row["kind"] == "ratio":
            lines.append(_ratio_line(row))
            continue
        lines.append(row["row"])
        if row["status"] != "ok":
            lines.append(f"    {row['status']}: {row['reason']}")
            continue
        pairs = zip(heads, keys, strict=True)
        found = [f"{row[key]:.4g} {head}" for head, key in pairs if row.get(key) is not None]
        lines.append("    " + "   ".join(found))
    return "\n".join(lines)


def _ratio_line(row: Row) -> str:
    parts = [f"{row['speed_ratio']:.2f}x the speed"]
    if "speed_ratio_with_reference" in row:
        parts.append(f"{row['speed_ratio_with_reference']:.2f}x with the reference pass")
    parts.append(f"{row['memory_ratio']:.2f}x the memory")
    return f"{row['task']} beside {row['rival']} ({row['setting']}): " + ", ".join(parts)
