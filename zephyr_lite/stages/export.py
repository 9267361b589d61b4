"""Export: the adapter folded into the base's own NF4 values, written as GGUF, loaded and checked.

base bytes + one fp32 sum of the adapter -> GGUF -> llama.cpp -> export/report.json
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render, template_hash
from zephyr_lite.data.report import Report
from zephyr_lite.data.sources import Row, read_rows
from zephyr_lite.data.split import is_held_out
from zephyr_lite.data.token_store import read_corpus
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.llama_cpp import LlamaCppModel
from zephyr_lite.export.ollama import modelfile
from zephyr_lite.export.safetensors import write_merged
from zephyr_lite.export.verify import ExportMismatch, verify_gguf
from zephyr_lite.model.adapters import load_adapter
from zephyr_lite.model.policy import Policy
from zephyr_lite.stages import aif, sft
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import file_digest, seal_digest, write_json

ANSWER_TOKENS = 96
ROWS_PER_PROMPT = 20  # dialogues read to find one that leaves room for a comparison
Messages = list[dict[str, str]]


def run(ctx: Context, stage: str | None = None) -> None:
    """Write and check every file of the recipe's `export` section unless that was done before.

    Args:
        stage: whose adapter to export, `dpo` or `sft`; by default the last one trained.
    """
    stage = final_stage(ctx, stage)
    settings, adapter = ctx.recipe.export, ctx.adapter(stage)
    inputs = {
        "recipe": ctx.run.fields("export"),
        "stage": stage,
        "adapter": seal_digest(adapter) if adapter else None,
        "base": ctx.base.sha256,
        "template": template_hash(),
    }
    if ctx.run.is_done("export", inputs, binding=False) and _intact(ctx):
        return
    with ctx.stage("export", inputs) as record:
        model = FoldedModel(ctx.base.folder, adapter)
        files = [_write(ctx, model, quant) for quant in settings.quants]
        if settings.merged:
            folder = ctx.run.path("export", "merged")
            write_merged(model, ctx.base.folder, ZEPHYR_TEMPLATE, folder)
        window = int(model.config.get("max_position_embeddings") or 2048)
        length = ctx.recipe.sft.max_length if ctx.recipe.sft else 2048
        text = modelfile(files[0]["file"], min(window, 2 * length))
        ctx.run.path("export", "Modelfile").write_text(text, encoding="utf-8")
        report: dict[str, Any] = {"stage": stage, "files": files}
        ctx.write(report, "export", "report.json")
        _check(ctx, stage, report)
        record |= {"files": {f["file"]: f["sha256"] for f in files}}
    for file in files:
        path = ctx.run.path("export", file["file"])
        ctx.listener.note(f"export: {path} ({file['bytes'] / 1e6:.1f} MB) {_verdict(file)}")


def check_inputs(ctx: Context) -> None:
    """Raise DataError for a file that only the export reads, before anything is trained."""
    if ctx.recipe.export.questions:
        for row in read_rows(ctx.recipe.export.questions, offline=ctx.run.offline):
            _question(row)


def final_stage(ctx: Context, stage: str | None = None) -> str:
    """`stage` itself, or the last one the recipe trains. Raises: RecipeError when not trained."""
    name = stage or ("dpo" if ctx.recipe.dpo else "sft")
    if name not in ("dpo", "sft"):
        raise RecipeError(f"--stage {name}: must be dpo or sft")
    adapter = ctx.adapter(name)
    is_finished = ctx.run.manifest["stages"].get(name, {}).get("finished") is not None
    if not (is_finished if adapter is None else adapter.is_dir()):
        raise RecipeError(
            f"{ctx.run.folder}: stage {name} is not trained yet",
            hint=f"zephyr-lite {name} {ctx.recipe.name}",
        )
    return name


def newest_gguf(folder: Path) -> Path | None:
    """The first file that the export report lists, if it is there."""
    report = folder / "export" / "report.json"
    if not report.exists():
        return None
    path = report.parent / json.loads(report.read_text(encoding="utf-8"))["files"][0]["file"]
    return path if path.exists() else None


def trained_policy(ctx: Context, stage: str) -> Policy:
    """The trained model: base and the stage's whole adapter, where it has one."""
    model, adapter = ctx.load_model(), ctx.adapter(stage)
    if adapter is None:
        return ctx.policy(model)
    policy = ctx.policy(load_adapter(model, stage, adapter))
    policy.use([stage])
    return policy


def _write(ctx: Context, model: FoldedModel, quant: str) -> dict[str, Any]:
    suffix = f"-{quant.upper()}.gguf"
    out = ctx.run.path("export", ctx.recipe.name + suffix)
    label = f"write {quant}"
    ctx.listener.start(label, len(model.names()), 0)

    def on_tensor(done: int, total: int) -> None:
        ctx.listener.step({"tensor": done})

    report = write_gguf(
        model,
        ctx.base.folder,
        ZEPHYR_TEMPLATE,
        out,
        quant,  # pyright: ignore[reportArgumentType] - the recipe's literal
        name=ctx.recipe.name,
        on_tensor=on_tensor,
    )
    ctx.listener.end()
    return report


def _check(ctx: Context, stage: str, report: dict[str, Any]) -> None:
    """Compare every file with the trained model; put the figures into the report."""
    if importlib.util.find_spec("xllamacpp") is None:
        report["verified"] = "no: llama.cpp is not installed (pip install 'zephyr-lite[llama]')"
        ctx.listener.note(f"export: not verified, {report['verified'][4:]}")
        ctx.write(report, "export", "report.json")
        return
    policy = trained_policy(ctx, stage)
    compared = _comparisons(ctx, policy)
    try:
        for file in report["files"]:
            file["verify"] = _verify(ctx, policy, compared, file["file"])
    except ExportMismatch as error:
        report["failed"] = error.report
        raise
    finally:
        write_json(ctx.run.path("export", "report.json"), report)
    if ctx.recipe.export.questions:
        report["questions"] = _ask(ctx, report["files"][0]["file"], ctx.recipe.export.questions)
        ctx.write(report, "export", "report.json")


def _verify(
    ctx: Context, policy: Policy, compared: list[tuple[Messages, list[int]]], name: str
) -> dict[str, Any]:
    ctx.listener.start(f"check {name}", len(compared), 0)
    try:
        return verify_gguf(
            ctx.run.path("export", name),
            policy.next_token_log_probs,
            Tokenizer.from_file(str(ctx.base.folder / "tokenizer.json")),
            ZEPHYR_TEMPLATE,
            lambda messages: render(messages, True),
            [prompt for prompt, _ in compared],
            ctx.recipe.export.verify_tokens,
            answers=[ids for _, ids in compared],
            threads=torch.get_num_threads(),
            on_prompt=lambda done, total: ctx.listener.step({"prompt": done}),
        )
    finally:
        ctx.listener.end()


def _comparisons(ctx: Context, policy: Policy) -> list[tuple[Messages, list[int]]]:
    """Held-out prompts and the `verify_tokens` ids to follow behind each: teacher forcing.

    The text is a held-out answer and, where it is shorter, the turns of the rows after it.
    """
    settings = ctx.recipe.export
    rows = _held_out(ctx)
    found = []
    for at, (prompt, _) in enumerate(rows):
        dialogue: Messages = []
        for later, answer in rows[at:] + rows[:at]:
            turns = later if not dialogue else [m for m in later if m["role"] != "system"]
            dialogue = [*dialogue, *turns, {"role": "assistant", "content": answer}]
            ids = ctx.tokenizer.encode_dialogue(dialogue).ids
            start = len(ctx.tokenizer.encode_prompt(prompt))
            if len(ids) >= start + settings.verify_tokens:
                break
        if start + settings.verify_tokens + 16 <= policy.max_positions:
            found.append((prompt, ids[start : start + settings.verify_tokens].tolist()))
        if len(found) == settings.verify_prompts:
            break
    if not found:
        raise DataError(
            f"none of {len(rows)} held-out prompts leaves room for {settings.verify_tokens} "
            f"tokens in a context of {policy.max_positions}",
            hint="lower export.verify_tokens",
        )
    return found


def _held_out(ctx: Context) -> list[tuple[Messages, str]]:
    """(prompt, answer) that no training step has seen; where nothing is held out, that is said."""
    held_out, trained = _pair_rows(ctx) if ctx.recipe.data.feedback else _dialogue_rows(ctx)
    if not held_out:
        ctx.listener.note("export: nothing is held out, so files are compared on training prompts")
    return held_out or trained


def _pair_rows(ctx: Context) -> tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]]:
    """(held out, trained on), from the preference pairs."""
    held_out, trained = (
        [([dict(m) for m in pair.prompt], pair.chosen) for pair in aif.read_pairs(ctx, side)]
        for side in ("eval", "train")
    )
    return held_out, trained


def _dialogue_rows(ctx: Context) -> tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]]:
    """(held out, trained on), from the dialogues; as dSFT splits them."""
    split = ctx.recipe.data.dialogues
    if split is None:
        raise DataError("the recipe names no data to check the export with")
    corpus = sft.corpus(ctx, split, "eval" if split.eval else "train")
    enough = ROWS_PER_PROMPT * ctx.recipe.export.verify_prompts
    sides: tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]] = ([], [])
    for dialogue in read_corpus(corpus, ctx.tokenizer, Report(corpus.on_fault)):
        is_trained = not split.eval and not is_held_out(dialogue.messages, split.holdout)
        *prompt, answer = [dict(m) for m in dialogue.messages]
        if len(sides[is_trained]) < enough:
            sides[is_trained].append((prompt, answer["content"]))
        if len(sides[0]) >= enough or (len(sides[1]) >= enough and not split.holdout):
            break
    return sides


def _ask(ctx: Context, name: str, questions: str) -> dict[str, Any]:
    """Answers of the exported file to the recipe's questions, judged by each row's rule."""
    answers = []
    with LlamaCppModel(
        ctx.run.path("export", name), n_ctx=1024, threads=torch.get_num_threads()
    ) as model:
        for row in read_rows(questions, offline=ctx.run.offline):
            prompt, accept = _question(row)
            text, stop = model.generate([{"role": "user", "content": prompt}], ANSWER_TOKENS)
            right = accept.fullmatch(text.strip()) is not None
            answers.append({"prompt": prompt, "answer": text, "stop": stop, "right": right})
    right = sum(a["right"] for a in answers)
    stopped = sum(a["stop"] == "eos" for a in answers)
    text = f"export: {right} of {len(answers)} held-out questions right, {stopped} ended by </s>"
    ctx.listener.note(text)
    return {"asked": len(answers), "right": right, "ended": stopped, "answers": answers}


def _question(row: Row) -> tuple[str, re.Pattern[str]]:
    """(prompt, rule) of a row. Raises: DataError naming file and line."""
    for key in ("prompt", "accept"):
        if not isinstance(row.data.get(key), str):
            raise DataError(f"no text under {key!r}", file=row.file, line=row.line)
    try:
        return row.data["prompt"], re.compile(row.data["accept"], re.IGNORECASE)
    except re.error as error:
        raise DataError(f"`accept`: {error}", file=row.file, line=row.line) from None


def _intact(ctx: Context) -> bool:
    """Whether the files are as the manifest says."""
    files: dict[str, str] = ctx.run.output("export", "files")
    paths = {ctx.run.path("export", name): sha256 for name, sha256 in files.items()}
    return all(p.exists() and file_digest(p) == sha256 for p, sha256 in paths.items())


def _verdict(file: dict[str, Any]) -> str:
    if "verify" not in file:
        return "not verified"
    drift = file["verify"]["drift"]
    return f"verified: KL {abs(drift['kl_mean']):.1g} over {drift['positions']} positions"
