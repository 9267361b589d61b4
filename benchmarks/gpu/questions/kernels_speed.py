"""How fast is each kernel at Mistral-7B's sizes, and what share of copy bandwidth is that?

4096 tokens. Bytes are the fewest that the operation must move, as each kernel's module states them;
the copy is timed in the same process, the L2 cache overwritten before each call. Every operation
is first held against fp64 at the size that is timed (attention and the head: at smaller ones).
In-place ones are timed on the same buffers again and again: their values drift, their bytes do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from zephyr_kernels import attention, fp16acc, linear_logprob, lora, nf4, norm, rope, swiglu

from gpu.attention import build_sdpa_flash, pack_documents
from gpu.attention_race import Heads
from gpu.bench import Bench, Case
from gpu.model import MISTRAL_7B, TOY, compute_dtype
from gpu.questions.attention_shared import ULTRAFEEDBACK
from gpu.questions.nf4 import ideal_bytes
from gpu.rows import Measure, Part
from gpu.trials import fp16acc as fp16_ops
from gpu.trials import lora as lora_ops
from gpu.trials import operations as ops
from gpu.trials.attention import (
    Pair,
    attend,
    documents,
    make_heads,
    pairs,
    plan_of,
    poisoned_like,
)
from gpu.trials.lora import make_spans, to_nf4
from gpu.trials.operations import angles
from gpu.trials.trial import Trial, examine
from zephyr_lite.data.layout import Layout
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.work import work_of

PART = Part("kernels_speed", 2, "Each kernel's time and share of copy bandwidth?", by_commit=True)
EPS = 1e-5
SMALL_PAIRS: list[Pair] = [(37, 50, 61), (5, 1, 1), (64, 64, 63)]


def cases(bench: Bench) -> Iterator[Case]:
    """One case per operation."""
    geometry, tokens = bench.pick((MISTRAL_7B, 4096), (TOY, 16))
    size = {"tokens": tokens, "hidden": geometry.hidden}
    for op, measure in MEASURES.items():
        yield Case({"op": op, **size}, lambda m=measure: m(bench, geometry, tokens))
    lengths = [tokens // 2] * 2
    pair_lengths = bench.pick(ULTRAFEEDBACK[:5], [(7, 9, 5), (3, 8, 6)])
    layouts = {"documents": documents(lengths), "pairs": pairs(pair_lengths)}
    for name, layout in layouts.items():
        shape = {"op": "attention", "layout": name, "tokens": layout.n_tokens}
        yield Case(shape, lambda n=name, x=layout: _attention(bench, geometry, n, x))


def _checked(bench: Bench, name: str, trial: Trial) -> Measure:
    row = examine(bench, trial)
    bench.release()
    return Measure(**{**vars(row), "metric": f"{name}_{row.metric}"})


def _race(bench: Bench, runs: dict[str, tuple[Callable[[], object], float]]) -> Iterator[Measure]:
    """Rows of memory-bound variants: name -> (call, bytes)."""
    timings = bench.race({name: call for name, (call, _) in runs.items()}, cold=True)
    for name, timing in timings.items():
        yield bench.speed(name, timing, moved_bytes=runs[name][1], bytes=runs[name][1])


def _norm(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    dtype, width = compute_dtype(bench), g.hidden
    yield _checked(bench, "forward", ops.norm_forward(bench, dtype, tokens, width, True))
    yield _checked(bench, "backward", ops.norm_backward(bench, dtype, tokens, width, True))
    x, delta, dy, out = (bench.randn(tokens, width, dtype=dtype) for _ in range(4))
    gain = torch.ones(width, dtype=dtype, device=bench.device)
    rstd = norm.rms_norm(x, gain, EPS)[1]
    row = x.nbytes
    yield from _race(
        bench,
        {
            "rms_norm": (lambda: norm.rms_norm(x, gain, EPS, out), 2 * row),
            "add_rms_norm_": (lambda: norm.add_rms_norm_(delta, x, gain, EPS, out), 4 * row),
            "rms_norm_backward_": (lambda: norm.rms_norm_backward_(dy, x, gain, rstd), 3 * row),
            "rms_norm_backward_residual": (
                lambda: norm.rms_norm_backward_(dy, x, gain, rstd, delta), 4 * row,
            ),
            "torch_rms_norm": (
                lambda: torch.nn.functional.rms_norm(x, (width,), gain, EPS), 2 * row,
            ),
        },
    )  # fmt: skip


def _rope(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    dtype, heads, width = compute_dtype(bench), g.heads + g.kv_heads, g.hidden // g.heads
    trial = ops.rotation(bench, dtype, tokens, heads, width, False, False)
    yield _checked(bench, "rotate_", trial)
    packed = bench.randn(tokens, heads + g.kv_heads, width, dtype=dtype)
    x, (cos, sin) = packed[:, :heads], angles(bench, tokens, width // 2)
    moved = 2 * tokens * heads * width * x.element_size() + cos.nbytes + sin.nbytes
    yield from _race(
        bench,
        {
            "rotate_": (lambda: rope.rotate_(x, cos, sin), moved),
            "rotate_back": (lambda: rope.rotate_(x, cos, sin, inverse=True), moved),
        },
    )


def _swiglu(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    dtype, width = compute_dtype(bench), g.feed_forward
    yield _checked(bench, "forward", ops.swiglu_forward(bench, dtype, tokens, width))
    yield _checked(bench, "backward", ops.swiglu_backward(bench, dtype, tokens, width))
    gate, up = bench.randn(tokens, 2 * width, dtype=dtype).chunk(2, 1)
    dh, out = (bench.randn(tokens, width, dtype=dtype) for _ in range(2))
    yield from _race(
        bench,
        {
            "swiglu": (lambda: swiglu.swiglu(gate, up, out), 3 * out.nbytes),
            "swiglu_backward_": (lambda: swiglu.swiglu_backward_(dh, gate, up), 6 * out.nbytes),
        },
    )


def _nf4(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    from bitsandbytes import functional

    dtype = compute_dtype(bench)
    sizes = {"gate": g.linears["gate_proj"], "down": g.linears["down_proj"]}
    runs: dict[str, tuple[Callable[[], object], float]] = {}
    layer: list[tuple[nf4.Nf4, torch.Tensor]] = []
    for name, (rows, width) in {**g.linears, **sizes}.items():
        flat = bench.randn(1, rows * width, std=0.02, dtype=dtype)
        packed, state = functional.quantize_4bit(
            flat, blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        weight, out = to_nf4(packed, state, (rows, width)), flat.new_empty(rows, width)
        if name not in sizes:
            layer.append((weight, out))
            continue
        moved = ideal_bytes(rows * width) + (out.element_size() - 2) * rows * width
        runs[name] = (lambda w=weight, o=out: nf4.dequantise(w, o), moved)
        theirs = (packed, state)
        runs[f"bitsandbytes_{name}"] = (lambda t=theirs: functional.dequantize_4bit(*t), moved)
    for rows, width in dict.fromkeys(sizes.values()):
        row = lora_ops.examine_nf4(bench, dtype, rows, width, True)
        yield Measure(**{**vars(row), "metric": f"{rows}x{width}_{row.metric}"})
    moved = sum(ideal_bytes(o.numel()) + (o.element_size() - 2) * o.numel() for _, o in layer)
    runs["layer"] = (lambda: [nf4.dequantise(w, o) for w, o in layer], moved)
    yield from _race(bench, runs)


def _lora(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    """At the feed-forward width, rank 16 and three of 16, with dropout and without (cuBLAS)."""
    for rank in bench.pick((16, 48), (6,)):
        for row in (*_lora_checks(bench, g, tokens, rank), *_lora_race(bench, g, tokens, rank)):
            yield Measure(**{**vars(row), "metric": f"{row.metric}_r{rank}"})


def _lora_checks(bench: Bench, g: Geometry, tokens: int, rank: int) -> Iterator[Measure]:
    size = (compute_dtype(bench), tokens, g.feed_forward, rank)
    builds = (lora_ops.shrink, lora_ops.a_backward, lora_ops.input_backward, lora_ops.rank_backward)
    for build in builds:
        yield _checked(bench, build.__name__, build(bench, *size, True))


def _lora_race(bench: Bench, g: Geometry, tokens: int, rank: int) -> Iterator[Measure]:
    dtype, width = compute_dtype(bench), g.feed_forward
    x, dx = (bench.randn(tokens, width, dtype=dtype) for _ in range(2))
    a, s = (bench.randn(n, m, std=0.02, dtype=dtype) for n, m in ((rank, width), (tokens, rank)))
    b, row = a.T.contiguous(), x.nbytes
    partial = tokens * rank * width / 64
    runs: dict[str, tuple[Callable[[], object], float]] = {}
    for name, spans in (("dropout", make_spans(rank, True)), ("cublas", ())):
        runs |= {
            f"shrink_{name}": (lambda u=spans: lora.shrink(x, a, u), row),
            f"a_backward_{name}": (
                lambda u=spans: lora.a_backward(s, x, u), row + (partial if spans else 0),
            ),
            f"input_backward_{name}": (lambda u=spans: lora.input_backward_(dx, s, a, u), 2 * row),
        }  # fmt: skip
    # One read of dY and its partial sums, or cuBLAS' two reads where those are less.
    moved = min(row + tokens * width * rank / 16, 2 * row)
    runs["rank_backward"] = (lambda: lora.rank_backward(x, s, b, True), moved)
    runs["rank_backward_cublas"] = (lambda: (x @ b, x.T @ s), 2 * row)
    yield from _race(bench, runs)


def _fp16acc(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    """Rows of down_proj's input to fp16; its output back from one piece, in place, and from all."""
    dtype, pieces = compute_dtype(bench), len(fp16acc.pieces_of(g.feed_forward))
    inputs, outputs = g.feed_forward, g.hidden
    yield _checked(bench, "scale_rows", fp16_ops.scale_rows(bench, dtype, tokens, inputs))
    trial = fp16_ops.unscale_rows(bench, dtype, tokens, outputs, pieces)
    yield _checked(bench, "unscale_rows", trial)
    x = bench.randn(tokens, inputs, dtype=dtype)
    sums = bench.randn(pieces, tokens, outputs, dtype=torch.float16)
    undo = torch.ones(tokens, device=bench.device)
    row, out = sums[:1].nbytes, tokens * outputs * dtype.itemsize
    yield from _race(
        bench,
        {
            "scale_rows": (lambda: fp16acc.scale_rows(x), x.nbytes + 2 * x.numel()),
            "unscale_rows": (lambda: fp16acc.unscale_rows(sums[:1], undo, dtype), row + out),
            f"unscale_rows_{pieces}_pieces": (
                lambda: fp16acc.unscale_rows(sums, undo, dtype), sums.nbytes + out,
            ),
        },
    )  # fmt: skip


def _head(bench: Bench, g: Geometry, tokens: int) -> Iterator[Measure]:
    dtype, shape = compute_dtype(bench), (g.hidden, g.vocabulary)
    yield _checked(bench, "log_probs", ops.head(bench, dtype, min(tokens, 512), *shape, None))
    hidden = bench.randn(tokens, g.hidden, dtype=dtype)
    weight = bench.randn(g.vocabulary, g.hidden, std=2.6 * g.hidden**-0.5, dtype=dtype)
    target = torch.randint(g.vocabulary, (tokens,), device=bench.device)
    leaf = hidden.clone().requires_grad_()
    variants: dict[str, Callable[[], object]] = {"one_gemm": lambda: hidden @ weight.T}
    for chunk in bench.pick((256, 1024, 4096), (8,)):
        for name, x in (("reference_pass", hidden), ("training", leaf)):
            variants[f"{name}_chunk_{chunk}"] = lambda x=x, c=chunk: linear_logprob.log_probs(
                x, weight, target, chunk_rows=c
            )
    product = 2 * tokens * g.hidden * g.vocabulary
    for name, timing in bench.race(variants).items():
        yield bench.speed(name, timing, flops=product * (2 if "training" in name else 1))


MEASURES: dict[str, Callable[[Bench, Geometry, int], Iterator[Measure]]] = {
    "norm": _norm, "rope": _rope, "swiglu": _swiglu, "nf4": _nf4, "lora": _lora,
    "fp16acc": _fp16acc, "head": _head,
}  # fmt: skip


def _attention(bench: Bench, g: Geometry, name: str, layout: Layout) -> Iterator[Measure]:
    """Ours as the layer calls it; for documents of one length also torch's batched flash SDPA."""
    dtype, heads = compute_dtype(bench), Heads(g.heads, g.kv_heads, g.hidden // g.heads)
    small = pairs(SMALL_PAIRS) if name == "pairs" else documents([96, 96])
    yield _checked(bench, "attention", attend(bench, dtype, small, False, heads))
    plan, scale = plan_of(bench, layout, False), heads.dimension**-0.5
    q, k, v = make_heads(bench, plan, heads, dtype)
    dout = bench.randn(*q.shape, dtype=dtype)
    grads: Any = poisoned_like((q, k, v))
    out, lse = attention.forward(q, k, v, plan, scale)
    rest = (dout, q, k, v, out, lse, plan, scale, grads)
    variants: dict[str, Callable[[], object]] = {
        "forward": lambda: attention.forward(q, k, v, plan, scale),
        "backward": lambda: attention.backward_(*rest),
    }
    if name == "documents" and bench.on_gpu:
        lengths = layout.q_len_S.tolist()
        sdpa = build_sdpa_flash(pack_documents(lengths, bench.device))
        leaves = tuple(x.detach().contiguous().requires_grad_() for x in (q, k, v))
        result = sdpa(*leaves)
        variants["sdpa_forward"] = lambda: sdpa(*(x.detach() for x in leaves))
        variants["sdpa_backward"] = lambda: torch.autograd.grad(
            result, leaves, dout, retain_graph=True
        )
    flops = 4 * heads.dimension * heads.query * work_of(layout).scores
    for variant, timing in bench.race(variants).items():
        factor = 2.5 if "backward" in variant else 1.0
        yield bench.speed(variant, timing, flops=factor * flops, tokens=layout.n_tokens)
