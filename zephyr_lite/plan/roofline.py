"""The least time that a training can take on a card, from how fast it multiplies and copies.

    micro-batch   F_base / base + F_rest / matmul + F_attention / (0.7 matmul) + bytes / copy + bus

    F_base        T (2 P + 2 P + 2 P')         forward, gradient of the input, what is done again
    F_rest        T (6 A + 4 A' + 2 A") + 4 V H N
    F_attention   4 L W S (1 + 2.5 + share)
    bytes         T H E + 2 D

P weights of the linears (frozen: no gradient of theirs is needed), A those of the adapter that
trains, A' of the frozen one beside it; P' and A" those that are multiplied by a second time for the
backward: of all layers but down_proj's in a layer that is lean or offloads, all in one under plain
checkpointing; `share` of the L layers does attention's forward again. T tokens, N of them scored, S
unmasked query-key pairs, H hidden width, W heads x their width, V vocabulary. E: what elementwise
and LoRA passes of a fused design must move, in proportion to H. D: dequantising all linears from
NF4, once forward and once backward whatever is done again, and however many tokens a micro-batch
has, so small ones pay more. bus: what an offload's copies take beyond the products they run beside.

A reference pass is the forward alone, its head one product instead of two. An optimizer step adds
clipping and AdamW over the adapter, and with states on the host their way there and back. Rates are
those that a process has measured, or for a `Gpu` its efficiency x its peak and 0.85 of its memory's
bandwidth. Launches, the tokens' way there and the last layer's rows that predict nothing (at most
2 % of pairs with long prompts) are not counted. Mistral-7B at 2048 tokens and r 16: 30.6 GFLOP a
token with nothing done again, 41.4 lean, 45.2 under plain checkpointing. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import Gpu
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import Work

Recomputed = Literal["nothing", "all but down_proj", "all"]
ATTENTION_SHARE = 0.7  # of a product's rate, reached by attention kernels
COPY_SHARE = 0.85  # of a card's peak bandwidth
FP16_SUMS = 2.0  # rate of products with fp16 sums over those with fp32 sums, on GeForce
# E, bytes of a token, layer and feature of the hidden width in 16 bit; 4096 of them: 0.84 MB.
FORWARD_BYTES, BACKWARD_BYTES = 245_000 / 4096, 595_000 / 4096
DROPOUT_BYTES = 130_000 / 4096  # of dropout inside the adapters, both directions
# D, bytes of a weight: codes and scales read, 16 bit written.
NF4_BYTES = {True: 2.516, False: 2.5625}  # nested scales or fp32 ones
# Clipping reads gradients for their norm, then scales them; AdamW reads weight, gradient and two
# states and writes all but the gradient. Bytes of a trained weight.
CLIP_BYTES = 4 + 8
ADAM_BYTES = {32: 8 + 4 + 16, 8: 8 + 4 + 4}
HOST_GB_PER_S = 20.0  # of host memory under AdamW on a CPU; assumed, two channels of DDR4
ROUND_BYTES = 4 + 2  # fp32 masters read, the compute dtype written


@dataclass(frozen=True)
class Flops:
    """FLOPs by the rate they run at: products with frozen weights of the linears; with adapters and
    the head, which stay in the compute dtype; attention."""

    base: float
    rest: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.base + self.rest + self.attention


@dataclass(frozen=True)
class Rates:
    """What a card reaches. matmul, base: FLOP/s of products, and of those with frozen weights of
    the linears; copy: bytes/s, read plus written."""

    matmul: float
    copy: float
    base: float


def rates_of(gpu: Gpu, setting: Setting) -> Rates:
    """Rates of a known card; `gemm: fp16acc` doubles one of them on a GeForce."""
    matmul = 1e12 * gpu.efficiency * gpu.tflops
    factor = FP16_SUMS if setting.gemm == "fp16acc" and gpu.is_geforce else 1.0
    return Rates(matmul, 1e9 * COPY_SHARE * gpu.gb_per_s, factor * matmul)


def flops(
    g: Geometry,
    setting: Setting,
    work: Work,
    recomputed: Recomputed = "nothing",
    layers: int | None = None,
) -> Flops:
    """FLOPs of a micro-batch, forward and backward, `layers` (default all) of which recompute."""
    share, count = _share(g, recomputed, layers), _weights(g, setting)
    again = (count.linears, count.adapters) if recomputed == "all" else count.lean
    adapters = 6 * count.trained + 4 * count.frozen + 2 * share * again[1]
    return Flops(
        base=work.tokens * (4 * count.linears + 2 * share * again[0]),
        rest=work.tokens * adapters + 4 * g.vocabulary * g.hidden * work.scored,
        attention=(3.5 + share) * _attention(g, work),
    )


def reference_flops(g: Geometry, setting: Setting, work: Work) -> Flops:
    """FLOPs of a micro-batch whose log-probs alone are wanted, both adapters active."""
    count, head = _weights(g, setting), 2 * g.vocabulary * g.hidden * work.scored
    rest = 2 * work.tokens * count.adapters + head
    return Flops(2 * work.tokens * count.linears, rest, _attention(g, work))


def moved_bytes(
    g: Geometry,
    setting: Setting,
    work: Work,
    recomputed: Recomputed = "nothing",
    layers: int | None = None,
) -> float:
    """Bytes of a micro-batch's elementwise passes and of its two dequantisations."""
    per_feature = (1 + _share(g, recomputed, layers)) * FORWARD_BYTES + BACKWARD_BYTES
    per_feature += DROPOUT_BYTES if setting.dropout else 0.0
    return _elementwise(g, setting, work, per_feature) + 2 * _dequantised(g, setting)


def least_seconds(
    g: Geometry,
    setting: Setting,
    works: Iterable[Work],
    recomputed: Recomputed,
    *,
    matmul_tflops: float,
    copy_gb_per_s: float,
) -> float:
    """Seconds of these micro-batches at rates that this process measured; no optimizer, no bus."""
    rates = Rates(1e12 * matmul_tflops, 1e9 * copy_gb_per_s, 1e12 * matmul_tflops)
    return sum(
        _seconds(
            flops(g, setting, work, recomputed), moved_bytes(g, setting, work, recomputed), rates
        )
        for work in works
    )


def micro_batch_seconds(g: Geometry, setting: Setting, cut: Cut, work: Work, gpu: Gpu) -> float:
    """Seconds of a micro-batch, forward and backward, under `cut`."""
    rates, layers = rates_of(gpu, setting), g.layers - cut.keep
    args = (g, setting, work, "all but down_proj", layers)
    seconds = _seconds(flops(*args), moved_bytes(*args), rates)
    if cut.rest != "offload" or not layers:
        return seconds
    forward = reference_seconds(g, setting, work, gpu)
    bus = layers * work.tokens * g.hidden * setting.element / (1e9 * gpu.pcie_gb_per_s)
    beside = layers / g.layers
    hidden = (forward * beside, (seconds - forward) * beside)
    return seconds + sum(max(0.0, bus - computing) for computing in hidden)


def reference_seconds(g: Geometry, setting: Setting, work: Work, gpu: Gpu) -> float:
    """Seconds of a micro-batch of the reference pass: the forward, and the log-probs."""
    moved = _elementwise(g, setting, work, FORWARD_BYTES) + _dequantised(g, setting)
    return _seconds(reference_flops(g, setting, work), moved, rates_of(gpu, setting))


def step_seconds(g: Geometry, setting: Setting, cut: Cut, gpu: Gpu) -> float:
    """Seconds of what comes once an optimizer step: clipping, AdamW, transfers of host states."""
    weights = _weights(g, setting).trained
    copy = rates_of(gpu, setting).copy
    if cut.place == "host":
        over_bus = weights * (4 + setting.element) / (1e9 * gpu.pcie_gb_per_s)
        on_host = weights * (ADAM_BYTES[32] + ROUND_BYTES) / (1e9 * HOST_GB_PER_S)
        return weights * CLIP_BYTES / copy + over_bus + on_host
    bits = 8 if setting.optimizer.endswith("8bit") else 32
    return weights * (CLIP_BYTES + ADAM_BYTES[bits]) / copy


def _seconds(count: Flops, moved: float, rates: Rates) -> float:
    return (
        count.base / rates.base
        + count.rest / rates.matmul
        + count.attention / (ATTENTION_SHARE * rates.matmul)
        + moved / rates.copy
    )


def _share(g: Geometry, recomputed: Recomputed, layers: int | None) -> float:
    """Of the layers, how many recompute."""
    if recomputed == "nothing":
        return 0.0
    return 1.0 if layers is None else layers / g.layers


@dataclass(frozen=True)
class _Weights:
    """Of all layers: linears, the adapter that trains, the frozen one; lean: linears and both
    adapters without those of down_proj."""

    linears: int
    trained: int
    frozen: int
    lean: tuple[int, int]

    @property
    def adapters(self) -> int:
        return self.trained + self.frozen


@lru_cache(maxsize=64)  # a schedule asks for thousands of micro-batches of one training
def _weights(g: Geometry, setting: Setting) -> _Weights:
    lean = tuple(name for name in setting.targets if name != "down_proj")
    outputs, inputs = g.linears["down_proj"]
    return _Weights(
        linears=g.weights,
        trained=g.adapter_weights(setting.trained, setting.targets),
        frozen=g.adapter_weights(setting.frozen, setting.targets),
        lean=(
            g.weights - g.layers * outputs * inputs,
            g.adapter_weights(setting.trained + setting.frozen, lean),
        ),
    )


def _attention(g: Geometry, work: Work) -> float:
    """FLOPs of one forward of all layers' attention."""
    return 4 * g.layers * g.heads * g.head_width * work.scores


def _elementwise(g: Geometry, setting: Setting, work: Work, per_feature: float) -> float:
    return g.layers * work.tokens * g.hidden * per_feature * setting.element / 2


def _dequantised(g: Geometry, setting: Setting) -> float:
    """Bytes of dequantising every linear once."""
    if setting.quantization == "none":
        return 0.0
    return NF4_BYTES[setting.double_quant] * _weights(g, setting).linears
