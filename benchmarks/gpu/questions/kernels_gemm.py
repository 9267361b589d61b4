"""What do LoRA and dequantisation add to a layer's products, over cuBLAS alone?

`projections.forward` and `.backward` as the layer calls them, 4096 tokens, an adapter on every
linear, against the plain product of the same shape in the same race. FLOPs count the base and the
adapter. The output of `dense` is first held against fp64.

    dense       a base in bf16: what LoRA adds where its share is added to Y in place
    nf4         as recipes train: the weights dequantised, the adapters laid in their border, and
                one product over both where the group's rule says so
    nf4_apart   the same without the border: whether the rule is right

The layer has no room behind o's input, nor behind down's dY: there the rows of `nf4` say what room
would bring. `stack`: laying the adapters' numbers
side by side, which a layer does before its forward and again in its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model

from gpu.bench import Bench, Case
from gpu.model import MISTRAL_7B, TOY, build_linears, compute_dtype
from gpu.rows import Measure, Part
from zephyr_lite.model import projections
from zephyr_lite.model.group import Group
from zephyr_lite.model.projections import Room, room_for
from zephyr_lite.model.stack import Stack
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
    stack = dense.outline(7).stack()
    forward["dense"] = lambda: projections.forward(x, dense, stack)
    backward["dense"] = _backward_call(x, dy, dense, lambda: stack)
    for name in ("nf4", "nf4_apart"):
        group = adapted(bench, sizes, rank, dropout, quantised=True)
        make = _maker(group, with_border=name == "nf4")
        forward[name] = _forward_call(x, group, make)
        backward[name] = _backward_call(x, dy, group, make)
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


def _maker(group: Group, *, with_border: bool) -> Callable[[], Stack]:
    """What a layer does before it multiplies, the weights of another layer lying in the slot."""
    outline = group.outline(7)

    def make() -> Stack:
        group.frozen.slot.holder = None
        return group.stack(outline) if with_border else outline.stack()

    return make


def _with_room(x: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, Room | None]:
    """x as the layer's own operations write it: with room behind its rows where that is used."""
    room = room_for(x.shape, stack, x)
    return (x, None) if room is None else (room.front.copy_(x), room)


def _forward_call(x: torch.Tensor, group: Group, make: Callable[[], Stack]) -> Callable[[], object]:
    rows, room = _with_room(x, make())
    return lambda: projections.forward(rows, group, make(), room=room)


def _backward_call(
    x: torch.Tensor, dy: torch.Tensor, group: Group, make: Callable[[], Stack]
) -> Callable[[], object]:
    stack = make()
    _, s = projections.forward(x, group, stack)
    rows, room = _with_room(dy, stack)

    def run() -> list[torch.Tensor]:
        stack = make()
        behind = None if room is None else room.behind
        returned = projections.backward([rows], s, group, stack, behind_TR=behind)
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
