"""Which type each tensor of a GGUF is stored as: llama.cpp's mixtures for dense models.

A mixture is named by its bulk type; a few matrices that hurt more when they are rounded get a
wider one. The facts are those of llama-quant.cpp (build of llama-cpp-python 0.3.36) for models
without experts; a test compares them with what `llama_model_quantize` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as Kind

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k_m": LlamaFileType.MOSTLY_Q5_K_M,
    "q5_k_s": LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
    "q4_k_s": LlamaFileType.MOSTLY_Q4_K_S,
    "q3_k_m": LlamaFileType.MOSTLY_Q3_K_M,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}
BULK = {
    "f32": Kind.F32,
    "f16": Kind.F16,
    "bf16": Kind.BF16,
    "q8_0": Kind.Q8_0,
    "q6_k": Kind.Q6_K,
    "q5_k_m": Kind.Q5_K,
    "q5_k_s": Kind.Q5_K,
    "q4_k_m": Kind.Q4_K,
    "q4_k_s": Kind.Q4_K,
    "q3_k_m": Kind.Q3_K,
    "q4_0": Kind.Q4_0,
}
UNQUANTISED = (Kind.F32, Kind.F16, Kind.BF16)
# Rows that super-blocks of 256 do not divide take blocks of 32, one bit wider.
NARROW = {Kind.Q3_K: Kind.Q4_0, Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}


def _in_outer_eighths_or_every_third(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


# (mixtures, tensors of a layer, where, type): the first row that fits wins, else the bulk type.
WIDER: tuple[
    tuple[tuple[str, ...], tuple[str, ...], Callable[[int, int], bool], Kind],
    ...,
] = (
    (("q4_k_m", "q5_k_m"), ("attn_v", "ffn_down"), _in_outer_eighths_or_every_third, Kind.Q6_K),
    (("q4_k_s",), ("attn_v",), lambda layer, _: layer < 4, Kind.Q5_K),
    (("q4_k_s",), ("ffn_down",), lambda layer, layers: layer < layers // 8, Kind.Q5_K),
    (("q3_k_m",), ("attn_v",), lambda layer, _: layer < 2, Kind.Q5_K),
    (("q3_k_m",), ("ffn_down",), lambda layer, layers: layer < layers // 16, Kind.Q5_K),
    (("q3_k_m",), ("attn_v", "ffn_down", "attn_output"), lambda *_: True, Kind.Q4_K),
)
_MATRIX = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def kinds(
    quant: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    architecture: str = "llama",
) -> dict[str, Kind]:
    """The type of every tensor, by its GGUF name.

    Args:
        quant: a key of FILE_TYPES.
        shapes: rows first, as in transformers; without `output.weight` where the head is tied.
        architecture: GGUF's name of it.
    """
    facts = {"layers": layers, "heads": heads, "kv_heads": kv_heads}
    wanted = wanted_kinds(quant, shapes, **facts, architecture=architecture)
    return {name: _fitting(kind, shapes[name][-1]) for name, kind in wanted.items()}


def wanted_kinds(
    quant: str,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    architecture: str = "llama",
) -> dict[str, Kind]:
    """As `kinds`, were all rows divisible: where the two differ, a tensor had to fall back."""
    # llama.cpp calls these "70B": eight heads share a small attn_v, which counts eightfold.
    is_70b = layers == 80 and (
        architecture == "qwen2" or (architecture == "llama" and heads != kv_heads)
    )
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    found = {}
    for name, shape in shapes.items():
        if len(shape) == 1:  # norms, biases, rope factors
            found[name] = Kind.F32
        elif BULK[quant] in UNQUANTISED:
            found[name] = BULK[quant]
        elif name == head:
            found[name] = Kind.Q8_0 if BULK[quant] == Kind.Q8_0 else Kind.Q6_K
        else:
            kind = _layer_kind(quant, name, layers)
            raised = is_70b and ".attn_v." in name and kind in (Kind.Q3_K, Kind.Q4_K)
            found[name] = Kind.Q5_K if raised else kind
    return found


def _layer_kind(quant: str, name: str, layers: int) -> Kind:
    if match := _MATRIX.fullmatch(name):
        layer, tensor = int(match[1]), match[2]
        for quants, tensors, where, kind in WIDER:
            if quant in quants and tensor in tensors and where(layer, layers):
                return kind
    return BULK[quant]


def _fitting(kind: Kind, row: int) -> Kind:
    """`kind`, or what stands in for it where its blocks do not divide a row."""
    for candidate in (kind, NARROW.get(kind, kind)):
        if row % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Kind.F16
