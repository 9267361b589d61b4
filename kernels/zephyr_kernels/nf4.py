"""Dequantising bitsandbytes' NF4 in one launch, nested scales included.

    w[e] = levels[nibble(e)] * scale[e // 64]
    scale[b] = absmax[b], or nested: absmax_code[absmax[b]] * absmax_scale[b // 256] + absmax_offset

A byte holds weights 2i (high nibble) and 2i + 1. Products and the sum are rounded one by one in
fp32, the result once to the dtype of `out`: bit for bit what bitsandbytes gives, which takes three
launches and writes the fp32 scales between them.

Shapes: N output and K input features of a weight, row-major over its N * K elements; blocks of 64
and groups of 256 blocks run across rows. `out` may be the first K columns of a scratch [N, K + R].

Bytes moved a weight, nested, bf16 out: 0.5 + 1/64 + 4/16384 read and 2 written, 2.516 in all: 548.7
MB for the 218.1M weights of a Mistral-7B layer. Levels and codes come from the cache.

One program for two runs of 32 blocks, 1,024 bytes each: 4 bytes a thread become one 16-byte store
of bf16. Where 64 divides K, as in every model, a block lies in one row and its address is found
once.

Source: Dettmers et al., arXiv 2305.14314. Reference: `reference.dequantise_nf4`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch
from zephyr_kernels.rows import row_strides

BLOCK, GROUP = 64, 256  # weights of a scale, scales of a scale of scales
RUN_BLOCKS = 32  # of a run; a program takes two


@dataclass(frozen=True, eq=False)
class Nf4:
    """A weight [N, K] as bitsandbytes stores it; all tensors contiguous and on one device.

    packed: uint8, ceil(N * K / 2) bytes of any shape.
    absmax: one a block of 64; fp32, or uint8 where it is quantised itself.
    absmax_code: fp32 [256], what a uint8 absmax stands for; None where absmax is fp32.
    absmax_scale: fp32, one a group of 256 blocks; None where absmax is fp32.
    absmax_offset: added to a nested scale; 0 where absmax is fp32.
    levels: fp32 [16], what a nibble stands for.
    shape: (N, K).
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax_code: torch.Tensor | None
    absmax_scale: torch.Tensor | None
    absmax_offset: float
    levels: torch.Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        """Raises: ValueError where a length does not fit the shape; a kernel would read past it."""
        weights = self.shape[0] * self.shape[1]
        blocks = -(-weights // BLOCK)
        wanted = {"packed": -(-weights // 2), "absmax": blocks, "levels": 16}
        if (self.absmax_code is None) != (self.absmax_scale is None):
            raise ValueError("absmax_code and absmax_scale must be given together")
        if self.absmax_code is not None:
            wanted |= {"absmax_code": 256, "absmax_scale": -(-blocks // GROUP)}
        for name, length in wanted.items():
            x = getattr(self, name)
            if x.numel() != length or not x.is_contiguous():
                raise ValueError(
                    f"{name} must be contiguous with {length} elements for {self.shape}, "
                    f"got {list(x.shape)}"
                )
        byte_sized = ["packed"] if self.absmax_code is None else ["packed", "absmax"]
        for name in byte_sized:
            if (dtype := getattr(self, name).dtype) != torch.uint8:
                raise ValueError(f"{name} must be uint8, got {dtype}")


def dequantise(weight: Nf4, out_NK: torch.Tensor) -> None:
    """Write the weight into `out_NK`, of any float dtype, rows contiguous.

    Raises: ValueError if `out_NK` has another shape or its rows are not contiguous.
    """
    if tuple(out_NK.shape) != tuple(weight.shape):
        raise ValueError(f"out must be {list(weight.shape)}, got {list(out_NK.shape)}")
    (stride,) = row_strides(out_NK)
    if runs_triton(out_NK):
        _launch(weight, out_NK, stride)
        return
    reference.dequantise_nf4(
        weight.packed.view(-1),
        weight.absmax.view(-1),
        weight.absmax_code,
        weight.absmax_scale,
        weight.absmax_offset,
        weight.levels,
        out_NK,
    )


def _launch(weight: Nf4, out_NK: torch.Tensor, stride: int) -> None:
    from zephyr_kernels._nf4_triton import dequantise_kernel

    if not out_NK.numel():
        return
    programs = -(-weight.absmax.numel() // (2 * RUN_BLOCKS))
    launch(
        dequantise_kernel, (programs,),
        weight.packed, weight.absmax, weight.absmax_code, weight.absmax_scale, weight.levels,
        out_NK, weight.absmax_offset, stride,
        out_NK.numel(), weight.absmax.numel(), weight.packed.numel(),
        K=out_NK.shape[1], NESTED=weight.absmax_code is not None, BLOCKS=RUN_BLOCKS,
        num_warps=8,
    )  # fmt: skip
