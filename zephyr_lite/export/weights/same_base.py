"""Whether a checkpoint in 16 bits is the model that a 4-bit checkpoint was made of.

To fold an adapter into the original weights is right only when they are the same model's. Shapes
say little: every fine-tune of a base has them. So some rows are quantised again: they must give
the codes that are stored, and what was not quantised must be equal. Only samples are read.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from zephyr_lite.errors import DataError
from zephyr_lite.export.weights.base_weights import BaseWeights

# What makes another function of the same weights, or gives them other shapes.
FIELDS = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "rms_norm_eps",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_parameters", "sliding_window",
)  # fmt: skip
# Seen: 1.000 of the codes of NF4, 0.997 of FP4 (ties), 0.997 after rounding to bf16 in between; a
# weight changed by 1 % of its size has 0.970 of its codes, another model's about 0.08.
SAME_CODES = 0.99
SAME_VALUES = 0.01  # relative; bf16 and fp16 copies of one fp32 weight differ by up to 0.004
ROWS, MATRICES = 64, 12  # looked at


def same_architecture(original: BaseWeights, quantised: BaseWeights) -> None:
    """Hold the 16-bit checkpoint against the one that was trained on.

    Raises: DataError with the file of `original`, naming the field, the tensor's shape, or the
        tensor whose values are another model's.
    """
    _same_config(original, quantised)
    names = set(quantised.names())
    if odd := sorted(names ^ set(original.names())):
        missing = "lacks" if odd[0] in names else "has besides"
        raise DataError(f"{missing} tensor {odd[0]}", file=original.folder, hint=_HINT)
    for name in sorted(names):
        if original.shape(name) != quantised.shape(name):
            raise DataError(
                f"tensor {name} has shape {list(original.shape(name))}, the base that was trained "
                f"on {list(quantised.shape(name))}",
                file=original.file(name),
                hint=_HINT,
            )
    for name in _samples(quantised):
        if not _same_values(original, quantised, name):
            raise DataError(
                f"tensor {name} holds other values than the base that was trained on",
                file=original.file(name),
                hint=_HINT,
            )


_HINT = "give the very checkpoint that the quantised base was made of, at the same revision"


def _same_config(original: BaseWeights, quantised: BaseWeights) -> None:
    one, two = _fields(original), _fields(quantised)
    for field in FIELDS:
        if one.get(field) != two.get(field):
            raise DataError(
                f"{field} is {one.get(field)!r:.80}, of the base that was trained on "
                f"{two.get(field)!r:.80}",
                file=original.folder / "config.json",
                hint=_HINT,
            )


def _fields(weights: BaseWeights) -> dict[str, Any]:
    """The config with defaults filled in and old spellings made new, as transformers reads it."""
    config = {k: v for k, v in weights.config.items() if k != "quantization_config"}
    kind = config.pop("model_type", None)
    try:
        return AutoConfig.for_model(kind, **config).to_dict()
    except Exception as error:  # transformers validates with whatever its classes raise
        raise DataError(
            f"is no config that transformers reads: {str(error)[:200]}",
            file=weights.folder / "config.json",
        ) from None


def _samples(weights: BaseWeights) -> list[str]:
    """The largest plain tensors (embedding, head) and matrices from first to last."""
    plain = [name for name in weights.names() if weights.packed(name) is None]
    packed = sorted(name for name in weights.names() if weights.packed(name) is not None)
    step = max(1, len(packed) // MATRICES)
    return sorted(plain, key=lambda n: -_size(weights.shape(n)))[:MATRICES] + packed[::step]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _same_values(original: BaseWeights, quantised: BaseWeights, name: str) -> bool:
    shape, packed = quantised.shape(name), quantised.packed(name)
    # A multiple of 64 rows in front, so that a block begins where the sample does.
    start = max(0, shape[0] // 2 - ROWS) // 64 * 64
    rows = slice(start, min(start + ROWS, shape[0]))
    if original.packed(name) is not None:
        raise DataError(
            f"tensor {name} is quantised: these are not the original weights",
            file=original.file(name),
            hint=_HINT,
        )
    one = original.stored(name)[rows].float()
    if packed is None:
        two = quantised.stored(name)[rows].float()
        return bool((one - two).norm() <= SAME_VALUES * two.norm())
    same = _codes(one, packed.levels(), packed.blocksize) == packed.codes(rows)
    return same.float().mean().item() >= SAME_CODES


def _codes(weight_OI: torch.Tensor, levels: torch.Tensor, blocksize: int) -> torch.Tensor:
    """The nearest code of each weight: blockwise, scaled by the block's largest magnitude."""
    flat = weight_OI.flatten()
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % blocksize)).view(-1, blocksize)
    scaled = (padded / padded.abs().amax(1, keepdim=True).clamp_min(1e-30)).flatten()
    best, distance = torch.zeros_like(scaled, dtype=torch.long), (scaled - levels[0]).abs()
    for code in range(1, len(levels)):
        nearer = (scaled - levels[code]).abs()
        best[nearer < distance] = code
        distance = torch.minimum(distance, nearer)
    return best[: len(flat)].view_as(weight_OI)
