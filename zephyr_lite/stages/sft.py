"""dSFT: supervised fine-tuning of a LoRA adapter on the teacher's dialogues.

dialogues -> tokens -> packed rows -> loop -> sft/adapter, sft/eval.json, sft/report.json

Under engine `unsloth` another process trains; the rows, what is measured and what is saved are the
same. In place of training, `sft.from` takes a finished adapter, which becomes sft/adapter, or a
finished model, which becomes the base of everything after it. Both are measured on the held-out
dialogues.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import copy
from typing import Any, Literal

from zephyr_lite.data.chat import template_hash
from zephyr_lite.data.layout import Documents, Row
from zephyr_lite.data.token_store import Corpus, Tokens, open_tokens
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.evaluate.perplexity import evaluate_documents
from zephyr_lite.model.adapters import add_adapter, load_adapter, save_adapter
from zephyr_lite.model.engines import choose, choose_gemm, choose_kernels
from zephyr_lite.model.policy import Policy
from zephyr_lite.model.starting_point import StartingPoint, compare_bases, quantised_again
from zephyr_lite.plan.lengths import documents_of
from zephyr_lite.recipe import Dialogues, Sft
from zephyr_lite.run import CHECKPOINTS
from zephyr_lite.stages import fit
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import (
    cache_folder,
    open_sealed,
    read_json,
    seal_digest,
    sealed_folder,
    write_text,
)
from zephyr_lite.train.loop import Job
from zephyr_lite.train.masters import check_place
from zephyr_lite.train.objectives import LanguageModelling
from zephyr_lite.train.unsloth_process import UnslothJob, find_environment

ADAPTER = "sft"


def run(ctx: Context) -> None:
    """Train the SFT adapter, or take what `sft.from` names, unless that was done before."""
    settings, split = ctx.recipe.sft, ctx.recipe.data.dialogues
    if settings is None:
        return
    check_inputs(ctx)
    if ctx.start is not None:
        _take(ctx, ctx.start, settings)
    elif split is not None:
        _train(ctx, settings, split)


def check_inputs(ctx: Context) -> None:
    """Refuse what would otherwise be seen only when base and tokens are made.

    Raises: RecipeError for an optimizer that does not run in host memory; MachineError without
        an environment for Unsloth.
    """
    settings, entry = ctx.recipe.sft, ctx.run.manifest["stages"].get("sft", {})
    if settings is None or settings.start is not None or entry.get("finished"):
        return
    if _trainer(ctx, settings) == "unsloth":
        find_environment()
        return
    choose_gemm(ctx.recipe.gemm, _trainer(ctx, settings), ctx.device)
    check_place("sft", settings, ctx.recipe.memory.place)


def adapter_digest(ctx: Context) -> str | None:
    """Hash of the finished SFT adapter; None where there is none over the base."""
    return ctx.run.output("sft", "adapter") if ctx.adapter("sft") else None


def _train(ctx: Context, settings: Sft, split: Dialogues) -> None:
    inputs = _inputs(ctx, split, settings)
    if ctx.run.is_done("sft", inputs):
        open_sealed(ctx.run.path("sft", "adapter"))
        return
    ctx = _with_own_engine(ctx, settings)
    with ctx.stage("sft", inputs) as record:
        train, held_out = _load(ctx, split)
        lengths, elsewhere = documents_of(train, settings), None
        rows = list(lengths.rows)
        if _trainer(ctx, settings) == "unsloth":
            elsewhere = _unsloth_job(ctx, settings, train, rows)
            elsewhere.run()  # before a base is loaded here: the GPU is that process's alone
        else:
            ctx, planned = fit.fitted(ctx, "sft", lengths)
            record |= planned
        model = add_adapter(ctx.load_model(), ADAPTER, settings.lora, ctx.recipe.seed)
        policy = ctx.training_policy(model) if elsewhere is None else ctx.policy(model)

        def evaluate() -> dict[str, float]:
            return _evaluate(ctx, policy, settings, held_out)

        parent = _parent_figures(ctx, policy, evaluate)
        policy.use([ADAPTER], ADAPTER)
        if elsewhere is None:
            objective = LanguageModelling(train, rows, settings.loss_on, ctx.memory.tokens)
            job = _job(ctx, policy, objective, settings, evaluate)
            figures = job.run()
            record |= fit.outcome(ctx, job)
        else:
            figures = elsewhere.finish(policy.trainable(), evaluate)
            record |= {"unsloth": elsewhere.environment.versions}
        with sealed_folder(ctx.run.path("sft", "adapter")) as part:
            save_adapter(policy.model, [ADAPTER], part, ctx.base_name)
        ctx.write({"base": parent, "sft": figures}, "sft", "eval.json")
        record |= {"adapter": seal_digest(ctx.run.path("sft", "adapter")), "figures": figures}
    shutil.rmtree(ctx.run.path("sft", CHECKPOINTS), ignore_errors=True)


def _job(
    ctx: Context,
    policy: Policy,
    objective: LanguageModelling,
    settings: Sft,
    evaluate: Callable[[], dict[str, float]],
) -> Job:
    return Job(
        label="sft",
        policy=policy,
        objective=objective,
        settings=settings,
        folder=ctx.run.path("sft"),
        seed=ctx.recipe.seed,
        listener=ctx.listener,
        stop=ctx.stop,
        evaluate=evaluate,
        masters=ctx.memory.place,
        rehearses=ctx.planned is not None,
    )


def _unsloth_job(ctx: Context, settings: Sft, documents: Documents, rows: list[Row]) -> UnslothJob:
    environment = find_environment()
    ctx.listener.note(f"sft: trained by Unsloth {environment.versions['unsloth']}")
    if settings.eval_every is not None:
        ctx.listener.note("sft: under engine unsloth held-out loss is taken at the end only")
    if ctx.recipe.memory.optimizer == "host":
        ctx.listener.note("sft: under engine unsloth optimizer states stay on the GPU")
    return UnslothJob(
        environment=environment,
        base=ctx.base,
        dtype=ctx.dtype,
        device=ctx.device,
        documents=documents,
        rows=rows,
        settings=settings,
        memory=ctx.recipe.memory,
        folder=ctx.run.path("sft"),
        seed=ctx.recipe.seed,
        listener=ctx.listener,
        stop=ctx.stop,
    )


def _trainer(ctx: Context, settings: Sft) -> str:
    """The engine that trains: dSFT's own, or the recipe's."""
    return settings.engine or ctx.recipe.engine


def _with_own_engine(ctx: Context, settings: Sft) -> Context:
    """The context of dSFT: its own engine runs the layers, where the recipe names one."""
    if settings.engine is None:
        return ctx
    own = copy(ctx)
    own.engine, reason = choose(settings.engine, ctx.base.folder)
    own.kernels = choose_kernels(ctx.recipe.kernels, own.engine, ctx.device)
    if reason:
        ctx.listener.note(f"sft: engine {own.engine}: {reason}")
    return own


def _take(ctx: Context, start: StartingPoint, settings: Sft) -> None:
    """Put a finished adapter where a trained one would lie; measure it, or the finished model."""
    inputs = _start_inputs(ctx, start)
    target = ctx.adapter("sft")
    if ctx.run.is_done("sft", inputs):
        if target is not None:
            open_sealed(target)
        return
    with ctx.stage("sft", inputs) as record:
        found = {"from": start.name, "revision": start.revision, **inputs["start"]}
        held_out, parent = _held_out(ctx), {}
        if target is None:
            doubt = quantised_again(start, ctx.recipe.base)
            policy = ctx.policy(ctx.load_model())
        else:
            doubt = compare_bases(start, ctx.recipe.base, ctx.base.identity["source"])
            policy = ctx.policy(_fitted(ctx, start))
            parent = _parent_figures(
                ctx, policy, lambda: _evaluate(ctx, policy, settings, held_out)
            )
            policy.use([ADAPTER])
            with sealed_folder(target) as part:
                save_adapter(policy.model, [ADAPTER], part, ctx.base_name)
            record |= {"adapter": seal_digest(target)}
        figures = _evaluate(ctx, policy, settings, held_out)
        ctx.write({"base": parent, "sft": figures}, "sft", "eval.json")
        record |= {"start": found, "figures": figures}
    for line in (doubt, f"sft: taken from {start.name} ({start.kind}); nothing was trained"):
        if line:
            ctx.listener.note(line)


def _start_inputs(ctx: Context, start: StartingPoint) -> dict[str, Any]:
    """As `_inputs`: what was taken, by its contents, and what it is measured on."""
    split = ctx.recipe.data.dialogues
    sources = () if split is None else split.eval or split.train
    data = ("data.dialogues", "data.decontaminate", "data.on_fault")
    names = ("base", *data, "sft.max_length", "engine")
    return {
        "recipe": ctx.run.fields(*names),
        "start": start.identity(),
        "data": ctx.data_fingerprints(sources, ctx.recipe.data.decontaminate),
        "base": ctx.base.sha256,
        "template": template_hash(),
        "dtype": str(ctx.dtype),
    }


def _fitted(ctx: Context, start: StartingPoint) -> Any:
    """The base with what `sft.from` names over it. Raises: RecipeError where it does not fit."""
    try:
        return load_adapter(ctx.load_model(), ADAPTER, start.folder)
    except DataError as error:
        hint = "take an adapter of this recipe's base, or set base to the adapter's"
        raise RecipeError(f"sft.from: {error}", hint=hint) from None


def _held_out(ctx: Context) -> Documents | None:
    """Held-out dialogues for a dSFT that is not trained here; None where the recipe has none."""
    split = ctx.recipe.data.dialogues
    if split is None:
        return None
    if not split.eval:
        return _load(ctx, split)[1] if split.holdout else None
    found = _tokenise(ctx, corpus(ctx, split, "eval"))
    counts = {"held_out_dialogues": len(found.documents or ())}
    ctx.write(counts | {"eval": found.report}, "sft", "report.json")
    write_text(ctx.run.path("sft", "rejected.jsonl"), found.rejected_of("eval"))
    return found.documents


def _inputs(ctx: Context, split: Dialogues, settings: Sft) -> dict[str, Any]:
    data = ("data.dialogues", "data.decontaminate", "data.on_fault")
    fields = ctx.run.fields("seed", "base", *data, "sft", "engine", "gemm")
    del fields["sft.engine"]
    fields["engine"] = trainer = _trainer(ctx, settings)  # whichever field names it
    if trainer == "unsloth":
        del fields["gemm"]  # its products are its own
    return {
        "recipe": fields,
        "data": ctx.data_fingerprints(split.train, split.eval, ctx.recipe.data.decontaminate),
        "base": ctx.base.sha256,
        "template": template_hash(),
        "dtype": str(ctx.dtype),
    }


def _load(ctx: Context, split: Dialogues) -> tuple[Documents, Documents | None]:
    """Tokenised training and held-out dialogues; writes sft/report.json and sft/rejected.jsonl."""
    train = _tokenise(ctx, corpus(ctx, split, "train"))
    held_out, reports, rejected = (
        train.held_out,
        {"train": train.report},
        train.rejected_of("train"),
    )
    if split.eval:
        evaluation = _tokenise(ctx, corpus(ctx, split, "eval"))
        held_out, reports["eval"] = evaluation.documents, evaluation.report
        rejected += evaluation.rejected_of("eval")
    counts = {
        "train_dialogues": len(train.documents or ()),
        "held_out_dialogues": len(held_out or ()),
        "train_tokens": int(train.documents.offsets[-1]) if train.documents else 0,
    }
    ctx.write(counts | reports, "sft", "report.json")
    write_text(ctx.run.path("sft", "rejected.jsonl"), rejected)
    if train.documents is None:
        hint = "see sft/report.json for the reasons"
        raise DataError("no dialogue is left to train on", hint=hint)
    return train.documents, held_out


def corpus(ctx: Context, split: Dialogues, side: Literal["train", "eval"]) -> Corpus:
    """What one side's documents are made from.

    Held-out dialogues of their own are measured on, not trained on: a benchmark's prompt does no
    harm there.
    """
    sft, is_train = ctx.recipe.sft, side == "train"
    return Corpus(
        sources=split.train if is_train else split.eval,
        truecase=split.truecase,
        drop_refusals=split.drop_refusals,
        decontaminate=ctx.recipe.data.decontaminate if is_train else (),
        on_fault=ctx.recipe.data.on_fault,
        seed=ctx.recipe.seed,
        holdout=split.holdout if is_train and not split.eval else 0.0,
        extra_end=is_train and sft is not None and sft.packing == "wrapped",
        offline=ctx.run.offline,
    )


def _tokenise(ctx: Context, wanted: Corpus) -> Tokens:
    """A corpus's tokens, from the cache shared between runs where it has them."""
    return open_tokens(wanted, ctx.tokenizer, cache_folder() / "tokens", ctx.listener.note)


def _evaluate(
    ctx: Context, policy: Policy, settings: Sft, held_out: Documents | None
) -> dict[str, float]:
    if held_out is None:
        return {}
    budget = ctx.memory.tokens
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
