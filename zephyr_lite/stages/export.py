"""Export: the adapter folded into the base's own values, written as GGUF, loaded and checked.

base bytes + one fp32 sum of the adapter -> files under .part -> llama.cpp -> final names, report
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from zephyr_lite import __version__
from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render, template_hash
from zephyr_lite.data.sources import Row, read_rows
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export import ollama
from zephyr_lite.export.artefacts import (
    REPORT,
    Source,
    Truth,
    architecture_of,
    has_llama_cpp,
    make,
)
from zephyr_lite.export.card import model_card
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.folders.sharded import refuse_bnb_merged
from zephyr_lite.export.weights.base_weights import BaseWeights
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.export.weights.same_base import same_architecture
from zephyr_lite.model.adapters import load_adapter
from zephyr_lite.model.base import locate
from zephyr_lite.model.policy import Policy
from zephyr_lite.stages.comparison import comparisons
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import digest, file_digest, is_sealed, seal_digest, write_json, write_text

ANSWER_TOKENS = 96


def run(ctx: Context, stage: str | None = None, *, to_ollama: bool = False) -> None:
    """Write and check every file of the recipe's `export` section unless that was done before.

    Args:
        stage: whose adapter to export, `dpo` or `sft`; by default the last one trained. Another
            one's files lie in a folder of its name.
        to_ollama: also run `ollama create`.
    """
    last, stage = final_stage(ctx), final_stage(ctx, stage)
    place = ("export",) if stage == last else ("export", stage)
    adapter = ctx.adapter(stage)
    inputs = {
        "recipe": ctx.run.fields("export"),
        "stage": stage,
        "adapter": seal_digest(adapter) if adapter else None,
        "base": ctx.base.sha256,
        "template": template_hash(),
    }
    folder, key = ctx.run.path(*place), "-".join(place)
    if not (ctx.run.is_done(key, inputs, binding=False) and _intact(ctx, key, folder)):
        with ctx.stage(key, inputs) as record:
            report = _make(ctx, stage, adapter, folder, _identity(ctx, inputs))
            record |= {"files": {f["file"]: f["sha256"] for f in report["files"]}}
            record |= {"folders": [f["folder"] for f in report["folders"]]}
        _say(ctx, folder, report)
    if to_ollama:
        ctx.listener.note(ollama.create(ctx.recipe.name, folder))


def check_inputs(ctx: Context) -> None:
    """Raise what only the export refuses before anything is trained: a setting, a faulty file."""
    if ctx.recipe.export.merged_dtype == "nf4":
        refuse_bnb_merged()
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
    report = folder / "export" / REPORT
    if not report.exists():
        return None
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    path = report.parent / files[0]["file"] if files else None
    return path if path is not None and path.exists() else None


def trained_policy(ctx: Context, stage: str) -> Policy:
    """The trained model: base and the stage's whole adapter, where it has one."""
    model, adapter = ctx.load_model(), ctx.adapter(stage)
    if adapter is None:
        return ctx.policy(model)
    policy = ctx.policy(load_adapter(model, stage, adapter))
    policy.use([stage])
    return policy


def _identity(ctx: Context, inputs: dict[str, Any]) -> str:
    """Digest of what decides the bytes of any file, whichever others the recipe also names."""
    sources = {name: inputs[name] for name in ("stage", "adapter", "base", "template")}
    return digest([sources, ctx.recipe.export.base_weights, __version__])


def _make(
    ctx: Context, stage: str, adapter: Path | None, folder: Path, identity: str
) -> dict[str, Any]:
    settings = ctx.recipe.export
    model = FoldedModel(_base_folder(ctx), adapter)
    source = Source(
        model, ctx.base.folder, ZEPHYR_TEMPLATE, ctx.recipe.name, identity, {}, ctx.device
    )
    truth = (lambda: _truth(ctx, stage)) if has_llama_cpp() else None
    facts = {"stage": stage, "base_weights": settings.base_weights}
    report = make(source, settings, folder, ctx.listener, truth, facts)
    first = report["files"][0]["file"]
    if settings.questions and truth is not None and settings.verify:
        report["questions"] = _ask(ctx, folder / first, settings.questions)
    elif settings.questions:
        why = "export.verify is off" if truth is not None else "llama.cpp is not there"
        ctx.listener.note(f"export: the questions are not asked: {why}")
    window = architecture_of(model, settings.context_length).context_length
    text = ollama.modelfile(first, window, eos=ctx.tokenizer.eos)
    write_text(folder / "Modelfile", text)
    write_text(folder / "README.md", model_card(ctx.run.manifest, report))
    write_json(folder / REPORT, report)
    return report


def _base_folder(ctx: Context) -> Path:
    """Where the weights are that the adapter is folded into."""
    if ctx.recipe.export.base_weights == "nf4":
        return ctx.base.folder
    folder, _ = locate(ctx.base_settings, offline=ctx.run.offline)
    if folder == ctx.base.folder and ctx.base.identity["quantization"] != "none":
        raise RecipeError(
            f"export.base_weights: original, but {ctx.base_name} is quantised already",
            hint="leave it at nf4, or make a run over the 16-bit base",
        )
    same_architecture(BaseWeights(folder), BaseWeights(ctx.base.folder))
    return folder


def _truth(ctx: Context, stage: str) -> Truth:
    policy = trained_policy(ctx, stage)
    compared = comparisons(ctx, policy.max_positions)
    return Truth(
        policy.next_token_log_probs,
        lambda messages: render(messages, True, eos=ctx.tokenizer.eos),
        [prompt for prompt, _ in compared],
        [ids for _, ids in compared],
        ctx.tokenizer.eos,
        policy.dtype,
        is_on_nf4=ctx.recipe.export.base_weights == "original"
        and ctx.base.identity["quantization"] != "none",
    )


def _ask(ctx: Context, path: Path, questions: str) -> dict[str, Any]:
    """Answers of the exported file to the recipe's questions, judged by each row's rule."""
    answers = []
    with LlamaCppModel(path, n_ctx=1024, threads=torch.get_num_threads()) as model:
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


def _intact(ctx: Context, key: str, folder: Path) -> bool:
    """Whether the files are as the manifest says."""
    files: dict[str, str] = ctx.run.output(key, "files")
    paths = {folder / name: sha256 for name, sha256 in files.items()}
    folders = [folder / name for name in ctx.run.output(key, "folders")]
    same = all(p.exists() and file_digest(p) == sha256 for p, sha256 in paths.items())
    return same and all(is_sealed(f) for f in folders)


def _say(ctx: Context, folder: Path, report: dict[str, Any]) -> None:
    for file in report["files"]:
        verdict = file.get("summary", "not verified")
        size = file["bytes"] / 1e6
        ctx.listener.note(f"export: {folder / file['file']} ({size:.1f} MB) {verdict}")
