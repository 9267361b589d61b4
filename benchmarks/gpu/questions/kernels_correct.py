"""Is every kernel right on this device? One row per operation, dtype and shape.

The rule: no output may err more than twice as much as torch's own path in the same dtype, plus 1e-5
(gpu/bench.py); NF4 must be bitsandbytes' bit for bit. Shapes are odd, or cover a limit of a tile;
inputs are strided as the layer has them; whatever is written was NaN before. The last case counts
the failures of this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.attention_race import Heads
from gpu.bench import Bench, Case
from gpu.rows import Measure, Part, failed, figure
from gpu.trials import fp16acc as fp16_ops
from gpu.trials import lora as lora_ops
from gpu.trials import operations as ops
from gpu.trials.attention import attend, documents, pairs
from gpu.trials.lora import examine_nf4
from gpu.trials.trial import Trial, examine

PART = Part("kernels_correct", 2, "Is every kernel right in bf16 and fp16?", by_commit=True)
# One token; odd sizes; a row wider than one tile of its power of two; Mistral's width.
ROWS = ((1, 4096), (63, 96), (1000, 5120), (257, 4096))
TOY_ROWS = ((1, 64), (7, 96))
FEED_FORWARD = ((1, 14336), (63, 1000), (517, 14336))
ROPE = ((63, 40, 128), (1, 40, 64), (517, 9, 96))  # tokens, heads, width
NF4 = ((6, 96), (33, 64), (70, 256), (1024, 4096), (4096, 14336))
TOY_NF4 = ((6, 96), (33, 64))
# T, width, rank; of the last dS and dB are made from one read of dY.
LORA = ((1, 4096, 48), (63, 1000, 24), (517, 4096, 48), (1000, 4096, 384), (4096, 4096, 16))
FP16 = ((1, 4096), (63, 1000), (517, 14336), (300, 28672))  # tokens, width
HEAD = ((1, 4096, 32000), (63, 96, 1003), (517, 4096, 32000))  # rows, width, vocabulary
DOCUMENTS = [37, 1, 130, 63, 255]
PAIRS = [(37, 50, 61), (1, 17, 33), (5, 1, 1), (64, 64, 63), (129, 3, 70), (200, 300, 5)]
HEADS = (Heads(8, 2, 64), Heads(8, 2, 128), Heads(4, 4, 128), Heads(32, 8, 128))

Run = Callable[[torch.dtype], Measure]


def cases(bench: Bench) -> Iterator[Case]:
    """All operations in all dtypes, then the count."""
    started: list[str] = []
    passed: list[str] = []
    half = (torch.bfloat16, torch.float16)
    for dtype in half if bench.on_gpu else (torch.float32,):
        for shape, run in _operations(bench):
            named = {**shape, "dtype": str(dtype).removeprefix("torch.")}

            def measure(run: Run = run, dtype: torch.dtype = dtype, key: str = str(named)):
                started.append(key)
                row = run(dtype)
                passed.extend([key] if row.status == "ok" else [])
                return [row]

            yield Case(named, measure)
    yield Case({"op": "summary"}, lambda: [_summary(started, passed)])


def _summary(started: list[str], passed: list[str]) -> Measure:
    """The failures among the cases of this run; what an earlier run passed is not repeated."""
    failures = [key for key in started if key not in passed]
    if failures:
        return failed("failures", f"{len(failures)}: {'; '.join(failures)}", status="wrong")
    return figure("failures", "cases", 0.0, examined=len(started))


def _operations(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    yield from _rowwise(bench)
    yield from _rope(bench)
    yield from _nf4(bench)
    yield from _lora(bench)
    yield from _fp16acc(bench)
    yield from _head(bench)
    yield from _attention(bench)


def _trial(bench: Bench, build: Callable[..., Trial], *shape: Any) -> Run:
    return lambda dtype: examine(bench, build(bench, dtype, *shape))


def _rowwise(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for tokens, width in bench.pick(ROWS, TOY_ROWS):
        size = {"tokens": tokens, "width": width}
        for add in (False, True):
            op = "add_rms_norm_" if add else "rms_norm"
            yield {"op": op, **size}, _trial(bench, ops.norm_forward, tokens, width, add)
        for residual in (False, True):
            shape = {"op": "rms_norm_backward_", **size, "residual": residual}
            yield shape, _trial(bench, ops.norm_backward, tokens, width, residual)
    for tokens, width in bench.pick(FEED_FORWARD, TOY_ROWS):
        size = {"tokens": tokens, "width": width}
        yield {"op": "swiglu", **size}, _trial(bench, ops.swiglu_forward, tokens, width)
        yield {"op": "swiglu_backward_", **size}, _trial(bench, ops.swiglu_backward, tokens, width)


def _rope(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for tokens, heads, width in bench.pick(ROPE, ((7, 3, 64), (1, 9, 32))):
        for interleaved in (False, True):
            for inverse in (False, True):
                shape = {"op": "rotate_", "tokens": tokens, "heads": heads, "width": width}
                shape |= {"interleaved": interleaved, "inverse": inverse}
                arguments = (tokens, heads, width, interleaved, inverse)
                yield shape, _trial(bench, ops.rotation, *arguments)


def _nf4(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for rows, width in bench.pick(NF4, TOY_NF4):
        for nested in (False, True):
            shape = {"op": "nf4", "rows": rows, "width": width, "nested": nested}
            yield (
                shape,
                lambda dtype, s=(rows, width, nested): examine_nf4(bench, dtype, *s),
            )


def _lora(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for tokens, width, rank in bench.pick(LORA, ((7, 40, 6), (33, 64, 48))):
        size = {"tokens": tokens, "width": width, "rank": rank}
        for dropout in (False, True):
            for name in ("shrink", "a_backward", "input_backward"):
                shape = {"op": name, **size, "dropout": dropout}
                yield shape, _trial(bench, getattr(lora_ops, name), tokens, width, rank, dropout)
        for db in (False, True):
            shape = {"op": "rank_backward", **size, "db": db}
            yield shape, _trial(bench, lora_ops.rank_backward, tokens, width, rank, db)
        for augmented in (False, True):
            shape = {"op": "linear", **size, "augmented": augmented}
            arguments = (tokens, width, width // 2, rank, augmented)
            yield shape, _trial(bench, lora_ops.linear, *arguments)
            shape = {"op": "linear_backward", **size, "augmented": augmented}
            yield shape, _trial(bench, lora_ops.linear_backward, *arguments)


def _fp16acc(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for tokens, width in bench.pick(FP16, TOY_ROWS):
        size = {"tokens": tokens, "width": width}
        yield {"op": "scale_rows", **size}, _trial(bench, fp16_ops.scale_rows, tokens, width)
        for pieces in (1, 2, 7):
            shape = {"op": "unscale_rows", **size, "pieces": pieces}
            yield shape, _trial(bench, fp16_ops.unscale_rows, tokens, width, pieces)


def _head(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    for rows, width, vocabulary in bench.pick(HEAD, ((1, 32, 100), (9, 32, 203))):
        for softcap in (None, 5.0):
            shape = {"op": "log_probs", "rows": rows, "width": width, "vocabulary": vocabulary}
            arguments = (rows, width, vocabulary, softcap)
            yield {**shape, "softcap": softcap}, _trial(bench, ops.head, *arguments)


def _attention(bench: Bench) -> Iterator[tuple[dict[str, Any], Run]]:
    layouts = {
        "documents": (documents(DOCUMENTS), False),
        "one_document": (documents([333]), False),
        "shared_prompts": (pairs(PAIRS), False),
        "last_of_documents": (documents(DOCUMENTS, answers_only=True), True),
        "last_of_pairs": (pairs(PAIRS), True),
    }
    toy = {
        "shared_prompts": (pairs(PAIRS[1:3]), False),
        "last_of_pairs": (pairs(PAIRS[:2]), True),
        "last_of_documents": (documents([9, 1, 22], answers_only=True), True),
    }
    for name, (layout, trimmed) in bench.pick(layouts, toy).items():
        for heads in bench.pick(HEADS, HEADS[:1]):
            shape = {"op": "attention", "layout": name, "tokens": layout.n_tokens}
            shape |= {"heads": heads.query, "kv_heads": heads.key_value, "width": heads.dimension}
            yield shape, _trial(bench, attend, layout, trimmed, heads)
