"""fp32 tensors as the bytes of a GGML type. Formats: ggml-quants.c of llama.cpp (MIT), by formula.

    f32, f16    the values
    q8_0        blocks of 32 along a row: an fp16 scale d = max|x| / 127, then 32 int8 round(x / d)

Rounding is half away from zero and the quotient is taken with the scale before its rounding to
fp16, as ggml does, so that the bytes are ggml's.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

BLOCK = 32
CHUNK = 1 << 12  # blocks at a time: 512 KiB of values, so that the steps meet in cache


def byte_size(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor of `shape` stored as `kind`."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(weight: torch.Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """fp32 [..., D] -> array holding exactly the bytes to store.

    Raises: OverflowError when a value or scale does not fit fp16; ValueError for another `kind`.
    """
    if kind == GGMLQuantizationType.F32:
        return weight.to(torch.float32).numpy()
    if kind == GGMLQuantizationType.F16:
        return _to_half(weight).numpy()
    if kind == GGMLQuantizationType.Q8_0:
        return _encode_q8_0(weight)
    raise ValueError(f"cannot encode {kind.name}")


def _encode_q8_0(weight: torch.Tensor) -> np.ndarray:
    x_NB = weight.to(torch.float32).reshape(-1, BLOCK)
    out = np.empty((len(x_NB), 2 + BLOCK), np.uint8)
    for start in range(0, len(x_NB), CHUNK):
        rows = slice(start, start + CHUNK)
        scale_N1 = x_NB[rows].abs().amax(dim=1, keepdim=True) / 127
        inverse_N1 = torch.where(scale_N1 == 0, 0, 1 / scale_N1)
        scaled_NB = x_NB[rows] * inverse_N1
        # trunc(x + 0.5 sign x) would round 0.49999997 up; the fraction is exact.
        codes_NB = scaled_NB.trunc()
        codes_NB += (scaled_NB - codes_NB).mul_(2).trunc_()
        out[rows, :2] = _to_half(scale_N1).numpy().view(np.uint8)
        out[rows, 2:] = codes_NB.to(torch.int8).numpy().view(np.uint8)
    return out


def _to_half(x: torch.Tensor) -> torch.Tensor:
    half = x.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError("does not fit fp16")
    return half
