"""A product by fp16 operands and fp16 sums, which GeForce cards run at twice their bf16 rate.

    x16[t] = x[t] * 2^e[t]     the largest |x16[t]| in [4, 8)
    y[t] = 2^-e[t] * sum over pieces p of K:  fp16(x16[t, p] W[p])

A power of two changes no digit, so a row of any size uses fp16's range alike; what is lost are
values 2^-17 below the row's largest, which are rounded more coarsely than bf16 had them. W is
fp16 already: its eleven digits are more than bf16's eight.

A sum in fp16 is rounded again every few products, and its error grows with the root of K.
Simulated with a rounding every 16 products and four channels 30 times as loud as the rest, it is
1.4 times bf16's error at K = 4096, 2.1 times at 14336 and 2.9 times at 28672. So K is cut into
pieces of at most `PIECE_K`, which are added in fp32: at most 1.4 times at every K, and still below
twice on a unit that rounds every 8.

cuBLAS sums in fp16 where `torch.backends.cuda.matmul.allow_fp16_accumulation` is set; that is done
around the product alone and undone behind it. The flag is the process's, but acts on products of
fp16 operands only. Elsewhere the product is the simulation, `reference.mm_fp16_sums`: exact over 16
products, then rounded to nearest.

Shapes: T tokens, K summed and N output features, P pieces. Rows are contiguous, at any distance.

Bytes moved a token beside the product itself, of b bytes an element of x and y:
    scale_rows      (b + 2) K     read x, write x16
    unscale_rows    (2 P + b) N   read the pieces, write y; in place where P = 1 and b = 2
Tiles: a program a row in registers; 1,024 columns of a row.
Reference: `reference.scale_rows`, `.mm_fp16_sums`, `.unscale_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch
from zephyr_kernels.rows import row_strides

PIECE_K = 4096  # products of one fp16 sum
ALIGNMENT = 64  # pieces begin where a matrix unit's tiles and 16-byte loads do
BLOCK_N = 1024


def product(x_TK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    """x @ weight by fp16 sums, in x's dtype.

    Args:
        x_TK: any float dtype, rows contiguous.
        weight_KN: fp16, in any layout that cuBLAS takes.
    Returns: y_TN; inf where a sum left fp16's range, NaN where x had a NaN or an inf.
    Raises: ValueError if the weight is not fp16, the shapes do not fit or rows are not contiguous.
    """
    if weight_KN.dtype != torch.float16 or weight_KN.shape[0] != x_TK.shape[1]:
        raise ValueError(
            f"weight must be fp16 [{x_TK.shape[1]}, N], "
            f"got {weight_KN.dtype} {list(weight_KN.shape)}"
        )
    x16_TK, undo_T = scale_rows(x_TK)
    return unscale_rows(_sums(x16_TK, weight_KN), undo_T, x_TK.dtype)


def scale_rows(x_TK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in fp16, each row by the power of two that brings its largest magnitude into [4, 8).

    Returns: x16_TK, contiguous, and undo_T (fp32), what a row's results are multiplied with.
    Raises: ValueError if rows are not contiguous.
    """
    (stride,) = row_strides(x_TK)
    x16_TK = torch.empty(x_TK.shape, dtype=torch.float16, device=x_TK.device)
    if not x_TK.numel():
        return x16_TK, torch.ones(len(x_TK), device=x_TK.device)
    if runs_triton(x_TK):
        return x16_TK, _launch_scale(x_TK, x16_TK, stride)
    return x16_TK, reference.scale_rows(x_TK, x16_TK)


def unscale_rows(sums_PTN: torch.Tensor, undo_T: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """undo * (sum of the pieces) in `dtype`; over the only piece where it is as wide as fp16."""
    pieces, is_as_wide = len(sums_PTN), dtype.itemsize == sums_PTN.dtype.itemsize
    if pieces == 1 and is_as_wide:
        out_TN = sums_PTN[0].view(dtype)
    else:
        out_TN = torch.empty(sums_PTN.shape[1:], dtype=dtype, device=sums_PTN.device)
    if out_TN.numel() and runs_triton(out_TN):
        _launch_unscale(sums_PTN, undo_T, out_TN)
    else:
        reference.unscale_rows(sums_PTN, undo_T, out_TN)
    return out_TN


def pieces_of(width: int) -> list[slice]:
    """[0, width) in pieces of at most `PIECE_K`, as equal as their alignment lets them be."""
    count = max(1, -(-width // PIECE_K))
    step = max(1, -(-width // (count * ALIGNMENT))) * ALIGNMENT
    return [slice(at, min(at + step, width)) for at in range(0, max(1, width), step)]


@contextmanager
def fp16_sums() -> Iterator[None]:
    """Let cuBLAS sum fp16 products in fp16, whichever thread computes in the block."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_accumulation
    matmul.allow_fp16_accumulation = True
    try:
        yield
    finally:
        matmul.allow_fp16_accumulation = before


def _sums(x16_TK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    """Each piece's fp16 product [P, T, N]."""
    (tokens, width), outputs = x16_TK.shape, weight_KN.shape[1]
    pieces = pieces_of(width)
    sums_PTN = x16_TK.new_empty(len(pieces), tokens, outputs)
    with fp16_sums():
        for sums_TN, piece in zip(sums_PTN, pieces, strict=True):
            x_TC, weight_CN = x16_TK[:, piece], weight_KN[piece]
            if x16_TK.is_cuda:
                torch.mm(x_TC, weight_CN, out=sums_TN)
            else:
                sums_TN.copy_(reference.mm_fp16_sums(x_TC, weight_CN))
    return sums_PTN


def _launch_scale(x_TK: torch.Tensor, x16_TK: torch.Tensor, stride: int) -> torch.Tensor:
    from zephyr_kernels._fp16acc_triton import scale_rows_kernel

    tokens, width = x_TK.shape
    undo_T = torch.empty(tokens, dtype=torch.float32, device=x_TK.device)
    block = 1 << max(width - 1, 0).bit_length()
    launch(
        scale_rows_kernel, (tokens,),
        x_TK, x16_TK, undo_T, stride, x16_TK.stride(0), width,
        BLOCK_K=block, num_warps=min(max(block // 512, 1), 32),
    )  # fmt: skip
    return undo_T


def _launch_unscale(sums_PTN: torch.Tensor, undo_T: torch.Tensor, out_TN: torch.Tensor) -> None:
    from zephyr_kernels._fp16acc_triton import unscale_rows_kernel

    tokens, width = out_TN.shape
    tiles = -(-width // BLOCK_N)
    launch(
        unscale_rows_kernel, (tokens * tiles,),
        sums_PTN, undo_T, out_TN, sums_PTN.stride(0), sums_PTN.stride(1), out_TN.stride(0),
        width, tiles, PIECES=len(sums_PTN), BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip
