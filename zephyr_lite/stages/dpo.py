"""dDPO: direct preference optimisation of an adapter over the frozen SFT model.

    pairs + reference log-probs -> audit -> loop -> dpo/adapter, dpo/eval.json

What `dpo/adapter` holds is one PEFT adapter relative to the *original* base: the frozen SFT adapter
and the trained one as a single adapter of rank r1 + r2, exact. Where `sft.from` is a model, that is
the base, and the adapter says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from zephyr_lite.data.chat import template_hash
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.errors import DataError, RecipeError, VerificationError
from zephyr_lite.evaluate.preferences import log_prob_figures, pair_log_probs, preference_figures
from zephyr_lite.model.adapters import add_adapter, load_adapter, save_adapter
from zephyr_lite.model.policy import Policy
from zephyr_lite.plan.lengths import pairs_of
from zephyr_lite.recipe import Dpo
from zephyr_lite.stages import fit, reference, sft
from zephyr_lite.stages.context import Context
from zephyr_lite.stages.reference import Side
from zephyr_lite.storage import open_sealed, read_json, seal_digest, sealed_folder
from zephyr_lite.train.loop import Job
from zephyr_lite.train.masters import check_place
from zephyr_lite.train.objectives import Preference

ADAPTER = "dpo"
AUDIT_PAIRS = 64
# Cache check: stored against fresh log-probs. fp32: nats a branch. bf16: other micro-batching alone
# moves a branch by about 0.03 nats, so there the mean per token and the mean margin are held.
FP32_NATS, BF16_NATS_PER_TOKEN = 1e-3, 2e-3
# A mean margin is a bias beyond 3 errors, of a spread that is at least what rounding does to a
# pair, and beyond this: a sound cache that is refused by chance is refused at every attempt. One
# that summed in bf16 is off by 0.034 nats.
MARGIN_ERRORS, MARGIN_NATS, ROUNDING_NATS = 3.0, 0.02, 0.03 * 2**0.5


@dataclass(frozen=True)
class _Stack:
    """Adapters of a policy: `frozen` is also what the reference was computed with."""

    policy: Policy
    frozen: list[str]
    saved: list[str]

    def train(self) -> None:
        """Everything in the forward, the DPO adapter trainable."""
        self.policy.use(self.saved, ADAPTER)


def run(ctx: Context) -> None:
    """Train the DPO adapter unless that was done before."""
    settings = ctx.recipe.dpo
    if settings is None:
        return
    check_inputs(ctx)
    train, held_out = reference.run(ctx)
    if settings.keep == "best" and not held_out.pairs:
        raise DataError("dpo.keep: best: no held-out pair is left", hint="see aif/report.json")
    inputs = {
        "recipe": _fields(ctx, settings),
        "reference": ctx.run.output("reference", "set_key"),
        "pairs": ctx.run.output("aif", "pairs"),
        "sft": sft.adapter_digest(ctx),
        "template": template_hash(),
    }
    if ctx.run.is_done("dpo", inputs):
        open_sealed(ctx.run.path("dpo", "adapter"))
        return
    with ctx.stage("dpo", inputs) as record:
        ctx, planned = fit.fitted(ctx, "dpo", pairs_of(train.pairs))
        record |= planned
        stack = _load(ctx, settings)
        audit = ctx.run.path("dpo", "audit.json")
        if not audit.exists():  # once, before the first step; a resumed training keeps its figures
            ctx.write(_audit(ctx, stack, settings, train), "dpo", "audit.json")
        record |= {"audit": read_json(audit)}
        stack.train()
        job = _job(ctx, stack.policy, settings, train, held_out)
        figures = job.run()
        record |= fit.outcome(ctx, job)
        last = {"last": figures.pop("last")} if settings.keep == "best" else {}
        with sealed_folder(ctx.run.path("dpo", "adapter")) as part:
            save_adapter(stack.policy.model, stack.saved, part, ctx.base_name)
        parent = _parent(held_out.reference)
        ctx.write({"sft": parent, "dpo": figures, **last}, "dpo", "eval.json")
        record |= {"adapter": seal_digest(ctx.run.path("dpo", "adapter")), "figures": figures}
    job.checkpoints().remove()
    if settings.keep == "best":
        accuracy = figures["eval_rewards/accuracies"]
        where = f"step {figures['step']} of {figures['steps']}"
        ctx.listener.note(f"dpo: kept the adapter of {where}, held-out accuracy {accuracy:.4f}")


def check_inputs(ctx: Context) -> None:
    """Raise RecipeError for what would otherwise be seen only when dSFT is over."""
    settings, feedback = ctx.recipe.dpo, ctx.recipe.data.feedback
    if settings is None or feedback is None:
        return
    if ctx.recipe.engine == "unsloth":
        raise RecipeError(
            "engine: unsloth trains dSFT only. In dDPO it computes a pair's prompt twice, its "
            "reference is a second copy of the SFT adapter in place of log-probs stored once, and "
            "it patches the libraries of the process that it is in",
            hint="--set engine=native --set sft.engine=unsloth",
        )
    check_place("dpo", settings, ctx.recipe.memory.place)
    if settings.keep == "best" and not (feedback.eval or feedback.holdout):
        raise RecipeError(
            "dpo.keep: best needs held-out pairs, and data.feedback has neither eval nor holdout",
            hint="name them in data.feedback.eval, or set data.feedback.holdout=0.05",
        )
    if settings.adapter == "continue" and ctx.adapter("sft") is None:
        raise RecipeError(
            "dpo.adapter: continue goes on with the SFT adapter, and there is none over this base",
            hint="set dpo.adapter=stacked",
        )


def _load(ctx: Context, settings: Dpo) -> _Stack:
    """Base with the SFT adapter frozen and a new one over it, or with the SFT adapter to go on."""
    model: Any = ctx.load_model()
    parent, frozen = ctx.adapter("sft"), []
    if parent is not None:
        model, frozen = load_adapter(model, sft.ADAPTER, parent), [sft.ADAPTER]
        if settings.adapter == "continue":
            model = load_adapter(model, ADAPTER, parent)
            return _Stack(ctx.training_policy(model), frozen, [ADAPTER])
    model = add_adapter(model, ADAPTER, settings.lora, ctx.recipe.seed + 1)
    return _Stack(ctx.training_policy(model), frozen, [*frozen, ADAPTER])


def _fields(ctx: Context, settings: Dpo) -> dict[str, Any]:
    """Fields of the recipe that affect the result: `eval_every` too, where the best is kept."""
    fields = ctx.run.fields("seed", "base", "dpo", "engine", "gemm")
    if settings.keep == "best":
        fields["dpo.eval_every"] = settings.eval_every
    return fields


def _by_accuracy(figures: dict[str, float]) -> tuple[float, ...]:
    """Held-out accuracy first; of two equal ones the lower loss."""
    return figures["eval_rewards/accuracies"], -figures["eval_loss"]


def _job(ctx: Context, policy: Policy, settings: Dpo, train: Side, held_out: Side) -> Job:
    budget = ctx.memory.tokens

    def evaluate() -> dict[str, float]:
        if not held_out.pairs:
            return {}
        chosen_P, rejected_P = pair_log_probs(policy, held_out.pairs, budget)
        return preference_figures(settings, chosen_P, rejected_P, held_out.reference)

    return Job(
        label="dpo",
        policy=policy,
        objective=Preference(train.pairs, train.ids, train.reference, settings, budget),
        settings=settings,
        folder=ctx.run.path("dpo"),
        seed=ctx.recipe.seed,
        listener=ctx.listener,
        stop=ctx.stop,
        evaluate=evaluate,
        rank=_by_accuracy if settings.keep == "best" else None,
        masters=ctx.memory.place,
        rehearses=ctx.planned is not None,
    )


def _parent(reference_figures: ReferenceLogProbs) -> dict[str, float]:
    """The SFT model's own figures on the held-out pairs: its log-probs are the reference's."""
    if not len(reference_figures.chosen_P):
        return {}
    return log_prob_figures(reference_figures.chosen_P, reference_figures.rejected_P)


def _audit(ctx: Context, stack: _Stack, settings: Dpo, train: Side) -> dict[str, float]:
    """Two checks before the first step, never mixed.

    Wiring: with a fresh adapter the policy equals the reference bit for bit when both are computed
    in the same micro-batches, so the loss is ln 2. Cache: stored log-probs equal fresh ones.

    Raises: VerificationError (exit 7) when either fails.
    """
    stored = train.reference
    n = min(AUDIT_PAIRS, len(train.pairs))
    chosen = np.linspace(0, len(train.pairs) - 1, n).astype(int).tolist()
    pairs: list[EncodedPair] = [train.pairs[i] for i in chosen]
    budget = ctx.memory.tokens
    with stack.policy.as_trained():
        stack.policy.use(stack.frozen)
        fresh_chosen_P, fresh_rejected_P = pair_log_probs(stack.policy, pairs, budget)
        stack.train()
        policy_chosen_P, policy_rejected_P = pair_log_probs(stack.policy, pairs, budget)
    fresh = ReferenceLogProbs(
        fresh_chosen_P, fresh_rejected_P, stored.chosen_len_P[chosen], stored.rejected_len_P[chosen]
    )
    plain = settings.model_copy(update={"sft_weight": 0.0})  # the SFT term is not 0 at step 0
    figures = preference_figures(plain, policy_chosen_P, policy_rejected_P, fresh)
    wiring = max(
        np.abs(policy_chosen_P - fresh_chosen_P).max(),
        np.abs(policy_rejected_P - fresh_rejected_P).max(),
    )
    audit = {"pairs": n, "loss": figures["eval_loss"], "wiring_nats": float(wiring)}
    if wiring != 0:
        raise VerificationError(
            f"step-0 audit: policy and reference differ by {wiring:.3g} nats before any step",
            hint="a fresh adapter must change nothing: this is a bug, please report it",
        )
    if settings.loss == "sigmoid":
        audit["loss_minus_ln2"] = figures["eval_loss"] - math.log(2)
    return audit | _check_cache(ctx, fresh, stored, chosen)


def is_biased(margin_P: np.ndarray) -> bool:
    """Whether stored margins, less fresh ones, nats, are off on the whole and not by chance."""
    if len(margin_P) < 2:
        return False
    error = max(float(margin_P.std(ddof=1)), ROUNDING_NATS) / math.sqrt(len(margin_P))
    return abs(float(margin_P.mean())) > max(MARGIN_ERRORS * error, MARGIN_NATS)


def _check_cache(
    ctx: Context, fresh: ReferenceLogProbs, stored: ReferenceLogProbs, chosen: list[int]
) -> dict[str, float]:
    """Compare stored with fresh log-probs on the audit pairs; the figures."""
    off_chosen_P = stored.chosen_P[chosen] - fresh.chosen_P
    off_rejected_P = stored.rejected_P[chosen] - fresh.rejected_P
    worst = float(max(np.abs(off_chosen_P).max(), np.abs(off_rejected_P).max()))
    tokens = fresh.chosen_len_P.sum() + fresh.rejected_len_P.sum()
    per_token = float((np.abs(off_chosen_P).sum() + np.abs(off_rejected_P).sum()) / tokens)
    margin_P = off_chosen_P - off_rejected_P
    exact = str(ctx.dtype) == "torch.float32"
    if worst > FP32_NATS if exact else per_token > BF16_NATS_PER_TOKEN or is_biased(margin_P):
        raise VerificationError(
            f"reference cache: stored log-probs are off by up to {worst:.3g} nats "
            f"({per_token:.3g} a token)",
            hint=f"remove {ctx.run.output('reference', 'set_key')} from the reference cache",
        )
    return {
        "cache_worst_nats": worst,
        "cache_nats_per_token": per_token,
        "cache_margin_nats": float(margin_P.mean()),
    }
