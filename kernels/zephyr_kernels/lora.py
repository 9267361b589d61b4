"""LoRA around a frozen linear, by hand-derived products: Y = X W' + S B', S = drop(X) A'.

    dS = dY B      dB = dY' S      dA = dS' drop(X)      dX = dY W + mask * (dS A) * scale

The scale alpha / r is folded into B by the caller. Adapters of one input are stacked as rows of A,
frozen ones beside trainable ones; a *span* of rows has a dropout of its own, whose mask is a
function of (seed, element), made again where it is needed and stored nowhere. Without spans all is
cuBLAS, and takes augmented K when the operands lie so, with no pass over Y or dX of its own:
`linear` [X | S] [W | B]', `linear_backward` [dY | dS] [W ; A].

Shapes: T tokens, I input and N output features, R rank. Rows are contiguous, at any distance.

Bytes moved a token, of b bytes an element (b = 2 in bf16), beside operands of rank R:
    shrink            b I              all masks from one read of X; torch: 3 b I a span
    rank_backward     b N + R N / 16   dS and dB from one read of dY; cuBLAS: 2 b N
    a_backward        b I + R I / 64   all masks from one read of X
    input_backward_   2 b I            one pass over dX for all spans; augmented: none
Partial sums are added in a fixed order, without atomics: the same input gives the same bits.

Source: Hu et al., arXiv 2106.09685; cut at the rank as in LoRAFusion (arXiv 2510.00206), without
its fused base product: augmented K costs no pass either, at the speed of cuBLAS.
Reference: `reference.shrink`, `.rank_backward`, `.a_backward`, `.input_backward_`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch
from zephyr_kernels.reference import Dropout, Span
from zephyr_kernels.rows import row_strides

__all__ = [
    "Dropout", "Span", "a_backward", "input_backward_", "linear", "linear_backward",
    "rank_backward", "shrink",
]  # fmt: skip

MAX_BLOCK_R = 128  # ranks of one accumulator; a longer piece is cut, under the same mask
PIECES = 3  # of one launch: q, k and v
SHARED_BYTES = 80 * 1024  # of operand tiles in flight; consumer cards give a program 99 KiB
RANK_BLOCK_N = RANK_CHUNK_T = 256  # of dY to a program of rank_backward
A_CHUNK_T = 512  # rows of X to a program of a_backward


# ---------------------------------------------------------------- public


def linear(
    x_TI: torch.Tensor,
    w_NI: torch.Tensor,
    s_TR: torch.Tensor,
    b_NR: torch.Tensor,
    out_TN: torch.Tensor | None = None,
) -> torch.Tensor:
    """Y = X W' + S B', written to `out_TN` when it is given.

    One product over K = I + R when x and s are neighbouring columns of one buffer and w and b of
    another, in the same order; else a product and an addition to it in place.
    """
    if s_TR.shape[1] == 0:
        return torch.mm(x_TI, w_NI.T, out=out_TN)
    for left, right in (((x_TI, w_NI), (s_TR, b_NR)), ((s_TR, b_NR), (x_TI, w_NI))):
        if _adjoin(left[0], right[0]) and _adjoin(left[1], right[1]):
            return torch.mm(_join(left[0], right[0]), _join(left[1], right[1]).T, out=out_TN)
    return torch.mm(x_TI, w_NI.T, out=out_TN).addmm_(s_TR, b_NR.T)


def linear_backward(
    dy_TN: torch.Tensor,
    w_NI: torch.Tensor,
    ds_TR: torch.Tensor,
    a_RI: torch.Tensor,
    out_TI: torch.Tensor | None = None,
) -> torch.Tensor:
    """dX = dY W + dS A, written to `out_TI` when it is given. No dropout.

    One product over K = N + R when dy and ds are neighbouring columns of one buffer and a lies
    below w in another; else a product and an addition to it in place.
    """
    if ds_TR.shape[1] and _adjoin(dy_TN, ds_TR) and _is_below(w_NI, a_RI):
        rows = w_NI.as_strided((len(w_NI) + len(a_RI), w_NI.shape[1]), w_NI.stride())
        return torch.mm(_join(dy_TN, ds_TR), rows, out=out_TI)
    dx_TI = torch.mm(dy_TN, w_NI, out=out_TI)
    return dx_TI.addmm_(ds_TR, a_RI) if ds_TR.shape[1] else dx_TI


def shrink(x_TI: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span] = ()) -> torch.Tensor:
    """S = X A'; the rows of A in a span see drop(X) in place of X.

    Args:
        x_TI, a_RI: fp64, fp32, bf16 or fp16, of one dtype.
        spans: (start, stop, Dropout) of rows of A, apart from each other.
    Returns: s_TR in x's dtype.
    Raises: ValueError if spans overlap or leave A, or rows are not contiguous.
    """
    if not spans:
        return torch.mm(x_TI, a_RI.T)
    if runs_triton(x_TI):
        return _launch_shrink(x_TI, a_RI, spans)
    return reference.shrink(x_TI, a_RI, spans)


def rank_backward(
    dy_TN: torch.Tensor, s_TR: torch.Tensor, b_NR: torch.Tensor, db: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dS = dY B in dY's dtype and, when `db`, dB = dY' S in fp32 (fp64 for fp64), else None.

    S may be of some of B's columns alone, those that train: dB is then theirs. One read of dY by
    Triton where that moves fewer bytes than cuBLAS' two, which is at small ranks, all of them.
    Raises: ValueError if rows are not contiguous.
    """
    is_whole = db and s_TR.shape[1] == b_NR.shape[1]
    if is_whole and runs_triton(dy_TN) and _one_read_pays(dy_TN, b_NR.shape[1]):
        return _launch_rank_backward(dy_TN, s_TR, b_NR)
    return reference.rank_backward(dy_TN, s_TR, b_NR, db)


def a_backward(ds_TR: torch.Tensor, x_TI: torch.Tensor, spans: Sequence[Span] = ()) -> torch.Tensor:
    """dA = dS' X in fp32 (fp64 for fp64); in a span dS' drop(X), by the forward's mask.

    Args and errors as of `shrink`.
    """
    if spans and runs_triton(x_TI):
        return _launch_a_backward(ds_TR, x_TI, spans)
    return reference.a_backward(ds_TR, x_TI, spans)


def input_backward_(
    dx_TI: torch.Tensor, ds_TR: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span] = ()
) -> None:
    """dX += dS A in place; in a span += mask * (dS A) * scale, by the forward's mask.

    Args and errors as of `shrink`.
    """
    if not spans:
        dx_TI.addmm_(ds_TR, a_RI)
    elif runs_triton(dx_TI):
        _launch_input_backward(dx_TI, ds_TR, a_RI, spans)
    else:
        reference.input_backward_(dx_TI, ds_TR, a_RI, spans)


# ---------------------------------------------------------------- augmented K


def _adjoin(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether the columns of `right` follow those of `left` in the rows of one buffer."""
    end = left.data_ptr() + left.shape[1] * left.element_size()
    return (
        right.data_ptr() == end
        and left.stride() == right.stride()
        and left.stride(1) == 1
        and left.stride(0) >= left.shape[1] + right.shape[1]
        and left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    )


def _is_below(upper: torch.Tensor, lower: torch.Tensor) -> bool:
    """Whether the rows of `lower` follow those of `upper` in one buffer."""
    end = upper.data_ptr() + len(upper) * upper.stride(0) * upper.element_size()
    return (
        lower.data_ptr() == end
        and upper.stride() == lower.stride()
        and upper.stride(1) == 1
        and upper.untyped_storage().data_ptr() == lower.untyped_storage().data_ptr()
    )


def _join(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left.as_strided((len(left), left.shape[1] + right.shape[1]), left.stride())


# ---------------------------------------------------------------- launchers


def _launch_shrink(x_TI: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
    from zephyr_kernels._lora_triton import shrink_kernel

    _check(TI=x_TI, RI=a_RI)
    (tokens, width), rank = x_TI.shape, len(a_RI)
    s_TR = x_TI.new_empty(tokens, rank)
    for pieces, count, block_r in _launches(rank, spans) if tokens else ():
        block_i, warps = _tile(x_TI, block_r)
        launch(
            shrink_kernel, (_blocks(tokens, 32),),
            x_TI, a_RI, s_TR, x_TI.stride(0), a_RI.stride(0), s_TR.stride(0), tokens, *pieces,
            WIDTH=width, PIECES=count, BLOCK_T=32, BLOCK_I=block_i, BLOCK_R=block_r,
            num_warps=warps, num_stages=_stages(x_TI, (32 + count * block_r) * block_i),
        )  # fmt: skip
    return s_TR


def _launch_rank_backward(
    dy_TN: torch.Tensor, s_TR: torch.Tensor, b_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from zephyr_kernels._lora_triton import rank_backward_kernel

    _check(TN=dy_TN, TR=s_TR, NR=b_NR)
    (tokens, width), rank = dy_TN.shape, b_NR.shape[1]
    chunks, strips = _blocks(tokens, RANK_CHUNK_T), _blocks(width, RANK_BLOCK_N)
    ds_STR = torch.empty(strips, tokens, rank, dtype=torch.float32, device=dy_TN.device)
    db_CNR = torch.empty(chunks, width, rank, dtype=torch.float32, device=dy_TN.device)
    if chunks:
        launch(
            rank_backward_kernel, (chunks, strips),
            dy_TN, s_TR, b_NR, ds_STR, db_CNR,
            dy_TN.stride(0), s_TR.stride(0), b_NR.stride(0), tokens,
            WIDTH=width, RANK=rank, CHUNK_T=RANK_CHUNK_T, BLOCK_T=32, BLOCK_N=RANK_BLOCK_N,
            BLOCK_R=_block(rank), num_warps=4, num_stages=_stages(dy_TN, 32 * RANK_BLOCK_N),
        )  # fmt: skip
    return ds_STR.sum(0).to(dy_TN.dtype), db_CNR.sum(0)


def _launch_a_backward(
    ds_TR: torch.Tensor, x_TI: torch.Tensor, spans: Sequence[Span]
) -> torch.Tensor:
    from zephyr_kernels._lora_triton import a_backward_kernel

    _check(TR=ds_TR, TI=x_TI)
    (tokens, width), rank = x_TI.shape, ds_TR.shape[1]
    chunks = _blocks(tokens, A_CHUNK_T)
    da_CRI = torch.empty(chunks, rank, width, dtype=torch.float32, device=x_TI.device)
    for pieces, count, block_r in _launches(rank, spans) if tokens else ():
        block_i, warps = _tile(x_TI, block_r)
        launch(
            a_backward_kernel, (chunks, _blocks(width, block_i)),
            ds_TR, x_TI, da_CRI, ds_TR.stride(0), x_TI.stride(0), rank, tokens, *pieces,
            WIDTH=width, PIECES=count, CHUNK_T=A_CHUNK_T, BLOCK_T=32, BLOCK_I=block_i,
            BLOCK_R=block_r, num_warps=warps,
            num_stages=_stages(x_TI, 32 * (block_i + count * block_r)),
        )  # fmt: skip
    return da_CRI.sum(0)


def _launch_input_backward(
    dx_TI: torch.Tensor, ds_TR: torch.Tensor, a_RI: torch.Tensor, spans: Sequence[Span]
) -> None:
    from zephyr_kernels._lora_triton import input_backward_kernel

    _check(TI=dx_TI, TR=ds_TR, RI=a_RI)
    (tokens, width), rank = dx_TI.shape, len(a_RI)
    for pieces, count, block_r in _launches(rank, spans) if tokens else ():
        block_i, warps = _tile(dx_TI, block_r)
        launch(
            input_backward_kernel, (_blocks(tokens, 32), _blocks(width, block_i)),
            dx_TI, ds_TR, a_RI, dx_TI.stride(0), ds_TR.stride(0), a_RI.stride(0), tokens, *pieces,
            WIDTH=width, PIECES=count, BLOCK_T=32, BLOCK_I=block_i, BLOCK_R=block_r,
            num_warps=warps,
        )  # fmt: skip


def _launches(rank: int, spans: Sequence[Span]) -> Iterator[tuple[list[int], int, int]]:
    """What each launch is told: its pieces, twelve numbers; how many; and BLOCK_R for the longest.

    Each operation's pieces are of one input, and few: more than three cost another read of it.
    """
    cut = [
        (at, min(at + MAX_BLOCK_R, stop), dropout)
        for start, stop, dropout in reference.pieces(rank, spans)
        for at in range(start, stop, MAX_BLOCK_R)
    ]
    for i in range(0, len(cut), PIECES):
        group = cut[i : i + PIECES]
        numbers: list[int] = []
        for start, stop, dropout in group:
            numbers += [start, stop, *_mask_numbers(dropout)]
        numbers += [0] * (4 * (PIECES - len(group)))
        yield numbers, len(group), _block(max(stop - start for start, stop, _ in group))


def _mask_numbers(dropout: Dropout | None) -> tuple[int, int]:
    """The mask's start as an int32, and its threshold; with 0 everything is kept, unscaled."""
    if dropout is None:
        return 0, 0
    return reference.signed(reference.dropout_start(dropout.seed)), dropout.threshold


def _one_read_pays(dy_TN: torch.Tensor, rank: int) -> bool:
    """Whether writing and reading the partial sums moves less than reading dY again.

    In fp32 never: outside the matrix units the products would take longer than the bytes.
    """
    if dy_TN.element_size() != 2 or rank > MAX_BLOCK_R:
        return False
    tokens, width = dy_TN.shape
    partial = _blocks(width, RANK_BLOCK_N) * tokens + _blocks(tokens, RANK_CHUNK_T) * width
    return 8 * rank * partial < 2 * tokens * width


def _check(**matrices: torch.Tensor) -> None:
    """Sizes of one letter are equal, and rows contiguous: a kernel would read past the end."""
    sizes: dict[str, int] = {}
    for letters, x in matrices.items():
        row_strides(x)
        for letter, size in zip(letters, x.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise ValueError(f"{letter} must be {sizes[letter]}, got {letters} {list(x.shape)}")


def _tile(x_TI: torch.Tensor, block_r: int) -> tuple[int, int]:
    """Columns and warps of a program with 32 rows: what three accumulators leave registers for."""
    block_i = 128 if block_r == 16 else 64 if block_r <= 64 else 32
    return block_i if x_TI.element_size() == 2 else 32, 4 if block_r <= 32 else 8


def _block(n: int) -> int:
    """The power of two that covers n; a matrix unit wants 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _stages(x: torch.Tensor, elements: int) -> int:
    """How many steps' operands fit into shared memory at once, of `elements` each."""
    return min(4, max(1, SHARED_BYTES // (elements * x.element_size())))
