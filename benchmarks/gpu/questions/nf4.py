"""How far from copy bandwidth is bitsandbytes' NF4 dequantisation, with double quantisation?

Checked against the format written out in plain torch: high nibble first, blocks of 64 values, their
absmax in 8 bits with blocks of 256 and an fp32 offset. Bytes counted are the fewest that the format
allows: codes, 8-bit absmax and fp32 scales read once, bf16 written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu.bench import Bench, Case
from gpu.rows import Measure, Part, failed, figure

PART = Part("nf4", 1, "bitsandbytes' NF4 dequantisation: what share of copy bandwidth?")
LINEARS = {  # Mistral-7B: outputs, inputs
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "o": (4096, 4096),
    "gate": (14336, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}
TOY = {"q": (128, 128), "down": (128, 384)}


def cases(bench: Bench) -> Iterator[Case]:
    """Each distinct shape alone, then the seven linears of a layer in one go."""
    linears = bench.pick(LINEARS, TOY)
    for outputs, inputs in dict.fromkeys(linears.values()):
        shape = {"name": "linear", "outputs": outputs, "inputs": inputs}
        yield Case(shape, lambda size=(outputs, inputs): _guarded(bench, [size]))
    yield Case({"name": "layer"}, lambda: _guarded(bench, list(linears.values())))


def ideal_bytes(values: int) -> float:
    """Bytes of one dequantisation: 4-bit codes, absmax/64 in 8 bits, fp32/16384, bf16 out."""
    return values / 2 + values / 64 + 4 * values / (64 * 256) + 2 * values


def dequantize_plainly(codes: torch.Tensor, state: Any) -> torch.Tensor:
    """fp64 values of a bitsandbytes NF4 tensor, from the definition of the format."""
    packed = codes.flatten().to(torch.int64)
    nibbles = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
    absmax = state.state2.code[state.absmax.to(torch.int64)]
    scales = state.state2.absmax.repeat_interleave(state.state2.blocksize)[: len(absmax)]
    absmax = absmax * scales + state.offset  # fp32, as stored
    values = state.code[nibbles].double() * absmax.double().repeat_interleave(state.blocksize)
    return values.reshape(state.shape)


def _guarded(bench: Bench, sizes: list[tuple[int, int]]) -> Iterator[Measure]:
    functional = bench.probe("dequantize_4bit", _import_bitsandbytes)
    if isinstance(functional, Measure):
        yield functional
        return
    yield from _measure(bench, functional, sizes)


def _import_bitsandbytes() -> Any:
    from bitsandbytes import functional

    return functional


def _measure(bench: Bench, functional: Any, sizes: list[tuple[int, int]]) -> Iterator[Measure]:
    weights = [bench.randn(*size, std=0.02) for size in sizes]
    quantized = [
        functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
        for w in weights
    ]
    checks, differing = [], 0
    for codes, state in quantized:
        truth = dequantize_plainly(codes, state)
        out = functional.dequantize_4bit(codes, state)
        rounded = truth.float().bfloat16()
        checks.append(bench.judge(out, truth, rounded))
        differing += int((out != rounded).sum())
        del truth, out, rounded  # fp64 of a wide linear: nine times its bf16
    worst = max(checks, key=lambda check: (not check.is_right, check.error))
    yield worst.measure()
    if not worst.is_right:
        return
    yield figure("values_not_bit_exact", "count", differing)
    moved = sum(ideal_bytes(w.numel()) for w in weights)
    timing = bench.time(
        lambda: [functional.dequantize_4bit(*pair) for pair in quantized], cold=True
    )
    yield bench.speed("dequantize_4bit", timing, moved_bytes=moved)
    yield _into_scratch(bench, functional.dequantize_4bit, quantized, moved)


def _into_scratch(
    bench: Bench, dequantize: Callable[..., torch.Tensor], quantized: list[Any], moved: float
) -> Measure:
    """The same into buffers that stand ready, poisoned first: a trainer's scratch."""
    name = "dequantize_4bit_out"
    outs = [
        torch.full(state.shape, float("nan"), dtype=state.dtype, device=bench.device)
        for _, state in quantized
    ]

    def run() -> None:
        for (codes, state), out in zip(quantized, outs, strict=True):
            dequantize(codes, state, out=out)

    refusal = bench.probe(name, run)
    if isinstance(refusal, Measure):
        return refusal
    for (codes, state), out in zip(quantized, outs, strict=True):
        if not torch.equal(dequantize(codes, state), out):
            return failed(name, "out= differs from the returned tensor", status="wrong")
    return bench.speed(name, bench.time(run, cold=True), moved_bytes=moved)
