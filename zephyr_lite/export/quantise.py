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
    scale_N1 = x_NB.abs().amax(dim=1, keepdim=True) / 127
    inverse_N1 = torch.where(scale_N1 == 0, 0, 1 / scale_N1)
    scaled_NB = x_NB * inverse_N1
    magnitude_NB = scaled_NB.abs()
    floor_NB = magnitude_NB.floor()
    floor_NB += magnitude_NB - floor_NB >= 0.5
    codes_NB = (floor_NB * scaled_NB.sign()).to(torch.int8)
    scales = _to_half(scale_N1).numpy().view(np.uint8)
    return np.concatenate([scales, codes_NB.numpy().view(np.uint8)], axis=1)


def _to_half(x: torch.Tensor) -> torch.Tensor:
    half = x.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError("does not fit fp16")
    return half
