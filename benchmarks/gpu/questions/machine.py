"""What can this card do at all? Its two ceilings, the bus, and the facts that bound a plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from gpu.bench import Bench, Case, Check
from gpu.rows import Measure, Part, absent, figure
from rows.provenance import read_smi

PART = Part("machine", 1, "Copy bandwidth, matrix rates, bus rates and facts of this card?")
# One rounding of the result (fp32 sums inside); fp32 itself: the growth of a sum of 8192.
BOUNDS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
SMI = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "power.limit")


def cases(bench: Bench) -> Iterator[Case]:
    """Facts, device copy and fill, products in three dtypes, pinned copies over the bus."""
    yield Case({"name": "facts"}, lambda: _facts(bench))
    yield Case({"name": "copy", "bytes": bench.pick(1 << 30, 1 << 18)}, lambda: _copy(bench))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        size = bench.pick(8192, 64)
        yield Case(
            {"name": "matmul", "dtype": name, "size": size},
            lambda dtype=dtype, size=size: _matmul(bench, dtype, size),
        )
    yield Case({"name": "bus", "bytes": bench.pick(1 << 28, 1 << 16)}, lambda: _bus(bench))


def _facts(bench: Bench) -> Iterator[Measure]:
    if not bench.on_gpu:
        yield absent("memory", "no GPU")
        return
    card = torch.cuda.get_device_properties(bench.device)
    yield figure(
        "memory",
        "bytes",
        card.total_memory,
        multiprocessors=card.multi_processor_count,
        l2_bytes=card.L2_cache_size,
        capability=f"{card.major}.{card.minor}",
    )


def _copy(bench: Bench) -> Iterator[Measure]:
    source = torch.randn(bench.pick(1 << 28, 1 << 16), device=bench.device)
    target = torch.full_like(source, float("nan"))
    timings = bench.race({"copy": lambda: target.copy_(source), "fill": lambda: target.zero_()})
    target.copy_(source)
    if not torch.equal(source, target):
        raise RuntimeError("a device copy does not equal its source")
    yield bench.speed("copy", timings["copy"], moved_bytes=2 * source.nbytes)
    yield bench.speed("fill", timings["fill"], moved_bytes=source.nbytes)


def _matmul(bench: Bench, dtype: torch.dtype, size: int) -> Iterator[Measure]:
    a, b = bench.randn(size, size, dtype=dtype), bench.randn(size, size, dtype=dtype)
    rows = slice(0, 64)
    truth = a[rows].double() @ b.double()
    error = float(((a @ b)[rows].double() - truth).norm() / truth.norm())
    check = Check(error, BOUNDS[dtype])
    yield check.measure()
    if not check.is_right:
        return
    timing = bench.time(lambda: a @ b)
    state = read_smi(*SMI) if bench.on_gpu else None  # straight after the load, before it cools
    clocks: dict[str, Any] = {
        key.replace(".", "_"): value for key, value in zip(SMI, state or [], strict=False)
    }
    yield bench.speed("matmul", timing, flops=2 * size**3, **clocks)


def _bus(bench: Bench) -> Iterator[Measure]:
    if not bench.on_gpu:
        yield absent("host_to_device", "no GPU")
        return
    host = torch.randn(bench.pick(1 << 26, 1 << 14)).pin_memory()
    card = torch.empty_like(host, device=bench.device)
    timings = bench.race(
        {
            "host_to_device": lambda: card.copy_(host, non_blocking=True),
            "device_to_host": lambda: host.copy_(card, non_blocking=True),
        }
    )
    for name, timing in timings.items():
        yield bench.speed(name, timing, moved_bytes=host.nbytes)
