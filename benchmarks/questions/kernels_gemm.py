"""What do LoRA and dequantisation add to a layer's products, over cuBLAS alone?

`projections.forward` and `.backward` as the layer calls them, 4096 tokens, an adapter on every
linear, against the plain product of the same shape in the same race. `dense`: a base in bf16, so
the LoRA path alone; `nf4`: with the dequantisation that each use of the weight pays. FLOPs count
the base and the adapter. The output of `dense` is first held against fp64. `stack`: laying the
adapters' numbers side by side, which a layer does before its forward and again in its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_bench import Bench, Case
from gpu_model import MISTRAL_7B, TOY, build_linears, compute_dtype
from gpu_rows import Measure, Part
from peft import LoraConfig, inject_adapter_in_model

from zephyr_lite.model import projections
from zephyr_lite.model.projections import Group, Stack
from zephyr_lite.plan.geometry import GROUPS

PART = Part("kernels_gemm", 2, "LoRA and NF4 on top of cuBLAS: time over it?", by_commit=True)
CHECKED_ROWS = 256


def cases(bench: Bench) -> Iterator[Case]:
    """Four groups, two ranks; dropout at the rank that SFT trains with."""
    geometry, tokens = bench.pick((MISTRAL_7B, 4096), (TOY, 16))
    for name, members in GROUPS.items():
        sizes = {member: geometry.linears[member] for member in members}
        for rank, dropout in bench.pick(((16, 0.0), (16, 0.05), (128, 0.0)), ((4, 0.05),)):
            shape = {"group": name, "tokens": tokens, "rank": rank, "dropout": dropout}
            shape["gemm"] = "exact"
            yield Case(
                shape,
                lambda s=sizes, r=rank, d=dropout, t=tokens: _measure(bench, s, t, r, d),
            )


def adapted(
    bench: Bench, sizes: dict[str, tuple[int, int]], rank: int, dropout: float, *, quantised: bool
) -> Group:
    """A group of PEFT's own LoRA layers, whose B is not 0."""
    module = build_linears(bench, sizes, quantised=quantised)
    config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=dropout, target_modules=list(sizes))
    layers: Any = inject_adapter_in_model(config, module)
    for name, parameter in layers.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            if ".lora_B." in name:
                parameter.data.normal_(std=0.02)
    return Group([getattr(layers, name) for name in sizes], compute_dtype(bench))


def _measure(
    bench: Bench, sizes: dict[str, tuple[int, int]], tokens: int, rank: int, dropout: float
) -> Iterator[Measure]:
    dtype = compute_dtype(bench)
    outputs, inputs = sum(n for n, _ in sizes.values()), next(iter(sizes.values()))[1]
    x = bench.randn(tokens, inputs, dtype=dtype)
    dy = bench.randn(tokens, outputs, dtype=dtype)
    dense = adapted(bench, sizes, rank, dropout, quantised=False)
    weight = dense.frozen.weight()
    yield _check(bench, dense, x, weight)
    forward: dict[str, Callable[[], object]] = {"cublas": lambda: x @ weight.T}
    backward: dict[str, Callable[[], object]] = {"cublas": lambda: dy @ weight}
    nf4 = adapted(bench, sizes, rank, dropout, quantised=True)
    for name, group in (("dense", dense), ("nf4", nf4)):
        stack = group.outline(7).stack()
        forward[name] = lambda g=group, s=stack: projections.forward(x, g, s)
        backward[name] = _backward_call(x, dy, group, stack)
    base = 2 * tokens * outputs * inputs
    adapter = sum(2 * tokens * rank * (n + k) for n, k in sizes.values())
    for direction, variants, extra in (
        ("forward", forward, adapter),
        ("backward", backward, 2 * adapter),  # dS and dX's share; dB and dA
    ):
        timings = bench.race(variants)
        for name, timing in timings.items():
            flops = base + (0 if name == "cublas" else extra)
            ratio = timing.p50_ms / timings["cublas"].p50_ms
            metric = f"{direction}_{name}"
            yield bench.speed(metric, timing, flops=flops, times_cublas_ms=ratio)
    weights = sum(rank * (n + k) for n, k in sizes.values())
    moved = (4 + dtype.itemsize) * weights
    outline = dense.outline(7)
    yield bench.speed("stack", bench.time(outline.stack, cold=True), moved_bytes=moved)


def _backward_call(
    x: torch.Tensor, dy: torch.Tensor, group: Group, stack: Stack
) -> Callable[[], object]:
    _, s = projections.forward(x, group, stack)

    def run() -> list[torch.Tensor]:
        returned = projections.backward([dy], s, group, stack)
        return projections.adapter_gradients(returned, x, stack)

    return run


def _check(bench: Bench, group: Group, x: torch.Tensor, weight: torch.Tensor) -> Measure:
    """Y without dropout, of some rows, against fp64 and against the products in the dtype."""
    rows = x[:CHECKED_ROWS]
    stack = group.outline(None).stack()
    (out,), _ = projections.forward(rows, group, stack)

    def formula(dtype: torch.dtype) -> torch.Tensor:
        y = rows.to(dtype) @ weight.to(dtype).T
        for lora in stack.loras:
            s = rows.to(dtype) @ stack.a_RI[lora.ranks].to(dtype).T
            y[:, lora.outputs] += s @ lora.b_OR.to(dtype).T
        return y

    check = bench.judge(out, formula(torch.float64), formula(x.dtype))
    return check.measure("forward_relative_error")
