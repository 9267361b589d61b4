"""Trials of the attention that the layers call, over the layouts that they are given.

The rows are planned by the product's own code: documents, shared prompts, and the last layer's
fewer queries. Shapes: T tokens, U queries, H query heads, J key/value heads, D head width.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from zephyr_kernels import attention

from gpu.attention_race import Heads
from gpu.bench import Bench
from gpu.trials.trial import Outputs, Trial
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.model.attention import to_device

Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected


def documents(lengths: list[int], answers_only: bool = False) -> Layout:
    """Documents of these lengths; with `answers_only` the second half of each is scored."""
    flags = [np.arange(n) >= n // 2 for n in lengths]
    rows = [(np.zeros(n, np.int64), flag) for n, flag in zip(lengths, flags, strict=True)]
    return document_layout(rows, "assistant" if answers_only else "all")


def pairs(lengths: list[Pair]) -> Layout:
    """Preference pairs of these lengths."""
    rows = [[np.zeros(n, np.int32) for n in pair] for pair in lengths]
    return pair_layout([EncodedPair(prompt, chosen, no) for prompt, chosen, no in rows])


def plan_of(bench: Bench, layout: Layout, trimmed: bool) -> attention.Plan:
    """The plan of all layers, or of the last one. Raises: ValueError if that needs every row."""
    moved = to_device(layout, bench.device)
    if not trimmed:
        return moved.plan
    if moved.last is None:
        raise ValueError("the last layer needs every row of this layout")
    return moved.last.plan


def make_heads(
    bench: Bench, plan: attention.Plan, heads: Heads, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [U, H, D], k and v [T, J, D] as the layer has them: views of one product, or of two."""
    if plan.n_queries == plan.n_keys:
        packed = bench.randn(
            plan.n_keys, heads.query + 2 * heads.key_value, heads.dimension, dtype=dtype
        )
        q, k, v = packed.split([heads.query, heads.key_value, heads.key_value], 1)
        return q, k, v
    q = bench.randn(plan.n_queries, heads.query, heads.dimension, dtype=dtype)
    k, v = bench.randn(plan.n_keys, 2 * heads.key_value, heads.dimension, dtype=dtype).chunk(2, 1)
    return q, k, v


def poisoned_like(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """NaN in the shapes and strides of q, k and v."""
    return tuple(
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).fill_(math.nan)
        for x in tensors
    )


def attend(bench: Bench, dtype: torch.dtype, layout: Layout, trimmed: bool, heads: Heads) -> Trial:
    """Forward and backward: out, log-sum-exp, dq, dk, dv."""
    plan = plan_of(bench, layout, trimmed)
    q, k, v = make_heads(bench, plan, heads, dtype)
    upstream = bench.randn(*q.shape, dtype=dtype)
    scale, seen_UT = heads.dimension**-0.5, plan.seen(bench.device)

    def ours() -> Outputs:
        out, lse = attention.forward(q, k, v, plan, scale)
        grads = poisoned_like((q, k, v))
        attention.backward_(
            upstream, q, k, v, out, lse, plan, scale, (grads[0], grads[1], grads[2])
        )
        return {"out": out, "lse": lse} | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    def formula(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, upstream: torch.Tensor
    ) -> Outputs:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out, lse = attend_plainly(q, k, v, seen_UT, scale)
        grads = torch.autograd.grad(out, (q, k, v), upstream)
        found = {"out": out.detach(), "lse": lse.detach()}
        return found | dict(zip(("dq", "dk", "dv"), grads, strict=True))

    return Trial(ours, formula, (q, k, v, upstream))


def attend_plainly(
    q_UHD: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    seen_UT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager attention as transformers has it: products in the dtype, the softmax in fp32."""
    group = q_UHD.shape[1] // k_TJD.shape[1]
    k_THD, v_THD = (x.repeat_interleave(group, 1) for x in (k_TJD, v_TJD))
    scores_HUT = torch.einsum("uhd,thd->hut", q_UHD, k_THD) * scale
    precise = scores_HUT if scores_HUT.dtype == torch.float64 else scores_HUT.float()
    precise = precise.masked_fill(~seen_UT, -math.inf)
    weights_HUT = precise.softmax(-1).to(q_UHD.dtype)
    out_UHD = torch.einsum("hut,thd->uhd", weights_HUT, v_THD)
    return out_UHD, precise.logsumexp(-1).T
