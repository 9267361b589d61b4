"""Trials of the passes around a product with fp16 sums; see trial.py.

The product itself is cuBLAS': gpu/questions/fp16acc.py asks how a card rounds its sums.
"""

from __future__ import annotations

import torch
from zephyr_kernels import fp16acc

from gpu.bench import Bench
from gpu.trials.trial import Outputs, Trial

LOUD, TIMES = 4, 30  # channels of a row that are so many times as loud as the others
SIZES = 7  # rows differ by powers of two up to this one: none leaves fp16


def scale_rows(bench: Bench, dtype: torch.dtype, tokens: int, width: int) -> Trial:
    """Rows in fp16, each by a power of two; from rows that are columns of a wider buffer."""
    x = bench.randn(tokens, width + 5, dtype=dtype)[:, :width]
    x *= _powers(bench, tokens).to(dtype)[:, None]
    x[:, :LOUD] *= TIMES

    def ours() -> Outputs:
        x16, undo = fp16acc.scale_rows(x)
        return {"x16": x16, "undo": undo}

    def formula(x: torch.Tensor) -> Outputs:
        precise = x if x.dtype == torch.float64 else x.float()
        # frexp: a magnitude is in [1/2, 1) times its power, and is to be in [4, 8).
        undo = (torch.frexp(precise.abs().amax(1)).exponent - 3).double().exp2()
        scaled = precise / undo.to(precise.dtype)[:, None]
        return {"x16": scaled if x.dtype == torch.float64 else scaled.half(), "undo": undo}

    return Trial(ours, formula, (x,))


def unscale_rows(bench: Bench, dtype: torch.dtype, tokens: int, width: int, pieces: int) -> Trial:
    """The sum of the pieces, each row by its power of two; in place where there is one piece."""
    sums = bench.randn(pieces, tokens, width, std=8.0, dtype=torch.float16)
    undo = _powers(bench, tokens)

    def ours() -> Outputs:
        return {"y": fp16acc.unscale_rows(sums.clone(), undo, dtype)}

    def formula(sums: torch.Tensor, undo: torch.Tensor) -> Outputs:
        if sums.dtype == torch.float64:
            return {"y": sums.sum(0) * undo[:, None]}
        return {"y": (sums.sum(0, dtype=torch.float32) * undo[:, None]).to(dtype)}

    return Trial(ours, formula, (sums, undo))


def _powers(bench: Bench, count: int) -> torch.Tensor:
    """Powers of two in fp32, of 2^-7 to 2^7."""
    return torch.randint(-SIZES, SIZES + 1, (count,), device=bench.device).float().exp2()
