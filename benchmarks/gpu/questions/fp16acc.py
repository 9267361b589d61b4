"""Does fp16 accumulation round to nearest here, and does it pay? (`gemm: fp16acc`)

GeForce cards run fp16 products with fp16 sums at twice the bf16 rate. Whether that is usable
depends on how the unit rounds its sums: to nearest, the error is in the class of bf16's; by
truncation it is 5-16 %. Both are simulated beside the measurement, the sum rounded once every 16
products as the matrix unit does it, for each K that a 7B has. `fp16_fp16_sums` is the bare product
over the whole of K; `product` is the engine's own (zephyr_kernels.fp16acc): rows scaled by powers
of two, K in pieces, the passes for both in its time. Gate, of `product`: error within twice bf16's,
else no speed; 1.35x to be worth it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from zephyr_kernels.fp16acc import fp16_sums, product, scale_rows

from gpu.bench import Bench, Case, Check
from gpu.rows import Measure, Part, absent, figure

PART = Part("fp16acc", 3, "fp16 sums: rounded to nearest, error per K, speed against bf16?")
SHAPES = ((4096, 4096, 4096), (4096, 28672, 4096), (4096, 4096, 14336))  # T, N, K
# Reductions of a 7B: attention's and the feed-forward's inputs, and their outputs backward.
REDUCTIONS = (256, 1024, 4096, 6144, 14336, 28672)
DEPTH = 16  # products that the unit sums before it rounds
SIMULATED = 64  # rows and columns of a simulation


def cases(bench: Bench) -> Iterator[Case]:
    """Errors by K, then three linears of a 7B at 4096 tokens; without and with loud channels."""
    for channels in ("plain", "outliers"):
        for inputs in bench.pick(REDUCTIONS, (256,)):
            shape = {"tokens": 512, "outputs": 512, "inputs": inputs, "channels": channels}
            yield Case({"errors": True, **shape}, lambda s=shape: _errors(bench, s))
    for tokens, outputs, inputs in bench.pick(SHAPES, ((16, 32, 128),)):
        for channels in ("plain", "outliers"):
            shape = {"tokens": tokens, "outputs": outputs, "inputs": inputs, "channels": channels}
            yield Case(shape, lambda s=shape: _measure(bench, s))


def sum_in_fp16(x_TK: torch.Tensor, weight_NK: torch.Tensor, *, truncate: bool) -> torch.Tensor:
    """What a unit gives that keeps its sums in fp16: exact over 16 products, then rounded.

    truncate: towards zero, as some units do, and not to nearest.
    """
    total_TN = torch.zeros(len(x_TK), len(weight_NK), dtype=torch.float16, device=x_TK.device)
    pieces = zip(x_TK.double().split(DEPTH, 1), weight_NK.double().split(DEPTH, 1), strict=True)
    for x_TC, weight_NC in pieces:
        exact_TN = total_TN.double() + x_TC @ weight_NC.T
        total_TN = exact_TN.half()
        if truncate:  # one step down in magnitude is one less in the bits, whatever the sign
            beyond_TN = total_TN.double().abs() > exact_TN.abs()
            total_TN = (total_TN.view(torch.int16) - beyond_TN.short()).view(torch.float16)
    return total_TN


def _with_fp16_sums(x_TK: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    with fp16_sums():
        return x_TK @ weight_NK.T


def _error(out_TN: torch.Tensor, x_TK: torch.Tensor, weight_NK: torch.Tensor) -> float:
    truth = x_TK.double() @ weight_NK.double().T
    return float((out_TN.double() - truth).norm() / truth.norm())


def _bias(bench: Bench, inputs: int) -> Measure:
    """Signed error of all-positive sums: near 0 when rounded to nearest, negative if truncated."""
    x, weight = (bench.randn(64, inputs, dtype=torch.float16).abs() / 8 for _ in range(2))
    truth = x.double() @ weight.double().T
    bias = float(((_with_fp16_sums(x, weight).double() - truth) / truth).mean())
    return figure("bias_of_positive_sums", "%", 100 * bias)


def _missing(bench: Bench) -> Measure | None:
    """Why nothing can be measured here, as a row."""
    if bench.on_gpu:
        return None
    return absent("fp16_fp16_sums", "not measured: a CPU has no such switch; simulated only")


def _operands(bench: Bench, shape: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and weights in bf16."""
    tokens, outputs, inputs = (shape[key] for key in ("tokens", "outputs", "inputs"))
    x_TK = bench.randn(tokens, inputs)
    if shape["channels"] == "outliers":
        x_TK[:, :4] *= 30
    return x_TK, bench.randn(outputs, inputs, std=0.02)


def _errors(bench: Bench, shape: dict[str, Any]) -> Iterator[Measure]:
    """Errors of one K: bf16, fp16 with fp32 sums, both simulations, the engine's, the card's."""
    some = slice(0, SIMULATED)
    x_TK, weight_NK = _operands(bench, shape)
    (x16, _), weight16 = scale_rows(x_TK), weight_NK.half()
    bf16 = _error((x_TK @ weight_NK.T)[some], x_TK[some], weight_NK)
    yield figure("relative_error_bf16", "1", bf16)
    fp16 = _error((x16 @ weight16.T)[some], x16[some], weight16)
    yield figure("relative_error_fp16", "1", fp16, times_bf16=fp16 / bf16)
    for name, truncate in (("nearest", False), ("truncated", True)):
        out = sum_in_fp16(x16[some], weight16[some], truncate=truncate)
        error = _error(out, x16[some], weight16[some])
        yield figure(f"relative_error_simulated_{name}", "1", error, times_bf16=error / bf16)
    error = _error(product(x_TK, weight16.T)[some], x_TK[some], weight_NK)
    yield figure("relative_error_product", "1", error, times_bf16=error / bf16)
    if missing := _missing(bench):
        yield missing
        return
    error = _error(_with_fp16_sums(x16, weight16)[some], x16[some], weight16)
    yield figure("relative_error_fp16_fp16_sums", "1", error, times_bf16=error / bf16)


def _measure(bench: Bench, shape: dict[str, Any]) -> Iterator[Measure]:
    tokens, outputs, inputs = (shape[key] for key in ("tokens", "outputs", "inputs"))
    x_TK, weight_NK = _operands(bench, shape)
    (x16, _), weight16 = scale_rows(x_TK), weight_NK.half()
    rows = slice(0, 64)
    exact = _error((x_TK @ weight_NK.T)[rows], x_TK[rows], weight_NK)
    fp16 = _error((x16 @ weight16.T)[rows], x16[rows], weight16)
    yield figure("relative_error_bf16", "1", exact)
    yield figure("relative_error_fp16", "1", fp16)
    variants = {"bf16": lambda: x_TK @ weight_NK.T, "fp16": lambda: x16 @ weight16.T}
    if missing := _missing(bench):
        yield missing
    else:
        yield _bias(bench, inputs)
        bare = _error(_with_fp16_sums(x16, weight16)[rows], x16[rows], weight16)
        yield figure("relative_error_fp16_fp16_sums", "1", bare, times_bf16=bare / exact)
        check = Check(_error(product(x_TK, weight16.T)[rows], x_TK[rows], weight_NK), 2 * exact)
        if check.is_right:
            yield check.measure("relative_error_product")
            variants["fp16_fp16_sums"] = lambda: _with_fp16_sums(x16, weight16)
            variants["product"] = lambda: product(x_TK, weight16.T)
        else:
            # A card that truncates is an answer (the mode is refused there), not a broken suite.
            reason = f"refused: error {check.error:.3e} > {check.bound:.3e}, twice bf16's"
            yield absent("product", reason)
    timings = bench.race(variants)
    for name, timing in timings.items():
        ratio = timings["bf16"].p50_ms / timing.p50_ms
        flops = 2 * tokens * outputs * inputs
        yield bench.speed(name, timing, flops=flops, times_bf16_speed=ratio)
