"""Check, then time, every attention backend on a layout: what both attention questions run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from gpu.attention import BACKENDS, Attend, Layout, attend_plainly
from gpu.bench import Bench
from gpu.rows import Measure

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Heads:
    """Query heads, key/value heads, head dimension."""

    query: int
    key_value: int
    dimension: int


MISTRAL = Heads(32, 8, 128)
TOY = Heads(4, 2, 32)


def draw_inputs(bench: Bench, layout: Layout, heads: Heads) -> Tensors:
    """Random bf16 q [T, H, K], k and v [T, J, K] that want gradients, and an upstream gradient."""
    tokens, size = layout.tokens, heads.dimension
    q = bench.randn(tokens, heads.query, size).requires_grad_()
    k, v = (bench.randn(tokens, heads.key_value, size).requires_grad_() for _ in range(2))
    return q, k, v, bench.randn(tokens, heads.query, size)


def forward_backward(attend: Attend, inputs: Tensors) -> Tensors:
    """(out, dq, dk, dv) of one attention call."""
    q, k, v, upstream = inputs
    out = attend(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), upstream))


def check_backend(bench: Bench, name: str, layout: Layout, heads: Heads) -> Iterator[Measure]:
    """Rows of the errors of out, dq, dk and dv on a small layout; or the one saying why not."""
    inputs = draw_inputs(bench, layout, heads)
    results = bench.probe(name, lambda: forward_backward(BACKENDS[name](layout), inputs))
    if isinstance(results, Measure):
        yield results
        return
    precise = tuple(x.detach().double().requires_grad_() for x in inputs)
    truths = forward_backward(lambda q, k, v: attend_plainly(q, k, v, layout), precise)
    plains = forward_backward(lambda q, k, v: attend_plainly(q, k, v, layout), inputs)
    for part, result, truth, plain in zip(
        ("out", "dq", "dk", "dv"), results, truths, plains, strict=True
    ):
        yield bench.judge(result, truth, plain).measure(f"{name}_{part}_relative_error")


def race_backends(
    bench: Bench, small: Layout, layouts: dict[str, Layout], heads: Heads
) -> Iterator[Measure]:
    """Time forward and forward + backward of all backends that proved right on `small`.

    layouts: prefix of the metric -> layout. FLOPs: 4 K per unmasked score and head forward, 2.5
    times that backward (five products where the forward has two).
    """
    right = []
    for name in BACKENDS:
        rows = list(check_backend(bench, name, small, heads))
        yield from rows
        if all(row.status == "ok" for row in rows):
            right.append(name)
    for prefix, layout in layouts.items():
        yield from _race_layout(bench, right, prefix, layout, heads)


def _race_layout(
    bench: Bench, names: list[str], prefix: str, layout: Layout, heads: Heads
) -> Iterator[Measure]:
    inputs = draw_inputs(bench, layout, heads)
    forward: dict[str, Callable[[], object]] = {}
    both: dict[str, Callable[[], object]] = {}
    for name in names:
        # Some refuse a layout (unequal segments) or a size that the small check did not have.
        attend = bench.probe(f"{prefix}{name}", lambda name=name: _prepare(name, layout, inputs))
        if isinstance(attend, Measure):
            yield attend
            continue
        forward[name] = lambda attend=attend: _without_gradient(attend, inputs)
        both[name] = lambda attend=attend: forward_backward(attend, inputs)
    flops = 4 * heads.dimension * heads.query * layout.scores
    for suffix, variants, factor in (("forward", forward, 1.0), ("both", both, 3.5)):
        for name, timing in bench.race(variants).items():
            metric = f"{prefix}{name}_{suffix}"
            yield bench.speed(metric, timing, flops=factor * flops, tokens=layout.tokens)


def _prepare(name: str, layout: Layout, inputs: Tensors) -> Attend:
    attend = BACKENDS[name](layout)
    forward_backward(attend, inputs)
    return attend


@torch.no_grad()
def _without_gradient(attend: Attend, inputs: Tensors) -> torch.Tensor:
    return attend(*inputs[:3])
