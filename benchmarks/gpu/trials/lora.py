"""Trials of the LoRA operations and of NF4; see trial.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from zephyr_kernels import lora, nf4, reference
from zephyr_kernels.lora import Dropout, Span

from gpu.bench import Bench
from gpu.rows import Measure, failed, figure
from gpu.trials.trial import Outputs, Trial, fill_free_memory, poisoned, still_poisoned


def make_spans(rank: int, dropout: bool, rate: float = 0.05) -> tuple[Span, ...]:
    """Three adapters of a stack: the first and the last drop inputs, the middle one is frozen."""
    if not dropout:
        return ()
    third = max(1, rank // 3)
    first, last = Dropout(rate, seed=11), Dropout(0.5, seed=12)
    return (0, third, first), (rank - third, rank, last)


def seen(
    x_TI: torch.Tensor, rank: int, spans: Sequence[Span]
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows of A, what they see of x): x itself, or x under the mask that the seed stands for."""
    for start, stop, dropout in reference.pieces(rank, spans):
        if dropout is None:
            yield slice(start, stop), x_TI
        else:
            rows, width = x_TI.shape
            mask_TI = reference.dropout_mask(dropout.seed, dropout.rate, rows, width, x_TI.device)
            yield slice(start, stop), x_TI * mask_TI * dropout.scale


def shrink(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, rank: int, dropout: bool
) -> Trial:
    """S = drop(X) A'."""
    x, a = bench.randn(tokens, width, dtype=dtype), bench.randn(rank, width, dtype=dtype)
    spans = make_spans(rank, dropout)

    def formula(x: torch.Tensor, a: torch.Tensor) -> Outputs:
        return {"s": torch.cat([part @ a[at].T for at, part in seen(x, rank, spans)], 1)}

    return Trial(lambda: {"s": lora.shrink(x, a, spans)}, formula, (x, a))


def rank_backward(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, rank: int, db: bool
) -> Trial:
    """dS = dY B and dB = dY' S, from rows that are columns of a wider buffer."""
    dy = bench.randn(tokens, width + 5, dtype=dtype)[:, :width]
    s, b = bench.randn(tokens, rank, dtype=dtype), bench.randn(width, rank, dtype=dtype)

    def ours() -> Outputs:
        ds, found = lora.rank_backward(dy, s, b, db)
        return {"ds": ds} | ({} if found is None else {"db": found})

    def formula(dy: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> Outputs:
        return {"ds": dy @ b} | ({"db": dy.T @ s} if db else {})

    return Trial(ours, formula, (dy, s, b))


def a_backward(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, rank: int, dropout: bool
) -> Trial:
    """dA = dS' drop(X)."""
    ds, x = bench.randn(tokens, rank, dtype=dtype), bench.randn(tokens, width, dtype=dtype)
    spans = make_spans(rank, dropout)

    def formula(ds: torch.Tensor, x: torch.Tensor) -> Outputs:
        return {"da": torch.cat([ds[:, at].T @ part for at, part in seen(x, rank, spans)])}

    return Trial(lambda: {"da": lora.a_backward(ds, x, spans)}, formula, (ds, x))


def input_backward(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, rank: int, dropout: bool
) -> Trial:
    """dX += mask (dS A)."""
    dx, ds = (bench.randn(tokens, n, dtype=dtype) for n in (width, rank))
    a = bench.randn(rank, width, dtype=dtype)
    spans = make_spans(rank, dropout)

    def ours() -> Outputs:
        out = dx.clone()
        lora.input_backward_(out, ds, a, spans)
        return {"dx": out}

    def formula(dx: torch.Tensor, ds: torch.Tensor, a: torch.Tensor) -> Outputs:
        out = dx.clone()
        for at, factor in seen(torch.ones_like(dx), rank, spans):
            out += (ds[:, at] @ a[at]) * factor
        return {"dx": out}

    return Trial(ours, formula, (dx, ds, a))


def linear(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, outputs: int, rank: int,
    augmented: bool,
) -> Trial:  # fmt: skip
    """Y = X W' + S B': as one product of neighbouring columns, or as two."""
    x_s = bench.randn(tokens, width + rank, dtype=dtype)
    w_b = bench.randn(outputs, width + rank, std=width**-0.5, dtype=dtype)
    x, w, s, b = x_s[:, :width], w_b[:, :width], x_s[:, width:], w_b[:, width:]
    if not augmented:
        x, w, s, b = (piece.contiguous() for piece in (x, w, s, b))

    def ours() -> Outputs:
        out, behind = poisoned(tokens, outputs, x_s)
        lora.linear(x, w, s, b, out)
        still_poisoned(behind)
        return {"y": out}

    def formula(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> Outputs:
        return {"y": x @ w.T + s @ b.T}

    return Trial(ours, formula, (x, w, s, b))


def linear_backward(
    bench: Bench, dtype: torch.dtype, tokens: int, width: int, outputs: int, rank: int,
    augmented: bool,
) -> Trial:  # fmt: skip
    """dX = dY W + dS A: as one product of neighbouring columns and rows, or as two."""
    dy_ds = bench.randn(tokens, outputs + rank, dtype=dtype)
    w_a = bench.randn(outputs + rank, width + rank, std=outputs**-0.5, dtype=dtype)
    dy, ds = dy_ds[:, :outputs], dy_ds[:, outputs:]
    w, a = w_a[:outputs, :width], w_a[outputs:, :width]
    if not augmented:
        dy, w, ds, a = (piece.contiguous() for piece in (dy, w, ds, a))

    def ours() -> Outputs:
        out, behind = poisoned(tokens, width, dy_ds)
        lora.linear_backward(dy, w, ds, a, out)
        still_poisoned(behind)
        return {"dx": out}

    def formula(dy: torch.Tensor, w: torch.Tensor, ds: torch.Tensor, a: torch.Tensor) -> Outputs:
        return {"dx": dy @ w + ds @ a}

    return Trial(ours, formula, (dy, w, ds, a))


# ---------------------------------------------------------------- nf4


def to_nf4(packed: torch.Tensor, state: Any, shape: tuple[int, int]) -> nf4.Nf4:
    """What bitsandbytes' `quantize_4bit` gave, as the kernel takes it."""
    second = state.state2 if state.nested else None
    return nf4.Nf4(
        packed=packed,
        absmax=state.absmax,
        absmax_code=None if second is None else second.code,
        absmax_scale=None if second is None else second.absmax,
        absmax_offset=0.0 if second is None else float(state.offset),
        levels=state.code,
        shape=shape,
    )


def examine_nf4(bench: Bench, dtype: torch.dtype, rows: int, width: int, nested: bool) -> Measure:
    """One row: values of `dequantise` that are not bit for bit bitsandbytes'; any is wrong."""
    from bitsandbytes import functional

    # As one long row: of others bitsandbytes' CPU path takes the scale of the wrong block.
    flat = bench.randn(1, rows * width, std=0.02, dtype=dtype)
    packed, state = functional.quantize_4bit(
        flat, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    theirs = functional.dequantize_4bit(packed, state).view(rows, width)
    fill_free_memory(bench)
    out, behind = poisoned(rows, width, flat)
    nf4.dequantise(to_nf4(packed, state, (rows, width)), out)
    still_poisoned(behind)
    differing = int((out != theirs).sum())  # NaN differs from everything
    if differing:
        worst = float((out - theirs).abs().nan_to_num(math.inf).max())
        note = f"{differing} of {rows * width} values differ, by {worst:.3e} at most"
        return failed("values_not_bit_exact", note, status="wrong")
    return figure("values_not_bit_exact", "count", 0.0, passed=True, values=rows * width)
