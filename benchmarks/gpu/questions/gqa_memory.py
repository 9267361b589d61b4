"""How much memory does a flash backward take above its inputs with grouped heads, per token?

FA2's backward computes dK and dV for all query heads and sums them afterwards; the plan must know
those bytes. Peak of the allocator during one call, above the inputs that stood before it. Nothing
is hidden by reuse: the cache is emptied first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gpu.attention import BACKENDS, Attend, Layout, pack_documents
from gpu.attention_race import MISTRAL, TOY, Tensors, check_backend, draw_inputs, forward_backward
from gpu.bench import Bench, Case
from gpu.rows import Measure, Part, absent, figure

PART = Part("gqa_memory", 1, "Flash backward with 8 of 32 heads: temporaries in bytes per token?")
NAMES = ("varlen", "varlen_expanded", "sdpa_segments", "flex")


def cases(bench: Bench) -> Iterator[Case]:
    """Two row lengths, to tell what grows with tokens from what does not."""
    for lengths in bench.pick([[2048] * 2, [2048] * 4], [[16, 16]]):
        for name in NAMES:
            shape = {"backend": name, "documents": lengths}
            yield Case(shape, lambda s=shape: _measure(bench, s["backend"], s["documents"]))


def _measure(bench: Bench, name: str, lengths: list[int]) -> Iterator[Measure]:
    heads = bench.pick(MISTRAL, TOY)
    rows = list(check_backend(bench, name, pack_documents([37, 1, 130], bench.device), heads))
    yield from rows
    if any(row.status != "ok" for row in rows):
        return
    layout = pack_documents(lengths, bench.device)
    inputs = draw_inputs(bench, layout, heads)
    attend = BACKENDS[name](layout)
    forward_backward(attend, inputs)  # compilation and workspaces are not what is asked for
    yield from _peaks(bench, attend, layout, inputs)


def _peaks(bench: Bench, attend: Attend, layout: Layout, inputs: Tensors) -> Iterator[Measure]:
    results = sum(x.numel() * x.element_size() for x in inputs)  # out and the three gradients

    def forward() -> torch.Tensor:
        return attend(*inputs[:3])

    for metric, call, kept in (
        ("forward_peak", forward, inputs[0].nbytes),
        ("both_peak", lambda: forward_backward(attend, inputs), results),
    ):
        peak = bench.peak_bytes(call)
        if peak is None:
            yield absent(metric, "no allocator statistics on a CPU")
            continue
        beyond = (peak - kept) / layout.tokens
        yield figure(
            metric,
            "bytes",
            peak,
            bytes_per_token=peak / layout.tokens,
            bytes_per_token_beyond_results=beyond,
        )
