"""dSFT: supervised fine-tuning of a LoRA adapter on the teacher's dialogues.

dialogues -> tokens -> packed rows -> loop -> sft/adapter, sft/eval.json, sft/report.json
"""

from __future__ import annotations

from typing import Any

import numpy as np

from zephyr_lite.data.chat import template_hash
from zephyr_lite.data.dialogues import Dialogue, load_dialogues
from zephyr_lite.data.layout import Documents, Row, join_documents, pack_masked, pack_wrapped
from zephyr_lite.data.report import Report
from zephyr_lite.data.split import hold_out
from zephyr_lite.errors import DataError
from zephyr_lite.evaluate.perplexity import evaluate_documents
from zephyr_lite.model.adapters import add_adapter, save_adapter
from zephyr_lite.model.policy import Policy
from zephyr_lite.recipe import Sft, Split
from zephyr_lite.run import Run
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import open_sealed, read_json, seal_digest, sealed_folder
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import LanguageModelling

ADAPTER = "sft"


def run(ctx: Context) -> None:
    """Train the SFT adapter unless that was done before."""
    settings, split = ctx.recipe.sft, ctx.recipe.data.dialogues
    if settings is None or split is None:
        return
    inputs = _inputs(ctx, split)
    if ctx.run.is_done("sft", inputs):
        open_sealed(ctx.run.path("sft", "adapter"))
        return
    with ctx.stage("sft", inputs) as record:
        train, held_out = _load(ctx, split)
        policy = ctx.policy(add_adapter(ctx.load_model(), ADAPTER, settings.lora, ctx.recipe.seed))

        def evaluate() -> dict[str, float]:
            return _evaluate(ctx, policy, settings, held_out)

        parent = _parent_figures(ctx, policy, evaluate)
        policy.use([ADAPTER], ADAPTER)
        rows = _pack(train, settings)
        budget = ctx.recipe.memory.tokens_per_micro_batch
        job = Job(
            label="sft",
            policy=policy,
            objective=LanguageModelling(train, rows, settings.loss_on, budget),
            settings=settings,
            folder=ctx.run.path("sft"),
            seed=ctx.recipe.seed,
            listener=ctx.listener,
            stop=ctx.stop,
            evaluate=evaluate,
        )
        figures = job.run()
        with sealed_folder(ctx.run.path("sft", "adapter")) as part:
            save_adapter(policy.model, [ADAPTER], part, ctx.recipe.base.model)
        ctx.write({"base": parent, "sft": figures}, "sft", "eval.json")
        record |= {"adapter": seal_digest(ctx.run.path("sft", "adapter")), "figures": figures}
    job.checkpoints().remove()


def adapter_digest(run: Run) -> str | None:
    """Hash of the finished SFT adapter; None for a recipe without dSFT."""
    return run.output("sft", "adapter") if run.recipe.sft else None


def _inputs(ctx: Context, split: Split) -> dict[str, Any]:
    names = ("seed", "base", "data.dialogues", "data.on_fault", "sft", "engine")
    return {
        "recipe": ctx.run.fields(*names),
        "data": ctx.data_fingerprints(split.train, split.eval),
        "base": ctx.base.sha256,
        "template": template_hash(),
        "dtype": str(ctx.dtype),
    }


def _load(ctx: Context, split: Split) -> tuple[Documents, Documents | None]:
    """Tokenised training and held-out dialogues; writes sft/report.json."""
    train, report = _read(ctx, split.train)
    reports = {"train": report.as_dict()}
    if split.eval:
        held_out, eval_report = _read(ctx, split.eval)
        reports["eval"] = eval_report.as_dict()
    else:
        train, held_out = hold_out(train, split.holdout, lambda d: d.messages)
    counts = {"train_dialogues": len(train), "held_out_dialogues": len(held_out)}
    if not train:
        raise DataError(
            "no dialogue is left to train on", hint="see sft/report.json for the reasons"
        )
    wrapped = ctx.recipe.sft is not None and ctx.recipe.sft.packing == "wrapped"
    documents = _tokenise(ctx, train, wrapped=wrapped)
    counts["train_tokens"] = int(documents.offsets[-1])
    ctx.write(counts | reports, "sft", "report.json")
    return documents, _tokenise(ctx, held_out, wrapped=False) if held_out else None


def _read(ctx: Context, sources: Any) -> tuple[list[Dialogue], Report]:
    return load_dialogues(
        sources,
        on_fault=ctx.recipe.data.on_fault,
        special_tokens=ctx.tokenizer.special_tokens,
        offline=ctx.run.offline,
    )


def _tokenise(ctx: Context, dialogues: list[Dialogue], *, wrapped: bool) -> Documents:
    encoded = ctx.tokenizer.encode_dialogues([d.messages for d in dialogues])
    if wrapped:
        # As published: the packer puts one more end token between documents.
        eos = np.array([ctx.tokenizer.eos_id], np.int32)
        return join_documents(
            [(np.append(e.ids, eos), np.append(e.assistant, False)) for e in encoded]
        )
    return join_documents([(e.ids, e.assistant) for e in encoded])


def _pack(documents: Documents, settings: Sft) -> list[Row]:
    pack = pack_wrapped if settings.packing == "wrapped" else pack_masked
    return pack(documents, settings.max_length)


def _evaluate(
    ctx: Context, policy: Policy, settings: Sft, held_out: Documents | None
) -> dict[str, float]:
    if held_out is None:
        return {}
    budget = ctx.recipe.memory.tokens_per_micro_batch
    return evaluate_documents(policy, held_out, settings.max_length, budget)


def _parent_figures(ctx: Context, policy: Policy, evaluate: Any) -> dict[str, float]:
    """The base's own figures, computed once per run."""
    path = ctx.run.path("sft", "parent.json")
    if path.exists():
        return read_json(path)
    policy.use([])
    figures = evaluate()
    ctx.write(figures, "sft", "parent.json")
    return figures
