"""What stands before a step begins and after it ended: weights, adapters, gradients, states.

All sizes are bytes, found from shapes alone; `e` is an element of the compute dtype.
"""

from __future__ import annotations

from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.groups import groups_of
from zephyr_lite.plan.ledger import HostParts
from zephyr_lite.plan.setting import Setting

FP32, INT64 = 4, 8
# bitsandbytes' NF4 (QLoRA, arXiv 2305.14314): a scale a block, and a scale of scales a group.
BLOCK, GROUP, LEVELS, CODES = 64, 256, 16, 256
# bitsandbytes' optimizers: smaller tensors have fp32 states; 8-bit states have a scale a block;
# what is smaller than a page is worth is not paged.
LEAST_8BIT, STATE_BLOCK, LEAST_PAGED = 4096, 256, 100_000
# train/masters.py: weights of a host master's buffers begin at multiples of this.
ALIGNED = 64


def weight_bytes(geometry: Geometry, setting: Setting) -> int:
    """The frozen linears of all layers, as the engine holds them.

    NF4: two codes a byte; a scale a block of 64, fp32, or a byte and an fp32 a group of 256 scales,
    the 256 values of that byte and an offset; 16 levels: all for each tensor. A CPU also keeps
    every matrix that it dequantised, adapters in its border. Plain weights: e.
    """
    sizes = [n * k for n, k in geometry.linears.values()]
    if setting.quantization == "none":
        return geometry.layers * sum(sizes) * setting.element
    stored = sum(_nf4_bytes(size, setting.double_quant) for size in sizes)
    dense = _dense_bytes(geometry, setting) if setting.device == "cpu" else 0
    return geometry.layers * (stored + dense)


def _nf4_bytes(weights: int, double_quant: bool) -> int:
    blocks = _blocks(weights, BLOCK)
    scales = blocks * FP32
    if double_quant:
        scales = blocks + FP32 * (_blocks(blocks, GROUP) + CODES + 1)
    return _blocks(weights, 2) + scales + LEVELS * FP32


def embedding_bytes(geometry: Geometry, setting: Setting) -> int:
    """Embedding, head (unless it is the embedding), norms, biases, rotary frequencies.

    The engine joins q's, k's and v's biases: they are there twice.
    """
    g = geometry
    table = g.vocabulary * g.hidden
    norms = (2 * g.layers + 1) * g.hidden + (2 * g.layers * g.head_width if g.head_norms else 0)
    biases = 2 * g.layers * g.group("qkv")[0] if g.qkv_bias else 0
    frequencies = 2 * FP32 * (g.head_width // 2)  # what they are, and what they were
    return setting.element * (table * (1 if g.tied else 2) + norms + biases) + frequencies


def slot_bytes(geometry: Geometry, setting: Setting) -> int:
    """Where dense weights lie on a GPU: a slot for each group, which all layers share.

    NF4 is dequantised into them; plain weights need them under fp16acc alone.
    """
    if setting.device == "cpu" or (setting.quantization, setting.gemm) == ("none", "exact"):
        return 0
    return _dense_bytes(geometry, setting)


def _dense_bytes(geometry: Geometry, setting: Setting) -> int:
    """A layer's dense weights, with the adapters in their border where that pays."""
    element = 2 if setting.gemm == "fp16acc" else setting.element
    return element * sum(group.dense for group in groups_of(geometry, setting).values())


def adapter_bytes(geometry: Geometry, setting: Setting, *, on_host: bool) -> int:
    """fp32 masters of all adapters; of what trains copies in the compute dtype when `on_host`."""
    frozen = FP32 * geometry.adapter_weights(setting.frozen, setting.targets)
    if on_host:
        return frozen + setting.element * aligned_weights(geometry, setting)
    return frozen + FP32 * geometry.adapter_weights(setting.trained, setting.targets)


def stack_bytes(geometry: Geometry, setting: Setting) -> int:
    """A layer's adapters in the compute dtype, where they do not lie in a border."""
    return setting.element * sum(group.stack for group in groups_of(geometry, setting).values())


def gradient_bytes(geometry: Geometry, setting: Setting, *, on_host: bool) -> int:
    """fp32 gradients of what trains; one buffer when `on_host`."""
    if on_host:
        return FP32 * aligned_weights(geometry, setting)
    return FP32 * geometry.adapter_weights(setting.trained, setting.targets)


def optimizer_bytes(geometry: Geometry, setting: Setting) -> tuple[int, int]:
    """States on the device, and how many bytes of them are in managed memory, which may leave it.

    adamw: two fp32 states a weight, and a step of 4 bytes a tensor. 8 bits: two bytes a weight and
    two fp32 scales a block of 256, fp32 states where a tensor is small; and two maps of 256 values.
    A paged optimizer pages the states of tensors that are large enough; a CPU pages nothing.
    """
    kind, tensors = setting.optimizer, trained_tensors(geometry, setting)
    if kind == "adamw":
        return geometry.layers * sum(2 * FP32 * n + FP32 for n in tensors), 0
    is_8bit, is_paged = "8bit" in kind, kind.startswith("paged") and setting.device == "cuda"
    total = paged = 0
    for n in tensors:
        states = 2 * n if is_8bit and n >= LEAST_8BIT else 2 * FP32 * n
        paged += states if is_paged and n >= LEAST_PAGED else 0
        scales = 2 * FP32 * _blocks(n, STATE_BLOCK) if is_8bit and n >= LEAST_8BIT else 0
        total += states + scales
    maps = 2 * CODES * FP32 if is_8bit and max(tensors, default=0) >= LEAST_8BIT else 0
    return geometry.layers * total + maps, geometry.layers * paged


def master_bytes(geometry: Geometry, setting: Setting) -> HostParts:
    """Host memory of `place: host`: see train/masters.py.

    Pinned: fp32 masters and gradients, and masters rounded to the compute dtype unless that is
    fp32. Ordinary: two fp32 states, and a step of 4 bytes a tensor.
    """
    weights = aligned_weights(geometry, setting)
    elements = [FP32, FP32, *([setting.element] if setting.element < FP32 else [])]
    pinned = sum(pinned_bytes(element * weights, setting) for element in elements)
    states = sum(2 * FP32 * n + FP32 for n in trained_tensors(geometry, setting))
    return HostParts(pinned, geometry.layers * states)


def pinned_bytes(size: int, setting: Setting) -> int:
    """What one tensor that a GPU copies from takes of host memory: torch pins powers of two."""
    if setting.device == "cpu":
        return size
    return 1 << (size - 1).bit_length() if size else 0


def trained_tensors(geometry: Geometry, setting: Setting) -> list[int]:
    """Weights of each A and B of a layer's adapter that trains."""
    shapes = [geometry.linears[name] for name in setting.targets if name in geometry.linears]
    return [setting.trained * width for n, k in shapes for width in (k, n)]


def aligned_weights(geometry: Geometry, setting: Setting) -> int:
    """Weights of one buffer with all of them, each tensor's rounded up."""
    tensors = trained_tensors(geometry, setting)
    return geometry.layers * sum(_blocks(n, ALIGNED) * ALIGNED for n in tensors)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)
