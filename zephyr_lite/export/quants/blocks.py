"""The simple GGML types: every block of 32 values has its own fp16 scale.

Formats: ggml-common.h and ggml-quants.c of llama.cpp (MIT), by formula. Each function takes
`x_NB`, fp32 [N blocks, B values], and returns `[N, S]` uint8, the S bytes of a block in order.

Roundings are those of ggml, so that the bytes are ggml's: the quotient is taken with the scale
before *its* rounding to fp16, and no product is fused with a sum. torch's `trunc` is ten times
slower than a conversion to an integer, which also drops the fraction.

Suffixes: N blocks, B values of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

Encoder = Callable[[Tensor], Tensor]
# The largest fp32 below a half: |x| + this, without its fraction, is |x| rounded half up.
BELOW_HALF = 0.49999997


def encode_f16(x_NB: Tensor) -> Tensor:
    """f16: the nearest half, ties to even."""
    return half_bytes(x_NB)


def encode_bf16(x_NB: Tensor) -> Tensor:
    """bf16: the upper 16 bits of fp32, rounded to nearest, ties to even."""
    rounded_NB = x_NB.to(torch.bfloat16)
    refuse(rounded_NB)
    return rounded_NB.view(torch.uint8)


def encode_q8_0(x_NB: Tensor) -> Tensor:
    """q8_0, 34 bytes: fp16 d = max|x| / 127, 32 int8 round(x / d), halves away from zero."""
    scale_N1 = quotient(x_NB.abs().amax(1, keepdim=True), 127)
    scaled_NB = x_NB * inverse(scale_N1)
    half_NB = torch.copysign(torch.tensor(BELOW_HALF, device=x_NB.device), scaled_NB)
    codes_NB = scaled_NB.add_(half_NB).to(torch.int8)
    return torch.cat([half_bytes(scale_N1), codes_NB.view(torch.uint8)], 1)


def encode_q4_0(x_NB: Tensor) -> Tensor:
    """q4_0, 18 bytes: fp16 d = extreme / -8, 16 bytes of codes, x = d (code - 8).

    The extreme is the value of largest magnitude with its sign: it gets code 0 exactly, and the
    opposite sign has one code less. Byte i holds values i (low nibble) and i + 16.
    """
    scale_N1 = extreme(x_NB, 1) / -8
    codes_NB = _codes(x_NB * inverse(scale_N1), 8.5, 15)
    return torch.cat([half_bytes(scale_N1), _nibbles(codes_NB)], 1)


def encode_q5_0(x_NB: Tensor) -> Tensor:
    """q5_0, 22 bytes: fp16 d = extreme / -16, 4 bytes of fifth bits, 16 of nibbles as in q4_0.

    x = d (code - 16). Bit i of the four bytes, read as a little-endian number, is value i's.
    """
    scale_N1 = extreme(x_NB, 1) / -16
    codes_NB = _codes(x_NB * inverse(scale_N1), 16.5, 31)
    return torch.cat([half_bytes(scale_N1), _fifth_bits(codes_NB), _nibbles(codes_NB)], 1)


def encode_q5_1(x_NB: Tensor) -> Tensor:
    """q5_1, 24 bytes: fp16 d = (max - min) / 31, fp16 min, then bits as in q5_0.

    x = d code + min.
    """
    low_N1 = x_NB.amin(1, keepdim=True).add_(0.0)  # no negative zero
    scale_N1 = quotient(x_NB.amax(1, keepdim=True) - low_N1, 31)
    codes_NB = _codes((x_NB - low_N1).mul_(inverse(scale_N1)), 0.5, 31)
    head = [half_bytes(scale_N1), half_bytes(low_N1)]
    return torch.cat([*head, _fifth_bits(codes_NB), _nibbles(codes_NB)], 1)


ENCODERS: dict[Kind, Encoder] = {
    Kind.F16: encode_f16,
    Kind.BF16: encode_bf16,
    Kind.Q8_0: encode_q8_0,
    Kind.Q4_0: encode_q4_0,
    Kind.Q5_0: encode_q5_0,
    Kind.Q5_1: encode_q5_1,
}


def half_bytes(x: Tensor) -> Tensor:
    """fp32 [N, C] -> its halves as bytes [N, 2C]. OverflowError where one is not finite."""
    half = x.to(torch.float16).flatten()
    refuse(half)
    return half.view(torch.uint8).view(len(x), -1)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where scale is 0: a block of zeros then gets the code of zero."""
    return scale.reciprocal().masked_fill_(scale == 0, 0)


def quotient(x: Tensor | float, y: Tensor | float) -> Tensor:
    """x / y, one of them a number, rounded once.

    torch multiplies by a reciprocal where it sees a number: on a GPU, and over a tensor anywhere.
    """
    if isinstance(x, Tensor):
        return x / x.new_tensor(y)
    assert isinstance(y, Tensor)
    return y.new_tensor(x) / y


def extreme(x: Tensor, dim: int) -> Tensor:
    """The value of largest magnitude along `dim` of a matrix, kept as 1; of equal ones the first.

    Weights that were 16-bit once do tie, but seldom, and a search for the place is slow.
    """
    high, low = x.amax(dim), x.amin(dim)
    found = torch.where(high >= -low, high, low)
    ties = ((high == -low) & (high > 0)).nonzero().squeeze(1)
    if len(ties):
        tied = x.index_select(1 - dim, ties)
        found[ties] = tied.gather(dim, tied.abs().argmax(dim, keepdim=True)).squeeze(dim)
    return found.add_(0.0).unsqueeze(dim)  # no negative zero


def _codes(scaled_NB: Tensor, half: float, top: int) -> Tensor:
    """floor(scaled + half), at most `top`; changes `scaled_NB`, which + half is above 0."""
    return scaled_NB.add_(half).to(torch.uint8).clamp_(max=top)


def _nibbles(codes_NB: Tensor) -> Tensor:
    """Low nibbles of [N, 32] codes as [N, 16] bytes: the second half of a block lies above."""
    return (codes_NB[:, :16] & 15) | (codes_NB[:, 16:] << 4)


def _fifth_bits(codes_NB: Tensor) -> Tensor:
    """Bit 4 of [N, 32] codes as [N, 4] bytes, the first value in the lowest bit."""
    bits = (codes_NB >> 4).view(-1, 4, 8)
    for width in (4, 2, 1):  # eight bits fold into one byte
        bits = bits[..., :width] | (bits[..., width:] << width)
    return bits.squeeze(-1)


def refuse(stored: Tensor) -> None:
    """Raise OverflowError where what is stored is not finite."""
    low, high = torch.aminmax(stored)  # either is NaN where a value is
    if not torch.isfinite(torch.stack([low, high])).all():
        raise OverflowError(f"does not fit {str(stored.dtype).removeprefix('torch.')}")
