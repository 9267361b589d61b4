"""The start-up probe of `gemm: fp16acc`: on this card, does it pay, and is it as right as bf16?

How a matrix unit rounds its fp16 sums is written nowhere, and cards without the fast rate are many.
So every product with a frozen matrix of one layer, forward and dX, is run at the tokens of a
micro-batch in both arithmetics: the model's own weights, rows with two channels 30 times as loud as
the rest. The mode is refused when

    error of a product against fp64    > 2 times that of the exact one
    time of the exact ones together    < 1.2 times that of its own, scaling of rows included

Dequantisation is in neither time; both need it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from zephyr_lite.errors import MachineError
from zephyr_lite.model.engines import Engine
from zephyr_lite.model.frozen_weights import FrozenWeight, Gemm
from zephyr_lite.model.layer import Layer
from zephyr_lite.model.native import NativeEngine
from zephyr_lite.model.projections import product

TIMES_ERROR, LEAST_GAIN = 2.0, 1.2
JUDGED_ROWS, JUDGED_OUTPUTS = 64, 512
LOUD_CHANNELS, LOUDNESS = (1, -2), 30.0
WARM_UPS, ROUNDS = 3, 10

Race = Callable[[Sequence[Callable[[], object]]], list[float]]


@dataclass(frozen=True)
class Product:
    """One product in both arithmetics: milliseconds, and relative errors against fp64."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    exact_ms: float
    fp16acc_ms: float
    exact_error: float
    fp16acc_error: float

    @property
    def gain(self) -> float:
        """Times as fast as the exact one."""
        return self.exact_ms / self.fp16acc_ms

    @property
    def shape(self) -> str:
        """For people."""
        return f"{self.name}, {self.tokens} x {self.inputs} x {self.outputs}"


def probe(engine: Engine, tokens: int) -> dict[str, Any]:
    """Measure the products of an engine's first layer on its GPU; the figures, for the manifest.

    Args: tokens: of a micro-batch.
    Raises: MachineError, naming product and figures, when the mode is not worth it or not right.
    """
    if not isinstance(engine, NativeEngine):
        raise ValueError(f"engine {engine.name} has no products of its own")
    products = list(measure(engine.layers[0], tokens, race_on_gpu))
    if reason := refusal(products):
        raise MachineError(f"gemm: fp16acc: refused on this GPU: {reason}", hint="set gemm=exact")
    return {"gain": total_gain(products), "products": [asdict(each) for each in products]}


def refusal(products: Sequence[Product]) -> str | None:
    """Why the mode is refused, from what was measured; None where it is not."""
    for each in products:
        if not each.fp16acc_error <= TIMES_ERROR * each.exact_error:
            return (
                f"the relative error of {each.shape}, is {each.fp16acc_error:.2e}, more than "
                f"{TIMES_ERROR:g} times the {each.exact_error:.2e} of the exact product"
            )
    if (gain := total_gain(products)) < LEAST_GAIN:
        least = min(products, key=lambda each: each.gain)
        return (
            f"a layer's products are {gain:.2f} times as fast as exact ones, less than "
            f"{LEAST_GAIN:g}; the slowest is {least.shape}: {least.fp16acc_ms:.3g} ms, "
            f"exact {least.exact_ms:.3g} ms"
        )
    return None


def total_gain(products: Sequence[Product]) -> float:
    """Of all products together."""
    exact, ours = (sum(getattr(p, f"{gemm}_ms") for p in products) for gemm in ("exact", "fp16acc"))
    return exact / ours


def measure(layer: Layer, tokens: int, race: Race) -> Iterator[Product]:
    """Forward and dX of every group of a layer. race: milliseconds of each of some calls."""
    for name, group in zip(("qkv", "o", "gate_up", "down"), layer.groups, strict=True):
        frozen = group.frozen
        outputs, inputs = frozen.shape
        yield _measure(name, frozen, (tokens, inputs, outputs), race, is_forward=True)
        yield _measure(f"{name} dX", frozen, (tokens, outputs, inputs), race, is_forward=False)


def _measure(
    name: str, frozen: FrozenWeight, shape: tuple[int, int, int], race: Race, *, is_forward: bool
) -> Product:
    x_TK = _rows(shape[0], shape[1], frozen.dtype, frozen.device)

    def of(weight_OI: torch.Tensor) -> torch.Tensor:
        return weight_OI.T if is_forward else weight_OI

    def call(gemm: Gemm) -> Callable[[], torch.Tensor]:
        weight_KN = of(frozen.weight(gemm))
        return lambda: product(x_TK, weight_KN, gemm)

    truth_KN = of(frozen.dequantise(torch.empty(frozen.shape, device=frozen.device)))
    some, few = slice(JUDGED_ROWS), slice(JUDGED_OUTPUTS)
    truth_TN = x_TK[some].double() @ truth_KN[:, few].double()
    del truth_KN  # the largest is half a gigabyte
    calls = [call("exact"), call("fp16acc")]
    errors = [
        ((run()[some, few].double() - truth_TN).norm() / truth_TN.norm()).item() for run in calls
    ]
    return Product(name, *shape, *race(calls), *errors)


def _rows(tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Normal values in which some channels are loud, as those of trained models are."""
    generator = torch.Generator(device).manual_seed(0)
    x_TK = torch.randn(tokens, width, generator=generator, device=device)
    x_TK[:, LOUD_CHANNELS] *= LOUDNESS
    return x_TK.to(dtype)


def race_on_gpu(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Median milliseconds of each call, in turns, so that a clock that sinks is shared."""
    found: list[list[float]] = [[] for _ in calls]
    for number in range(WARM_UPS + ROUNDS):
        for run, milliseconds in zip(calls, found, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            if number >= WARM_UPS:
                milliseconds.append(begin.elapsed_time(end))
    return [statistics.median(milliseconds) for milliseconds in found]
