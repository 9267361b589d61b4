"""Two steps of the heaviest micro-batch, timed on this machine: what `plan --probe` projects from.

Lengths are those of the plan, ids are random, for neither bytes nor seconds hang on them.
"""

from __future__ import annotations

import time
from copy import copy
from typing import Any

import numpy as np
import torch

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.errors import MachineError, is_out_of_memory
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.plan.roofline import micro_batch_seconds, step_seconds
from zephyr_lite.plan.schedule import Candidate, Training
from zephyr_lite.plan.work import Work
from zephyr_lite.recipe import Lora
from zephyr_lite.report import quantities
from zephyr_lite.stages.context import Context
from zephyr_lite.train.masters import make_masters

STEPS = 2
FROZEN, TRAINED = "frozen", "trained"


def run(ctx: Context, training: Training, candidate: Candidate) -> tuple[float, dict[str, Any]]:
    """Measured seconds over projected ones, and what was measured.

    The first step warms up: kernels are compiled and optimizer states made in it.
    Raises: MachineError when the plan does not fit after all.
    """
    works = training.lengths.works(candidate.cut.tokens, training.order, sample=1)
    own = copy(ctx)
    own.planned = ctx.recipe.memory.model_copy(update=candidate.memory)
    try:
        seconds, peak = _steps(own, training, candidate, works.heaviest)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        text = str(error).splitlines()[0]
        raise MachineError(
            f"{training.setting.stage}: the planned cut ran out of memory: {text}",
            hint="plan with less: --vram, or memory.reserve",
        ) from None
    g, s, cut = training.geometry, training.setting, candidate.cut
    projected = micro_batch_seconds(g, s, cut, works.heaviest, training.gpu)
    projected += step_seconds(g, s, cut, training.gpu)
    measured = {"step_seconds": seconds, "tokens": works.heaviest.tokens, "peak_bytes": peak}
    words = f"{works.heaviest.tokens} tokens in {seconds:.3g} s"
    if peak is not None:
        planned = quantities.memory(candidate.parts.live)
        words += f", peak {quantities.memory(peak)}, planned {planned}"
    ctx.listener.note(f"probe {s.stage}: {words}")
    return seconds / projected, measured


def _steps(
    ctx: Context, training: Training, candidate: Candidate, work: Work
) -> tuple[float, int | None]:
    """Seconds of the last step, and bytes allocated at most, where the device tells."""
    stage, setting = training.setting.stage, training.setting
    settings = getattr(ctx.recipe, stage)
    model: Any = ctx.load_model()
    if setting.frozen:
        frozen = Lora(r=setting.frozen, alpha=setting.frozen, targets=setting.targets)
        model = add_adapter(model, FROZEN, frozen, seed=0)
    model = add_adapter(
        model, TRAINED, settings.lora.model_copy(update={"r": setting.trained}), seed=1
    )
    policy = ctx.training_policy(model)
    policy.use([FROZEN, TRAINED] if setting.frozen else [TRAINED], TRAINED)
    parameters = policy.trainable()
    masters = make_masters(settings, parameters, candidate.cut.place, policy.dtype)
    layout, seconds = _layout(work, stage, policy.vocab_size), 0.0
    if ctx.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ctx.device)
    for _ in range(STEPS):
        _wait(ctx.device)
        began = time.monotonic()
        (-policy.log_probs(layout, training=True).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
        masters.step(0.0)  # nothing of this is kept
        _wait(ctx.device)
        seconds = time.monotonic() - began
    on_gpu = ctx.device.type == "cuda"
    return seconds, torch.cuda.max_memory_allocated(ctx.device) if on_gpu else None


def _layout(work: Work, stage: str, vocab_size: int) -> Layout:
    """Random ids in the segments of a work."""
    rng = np.random.default_rng(0)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, vocab_size, count)

    if stage == "sft":
        return document_layout([(ids(n), np.ones(n, bool)) for n in work.queries])
    prompts = work.contexts[1::2]
    answers = zip(work.queries[::2], work.queries[1::2], prompts, strict=True)
    return pair_layout(
        [EncodedPair(ids(p), ids(first - p), ids(second)) for first, second, p in answers]
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
