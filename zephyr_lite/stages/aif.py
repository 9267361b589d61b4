"""AIF: AI feedback becomes preference pairs, with a report of what was dropped and why.

rows -> mixture, soundness, decontamination, rule, seeded draw
     -> aif/pairs.parquet, aif/report.json, aif/rejected.jsonl (side, file, line, reason, detail)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.report import Report
from zephyr_lite.data.split import hold_out
from zephyr_lite.errors import DataError, StorageError
from zephyr_lite.recipe import Feedback, Source
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import file_digest, sealed_folder

COLUMNS = ("id", "source", "prompt", "chosen", "rejected", "score_chosen", "score_rejected")


def run(ctx: Context) -> None:
    """Write the pairs unless that was done before."""
    feedback = ctx.recipe.data.feedback
    if feedback is None:
        return
    inputs = {
        "recipe": ctx.run.fields("seed", "data.feedback", "data.decontaminate", "data.on_fault"),
        "data": ctx.data_fingerprints(feedback.train, feedback.eval, ctx.recipe.data.decontaminate),
        "special_tokens": list(ctx.tokenizer.special_tokens),
    }
    if ctx.run.is_done("aif", inputs):
        return
    with ctx.stage("aif", inputs) as record:
        train, held_out, reports = _load(ctx, feedback)
        counts = {"train_pairs": len(train), "held_out_pairs": len(held_out)}
        with sealed_folder(ctx.run.path("aif")) as part:
            table = _table({"train": train, "eval": held_out})
            pq.write_table(table, part / "pairs.parquet")
            figures = counts | {side: report.as_dict() for side, report in reports.items()}
            text = json.dumps(figures, indent=1, ensure_ascii=False)
            (part / "report.json").write_text(text, encoding="utf-8")
            (part / "rejected.jsonl").write_text(_rejected(reports), encoding="utf-8")
        record |= counts | {"pairs": file_digest(ctx.run.path("aif", "pairs.parquet"))}
    dropped = {side: reasons for side, r in reports.items() if (reasons := r.reasons())}
    ctx.listener.note(f"aif: {len(train)} pairs, {len(held_out)} held out, dropped {dropped or 0}")


def read_pairs(ctx: Context, side: str) -> list[PreferencePair]:
    """The pairs of one side, `train` or `eval`, as the stage wrote them."""
    path = ctx.run.path("aif", "pairs.parquet")
    if file_digest(path) != ctx.run.output("aif", "pairs"):
        raise StorageError(f"{path}: changed since it was written", hint="remove the aif folder")
    rows = pq.read_table(path, filters=[("split", "=", side)]).to_pylist()
    return [
        PreferencePair(
            **{c: row[c] for c in COLUMNS if c != "prompt"}, prompt=json.loads(row["prompt"])
        )
        for row in rows
    ]


def _load(
    ctx: Context, feedback: Feedback
) -> tuple[list[PreferencePair], list[PreferencePair], dict[str, Report]]:
    benchmarks = ctx.recipe.data.decontaminate
    decontaminator = (
        Decontaminator.load(benchmarks, offline=ctx.run.offline) if benchmarks else None
    )
    train, report = _read(ctx, feedback, feedback.train, decontaminator)
    reports = {"train": report}
    if feedback.eval:
        # Held-out pairs are measured on, not trained on: a benchmark's prompt does no harm there.
        held_out, reports["eval"] = _read(ctx, feedback, feedback.eval, None)
    else:
        train, held_out = hold_out(train, feedback.holdout, lambda p: p.prompt)
    if not train:
        raise DataError(f"no preference pair is left to train on; dropped: {report.reasons()}")
    return train, held_out, reports


def _read(
    ctx: Context,
    feedback: Feedback,
    sources: Sequence[Source],
    decontaminator: Decontaminator | None,
) -> tuple[list[PreferencePair], Report]:
    return load_pairs(
        sources,
        rule=feedback.rule,
        ties=feedback.ties,
        seed=ctx.recipe.seed,
        on_fault=ctx.recipe.data.on_fault,
        special_tokens=ctx.tokenizer.special_tokens,
        exclude_sources=feedback.exclude_sources,
        decontaminator=decontaminator,
        offline=ctx.run.offline,
    )


def _rejected(reports: dict[str, Report]) -> str:
    """Every dropped row of both sides, one JSON object a line."""
    rows = ({"side": side} | row for side, report in reports.items() for row in report.dropped_rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _table(sides: dict[str, list[PreferencePair]]) -> pa.Table:
    rows = [
        asdict(pair) | {"prompt": json.dumps(pair.prompt, ensure_ascii=False), "split": side}
        for side, pairs in sides.items()
        for pair in pairs
    ]
    text, number = pa.string(), pa.float64()
    types = [number if c.startswith("score") else text for c in COLUMNS]
    schema = pa.schema([*zip(COLUMNS, types, strict=True), ("split", text)])
    return pa.Table.from_pylist(rows, schema=schema)
