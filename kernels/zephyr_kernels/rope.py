"""Rotary position embedding, in place on the packed product of queries, keys and values.

    pair (a, b), angle t = position * frequency:   a' = a cos t - b sin t,  b' = b cos t + a sin t

Pairs are (i, i + P), as Llama's and Mistral's are, or neighbours (2i, 2i + 1). The turn is
orthogonal: its backward is the turn back, `inverse=True`.

Shapes: T tokens, H heads, D = 2 P head width. cos and sin are given a token, fp32: positions
restart where documents and answers do, so the caller gathers them. The first Hq + Hkv heads of a
packed [T, Hq + 2 Hkv, D] tensor are a view that one call turns.

Bytes moved a token for 32 + 8 heads of 128 in bf16: 20.5 kB (read and write x) and 0.5 kB of cos
and sin, which the programs of a token share through the cache.

One program for 8 heads of a token: a tile [8, BLOCK_P] of pairs, BLOCK_P = next power of 2 of P; 8
pairs a thread, a 16-byte load for each side in bf16. The programs of a token are neighbours.

Source: Su et al., arXiv 2104.09864, eq. 34. Reference: `reference.rotate_`.
"""

from __future__ import annotations

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch

BLOCK_H = 8


def rotate_(
    x_THD: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    *,
    interleaved: bool = False,
    inverse: bool = False,
) -> None:
    """Turn every head of every token by its token's angles, in place.

    Args:
        x_THD: fp64, fp32, bf16 or fp16; D even and contiguous, strides of T and H free.
        cos_TP, sin_TP: fp32 (fp64 for fp64), P = D / 2, rows contiguous.
        interleaved: pairs are (2i, 2i + 1), not (i, i + P).
        inverse: turn by -t: the backward.
    Raises: ValueError if shapes do not fit or heads are not contiguous.
    """
    tokens, width = x_THD.shape[0], x_THD.shape[2]
    if width % 2 or (x_THD.stride(2) != 1 and width > 1):
        raise ValueError(
            f"heads must be contiguous and even, got width {width}, strides {x_THD.stride()}"
        )
    for name, table in (("cos", cos_TP), ("sin", sin_TP)):
        if table.shape != (tokens, width // 2) or (table.stride(1) != 1 and width > 2):
            raise ValueError(
                f"{name} must be [{tokens}, {width // 2}], rows contiguous, "
                f"got {list(table.shape)}, strides {table.stride()}"
            )
    if runs_triton(x_THD):
        _launch(x_THD, cos_TP, sin_TP, interleaved, inverse)
    else:
        reference.rotate_(x_THD, cos_TP, sin_TP, interleaved, inverse)


def _launch(
    x_THD: torch.Tensor,
    cos_TP: torch.Tensor,
    sin_TP: torch.Tensor,
    interleaved: bool,
    inverse: bool,
) -> None:
    from zephyr_kernels._rope_triton import rotate_kernel

    tokens, heads, width = x_THD.shape
    if not x_THD.numel():
        return
    half = width // 2
    block = 1 << (half - 1).bit_length()
    groups = -(-heads // BLOCK_H)
    launch(
        rotate_kernel, (tokens * groups,),
        x_THD, cos_TP, sin_TP,
        x_THD.stride(0), x_THD.stride(1), cos_TP.stride(0), sin_TP.stride(0), heads, half, groups,
        INTERLEAVED=interleaved, INVERSE=inverse, BLOCK_H=BLOCK_H, BLOCK_P=block,
        num_warps=min(max(BLOCK_H * block // 256, 1), 8),
    )  # fmt: skip
