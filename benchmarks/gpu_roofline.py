"""The least time a training step can take on this card, from its own two ceilings.

    seconds = F_gemm / matmul + F_attention / (0.7 matmul) + L T E / copy + 2 D / copy

    F_gemm       T (2 P + 2 P + rec) + 6 T A + 4 T A' + 4 V H N
    F_attention  4 L H S (1 + 2.5 + rec')

P weights of the linears (no gradient of theirs is needed), A those of the adapter that trains, A'
of the frozen one beside it; T tokens, N of them scored, S unmasked query-key pairs, H hidden width,
L layers, V vocabulary. rec: forward FLOPs computed again: 0, all but down_proj's, or all; rec': 0
or 1. E: bytes that elementwise and LoRA passes of a fused design must move a token and layer. D:
bytes of dequantising all linears once from NF4; once forward and once backward, however many
micro-batches a step has, so small ones pay more. `matmul` and `copy` are measured in the same
process: a 8192^3 product and a device copy. Attention kernels reach 0.7 of a product's rate. The
optimizer and copies over the bus count as free. Mistral-7B at 2048 tokens, nothing recomputed:
30.6 GFLOP a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gpu_model import Geometry

from zephyr_lite.data.layout import Layout

Recomputed = Literal["nothing", "all but down_proj", "all"]
ATTENTION_SHARE = 0.7
NF4_BYTES = 2.516  # a weight: codes and nested scales read, bf16 written
FORWARD_BYTES, BACKWARD_BYTES = 245_000, 595_000  # E of a token and layer, at hidden width 4096


@dataclass(frozen=True)
class Adapters:
    """Ranks on all linears: of the adapter that trains, and of a frozen one beside it."""

    trained: int
    frozen: int = 0


@dataclass(frozen=True)
class Work:
    """What one micro-batch asks for: tokens, scored tokens, unmasked query-key pairs."""

    tokens: int
    scored: int
    scores: int


def work_of(layout: Layout) -> Work:
    """Count a layout."""
    queries, context = layout.q_len_S, layout.c_len_S
    scores = int((queries * context + queries * (queries + 1) // 2).sum())
    return Work(layout.n_tokens, len(layout.targets_N), scores)


def matmul_flops(g: Geometry, adapters: Adapters, work: Work, recomputed: Recomputed) -> float:
    """F_gemm of one micro-batch."""
    again = {"nothing": 0, "all": g.weights}
    again["all but down_proj"] = g.weights - g.layers * g.hidden * g.feed_forward
    trained, frozen = (g.adapter_weights(r) for r in (adapters.trained, adapters.frozen))
    linears = 4 * g.weights + 2 * again[recomputed] + 6 * trained + 4 * frozen
    return work.tokens * linears + 4 * g.vocabulary * g.hidden * work.scored


def attention_flops(g: Geometry, work: Work, recomputed: Recomputed) -> float:
    """F_attention of one micro-batch."""
    passes = 3.5 if recomputed == "nothing" else 4.5
    return 4 * g.layers * g.hidden * work.scores * passes


def moved_bytes(g: Geometry, work: Work, recomputed: Recomputed) -> float:
    """Bytes of elementwise passes and of two dequantisations."""
    passes = FORWARD_BYTES + BACKWARD_BYTES
    passes += 0 if recomputed == "nothing" else FORWARD_BYTES
    elementwise = g.layers * work.tokens * passes * g.hidden / 4096
    return elementwise + 2 * NF4_BYTES * g.weights


def least_seconds(
    g: Geometry,
    adapters: Adapters,
    works: Iterable[Work],
    recomputed: Recomputed,
    *,
    matmul_tflops: float,
    copy_gb_per_s: float,
) -> float:
    """Seconds of a step of these micro-batches."""
    seconds = 0.0
    for work in works:
        seconds += matmul_flops(g, adapters, work, recomputed) / (1e12 * matmul_tflops)
        rate = ATTENTION_SHARE * 1e12 * matmul_tflops
        seconds += attention_flops(g, work, recomputed) / rate
        seconds += moved_bytes(g, work, recomputed) / (1e9 * copy_gb_per_s)
    return seconds
