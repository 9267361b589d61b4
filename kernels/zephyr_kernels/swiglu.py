"""SwiGLU: the gated product of a feed-forward block, and its backward in place.

    s = 1 / (1 + exp(-gate))        h = gate * s * up
    d up = dh * gate * s            d gate = dh * up * s * (1 + gate * (1 - s))

The backward needs no memory of its own: h, which the down projection's LoRA gradient wants again,
is written over dh, and the two gradients over gate and up, where the product that made those finds
them.

Shapes: T tokens, F feed-forward width. Rows are contiguous; gate and up may be the two halves of
one [T, 2 F] buffer, `out` the first F columns of an augmented operand [T, F + R].

Bytes moved a token at F = 14336 in bf16: forward 86 kB (read gate and up, write h), backward 172 kB
(read and write dh, gate and up).

One program for 1,024 columns of a row (14 a row at F = 14336, none of them ragged): 8 values a
thread, a 16-byte load for each operand in bf16.

Source: Shazeer, arXiv 2002.05202. Reference: `reference.swiglu`, `reference.swiglu_backward_`.
"""

from __future__ import annotations

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch
from zephyr_kernels.rows import row_strides

BLOCK_F = 1024


def swiglu(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, out_TF: torch.Tensor | None = None
) -> torch.Tensor:
    """h = silu(gate) * up, written to `out_TF`, or to a new tensor of gate's dtype without it.

    Raises: ValueError if shapes differ or rows are not contiguous.
    """
    if out_TF is None:
        out_TF = torch.empty(gate_TF.shape, dtype=gate_TF.dtype, device=gate_TF.device)
    strides = row_strides(gate_TF, up_TF, out_TF)
    if runs_triton(gate_TF):
        _launch_fwd(gate_TF, up_TF, out_TF, strides)
    else:
        reference.swiglu(gate_TF, up_TF, out_TF)
    return out_TF


def swiglu_backward_(dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor) -> None:
    """Write h over dh, d gate over gate and d up over up.

    Raises: ValueError if shapes differ or rows are not contiguous.
    """
    strides = row_strides(dh_TF, gate_TF, up_TF)
    if runs_triton(gate_TF):
        _launch_bwd(dh_TF, gate_TF, up_TF, strides)
    else:
        reference.swiglu_backward_(dh_TF, gate_TF, up_TF)


def _launch_fwd(
    gate_TF: torch.Tensor, up_TF: torch.Tensor, out_TF: torch.Tensor, strides: tuple[int, ...]
) -> None:
    from zephyr_kernels._swiglu_triton import swiglu_fwd_kernel

    if not gate_TF.numel():
        return
    tokens, width = gate_TF.shape
    tiles = -(-width // BLOCK_F)
    launch(
        swiglu_fwd_kernel, (tokens * tiles,),
        gate_TF, up_TF, out_TF, *strides, width, tiles, BLOCK_F=BLOCK_F, num_warps=4,
    )  # fmt: skip


def _launch_bwd(
    dh_TF: torch.Tensor, gate_TF: torch.Tensor, up_TF: torch.Tensor, strides: tuple[int, ...]
) -> None:
    from zephyr_kernels._swiglu_triton import swiglu_bwd_kernel

    if not gate_TF.numel():
        return
    tokens, width = gate_TF.shape
    tiles = -(-width // BLOCK_F)
    launch(
        swiglu_bwd_kernel, (tokens * tiles,),
        dh_TF, gate_TF, up_TF, *strides, width, tiles, BLOCK_F=BLOCK_F, num_warps=4,
    )  # fmt: skip
