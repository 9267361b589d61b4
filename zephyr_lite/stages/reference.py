"""Reference log-probs, once per (pair, reference): shared between runs, resumable by shard.

pairs -> token ids -> what the cache lacks -> log-probs under the SFT model -> cache

Pairs that are trained on are computed by training's own products (`gemm`), so that policy and
reference are the same bits before the first step. Held-out figures are always exact, and so is the
reference that they are taken against: under `gemm: fp16acc` that is a set of its own.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from zephyr_lite.data.chat import ChatTokenizer, template_hash
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.feedback import PreferencePair
from zephyr_lite.data.reference_cache import ReferenceCache, ReferenceLogProbs, pair_key
from zephyr_lite.errors import DataError
from zephyr_lite.evaluate.preferences import pair_log_probs
from zephyr_lite.model.adapters import adapter_identity, load_adapter
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.policy import Policy
from zephyr_lite.plan.lengths import pairs_of
from zephyr_lite.recipe import Dpo
from zephyr_lite.stages import aif, fit, sft
from zephyr_lite.stages.context import Context
from zephyr_lite.storage import cache_folder

SHARD_PAIRS = 64
LOG_PROB_VERSION = 3  # raise when the way log-probs are computed changes


@dataclass(frozen=True)
class Side:
    """Pairs of one side, `train` or `eval`: row ids, token ids, and the reference's log-probs."""

    ids: list[str]
    pairs: list[EncodedPair]
    reference: ReferenceLogProbs


@dataclass(frozen=True)
class _Part:
    """Pairs whose log-probs are of one set, and which of them its cache lacks."""

    gemm: Gemm
    cache: ReferenceCache
    pairs: list[EncodedPair]
    keys: list[bytes]
    missing: list[int]

    @classmethod
    def open(cls, ctx: Context, gemm: Gemm, pairs: list[EncodedPair]) -> _Part:
        """A set and what is wanted of it; damaged shards are told."""
        cache = ReferenceCache(cache_folder() / "reference", set_key(ctx, gemm))
        for shard in cache.damaged:
            ctx.listener.note(f"reference: damaged shard set aside, computed again: {shard}")
        keys = [pair_key(pair) for pair in pairs]
        return cls(gemm, cache, pairs, keys, cache.missing(keys))


def run(ctx: Context) -> tuple[Side, Side]:
    """Compute what the cache does not hold yet; (train, held out) with their log-probs."""
    key, gemm = set_key(ctx), ctx.recipe.gemm
    (train_ids, train), (eval_ids, held_out) = (_encode(ctx, side) for side in ("train", "eval"))
    inputs = {"set": key, "pairs": ctx.run.output("aif", "pairs")}
    if gemm == "exact":  # one set, filled in one go
        parts = [_Part.open(ctx, gemm, train + held_out)]
    else:
        parts = [_Part.open(ctx, gemm, train), _Part.open(ctx, "exact", held_out)]
    missing = sum(len(part.missing) for part in parts)
    if missing or not ctx.run.is_done("reference", inputs):
        with ctx.stage("reference", inputs) as record:
            if missing:
                _compute(ctx, parts)
            sets = [part.cache.set_key for part in parts]
            ctx.write({"set_key": sets[0], "key": key, "sets": sets}, "reference", "key.json")
            record |= {"set_key": sets[0], "sets": sets}
            record |= {"computed": missing, "pairs": len(train) + len(held_out)}
    known = [part.cache for part in parts]
    return (
        Side(train_ids, train, known[0].get([pair_key(pair) for pair in train])),
        Side(eval_ids, held_out, known[-1].get([pair_key(pair) for pair in held_out])),
    )


def set_key(ctx: Context, gemm: Gemm | None = None) -> dict[str, Any]:
    """Everything a reference log-prob depends on besides the pair's ids, and nothing else.

    Truncation is not listed: it acts on the ids, which are the pair's own key.

    Args: gemm: of the set; the recipe's by default, which is that of the pairs trained on.
    """
    parent = ctx.adapter("sft")
    return {
        "version": LOG_PROB_VERSION,
        "base": ctx.base.sha256,
        "adapter": adapter_identity(parent) if parent else None,
        "template": template_hash(),
        "dtype": str(ctx.dtype),
        "engine": ctx.engine,
        "kernels": ctx.kernels,
        "attention": ctx.recipe.attention,
        "gemm": gemm or ctx.recipe.gemm,
        "device": ctx.device.type,
    }


def encoded_pairs(
    ctx: Context, tokenizer: ChatTokenizer, side: str
) -> tuple[list[PreferencePair], list[EncodedPair]]:
    """Rows of one side and their token ids, cut by the recipe's rule."""
    settings = _settings(ctx)
    rows = aif.read_pairs(ctx, side)
    return rows, tokenizer.encode_pairs(
        [(r.prompt, r.chosen, r.rejected) for r in rows],
        names=[f"row {r.id} of {r.source}" for r in rows],
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
    )


def _encode(ctx: Context, side: str) -> tuple[list[str], list[EncodedPair]]:
    """Row ids and pairs of one side; those that truncation made equal are left out."""
    rows, encoded = encoded_pairs(ctx, ctx.tokenizer, side)
    kept = [i for i, pair in enumerate(encoded) if pair.is_distinct]
    _report(ctx, side, rows, encoded, kept)
    if side == "train" and not kept:
        raise DataError("no preference pair is left after truncation")
    return [rows[i].id for i in kept], [encoded[i] for i in kept]


def _reference_policy(ctx: Context) -> Policy:
    """The SFT model, or the base where there is no dSFT; nothing trains."""
    model, parent = ctx.load_model(), ctx.adapter("sft")
    if parent is None:
        return ctx.training_policy(model)
    policy = ctx.training_policy(load_adapter(model, sft.ADAPTER, parent))
    policy.use([sft.ADAPTER])
    return policy


def _settings(ctx: Context) -> Dpo:
    if ctx.recipe.dpo is None:
        raise ValueError("the recipe has no dpo section")
    return ctx.recipe.dpo


def _compute(ctx: Context, parts: list[_Part]) -> None:
    """Fill the caches shard by shard; a kill costs at most one."""
    lengths = pairs_of([pair for part in parts for pair in part.pairs])
    ctx, _ = fit.fitted(ctx, "dpo", lengths)  # a forward takes less than the training it is for
    policy = _reference_policy(ctx)
    budget = ctx.memory.tokens
    shards = [
        (part, part.missing[at : at + SHARD_PAIRS])
        for part in parts
        for at in range(0, len(part.missing), SHARD_PAIRS)
    ]
    ctx.listener.start("reference", len(shards), 0)
    with ctx.stop.deferred():
        for part, shard in shards:
            members = [part.pairs[i] for i in shard]
            with nullcontext() if part.gemm == "exact" else policy.as_trained():
                chosen_P, rejected_P = pair_log_probs(policy, members, budget)
            lengths = [(len(p.chosen), len(p.rejected)) for p in members]
            chosen_len_P, rejected_len_P = np.array(lengths, np.int32).T
            values = ReferenceLogProbs(chosen_P, rejected_P, chosen_len_P, rejected_len_P)
            part.cache.add([part.keys[i] for i in shard], values)
            ctx.listener.step({"pairs": len(part.cache)})
            ctx.stop.check("reference stopped; finished shards are saved")
    ctx.listener.end()


def _report(
    ctx: Context,
    side: str,
    rows: list[PreferencePair],
    encoded: list[EncodedPair],
    kept: list[int],
) -> None:
    """reference/report-SIDE.json: what truncation did to the pairs."""
    flags = ("prompt_truncated", "chosen_truncated", "rejected_truncated")
    counts = Counter(f for p in encoded for f in flags if getattr(p, f))
    equal = [rows[i].id for i, p in enumerate(encoded) if not p.is_distinct]
    report = {"pairs": len(rows), "kept": len(kept), "equal_after_truncation": equal, **counts}
    ctx.write(report, "reference", f"report-{side}.json")
