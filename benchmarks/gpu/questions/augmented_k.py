"""Is a LoRA term for free if it is laid out as more columns of the same product?

    forward   Y  = [X | S] [[W, B]]'        against  Y = X W';  Y += S B'
    backward  dX = [dY | dS] [[W], [A]]     against  dX = dY W; dX += dS A

One GEMM over K + R columns instead of a GEMM and a second pass over Y (kernels/README.md). The
price is a row stride of K + R: `strided` times the plain product inside the wider buffers.
S = X A', and dS = dY B, are computed in either design and so are left out. LoRA's scale sits in B.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gpu.bench import Bench, Case, Check
from gpu.rows import Measure, Part

PART = Part("augmented_k", 1, "Does cuBLAS run K + R columns, row stride K + R, as fast as K?")
LINEARS = {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}  # N, K
COLUMNS = (64, 128)  # r = 16 for three stacked adapters, padded; r = 128
TOKENS = (2048, 4096, 8192)
CHECKED_ROWS = 64


@dataclass(frozen=True)
class Operands:
    """X | S and dY | dS side by side as a fused producer writes them; W, B, A in one scratch.

    x_TC: [T, K + R]; dy_TC: [T, N + R]; scratch_CC: [N + R, K + R] = [[W, B], [A, 0]]; all bf16.
    """

    x_TC: torch.Tensor
    dy_TC: torch.Tensor
    scratch_CC: torch.Tensor
    outputs: int
    inputs: int


def cases(bench: Bench) -> Iterator[Case]:
    """Three linears, three micro-batch sizes, two widths of the border."""
    linears = bench.pick(LINEARS, {"qkv": (48, 32)})
    for name, (outputs, inputs) in linears.items():
        for tokens in bench.pick(TOKENS, (16,)):
            for columns in bench.pick(COLUMNS, (8,)):
                shape = {"linear": name, "tokens": tokens, "outputs": outputs, "inputs": inputs}
                shape |= {"columns": columns}
                yield Case(shape, lambda s=shape: _measure(bench, s))


def make_operands(bench: Bench, tokens: int, outputs: int, inputs: int, columns: int) -> Operands:
    """Random operands with a LoRA term about as loud as a trained adapter's (1 % of Y)."""
    x_TC = bench.randn(tokens, inputs + columns)
    dy_TC = bench.randn(tokens, outputs + columns)
    scratch_CC = bench.randn(outputs + columns, inputs + columns, std=inputs**-0.5)
    scratch_CC[:outputs, inputs:] *= 0.05
    scratch_CC[outputs:, :inputs] *= 0.05
    scratch_CC[outputs:, inputs:] = 0
    return Operands(x_TC, dy_TC, scratch_CC, outputs, inputs)


def forward_variants(o: Operands) -> dict[str, Callable[[], torch.Tensor]]:
    """plain (no adapter) | strided (no adapter, wide rows) | addmm (two passes) | augmented."""
    n, k = o.outputs, o.inputs
    x_TK, s_TR = o.x_TC[:, :k].contiguous(), o.x_TC[:, k:].contiguous()
    weight_NK, b_NR = o.scratch_CC[:n, :k].contiguous(), o.scratch_CC[:n, k:].contiguous()
    return {
        "plain": lambda: x_TK @ weight_NK.T,
        "strided": lambda: o.x_TC[:, :k] @ o.scratch_CC[:n, :k].T,
        "addmm": lambda: (x_TK @ weight_NK.T).addmm_(s_TR, b_NR.T),
        "augmented": lambda: o.x_TC @ o.scratch_CC[:n].T,
    }


def backward_variants(o: Operands) -> dict[str, Callable[[], torch.Tensor]]:
    """The same four for dX, whose reduction runs over the N + R rows of the scratch."""
    n, k = o.outputs, o.inputs
    dy_TN, ds_TR = o.dy_TC[:, :n].contiguous(), o.dy_TC[:, n:].contiguous()
    weight_NK, a_RK = o.scratch_CC[:n, :k].contiguous(), o.scratch_CC[n:, :k].contiguous()
    return {
        "plain": lambda: dy_TN @ weight_NK,
        "strided": lambda: o.dy_TC[:, :n] @ o.scratch_CC[:n, :k],
        "addmm": lambda: (dy_TN @ weight_NK).addmm_(ds_TR, a_RK),
        "augmented": lambda: o.dy_TC @ o.scratch_CC[:, :k],
    }


def _measure(bench: Bench, shape: dict[str, int]) -> Iterator[Measure]:
    tokens, n, k, r = (shape[key] for key in ("tokens", "outputs", "inputs", "columns"))
    o = make_operands(bench, tokens, n, k, r)
    rows = slice(0, CHECKED_ROWS)
    forward_truth = o.x_TC[rows].double() @ o.scratch_CC[:n].double().T
    backward_truth = o.dy_TC[rows].double() @ o.scratch_CC[:, :k].double()
    flops = {"plain": 2 * tokens * n * k, "strided": 2 * tokens * n * k}
    flops |= {"addmm": 2 * tokens * n * (k + r), "augmented": 2 * tokens * n * (k + r)}
    backward_flops = {**flops, "addmm": 2 * tokens * k * (n + r)}
    backward_flops["augmented"] = backward_flops["addmm"]
    yield from _race(bench, "forward", forward_variants(o), forward_truth, flops)
    yield from _race(bench, "backward", backward_variants(o), backward_truth, backward_flops)


def _race(
    bench: Bench,
    direction: str,
    variants: dict[str, Callable[[], torch.Tensor]],
    truth: torch.Tensor,
    flops: dict[str, int],
) -> Iterator[Measure]:
    rows = slice(0, len(truth))
    augmented = variants["augmented"]()[rows]
    check: Check = bench.judge(augmented, truth, variants["addmm"]()[rows])
    yield check.measure(f"{direction}_relative_error")
    if not check.is_right:
        return
    timings = bench.race(variants)
    for name, timing in timings.items():
        against = {
            "times_plain_ms": timing.p50_ms / timings["plain"].p50_ms,
            "times_addmm_ms": timing.p50_ms / timings["addmm"].p50_ms,
        }
        yield bench.speed(f"{direction}_{name}", timing, flops=flops[name], **against)
