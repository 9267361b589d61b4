"""What every question measures with: a clock, the two ceilings of the machine, a judge of errors.

Speed is never reported on its own: `judge` first compares the output with a truth in higher
precision, by the rule that a candidate may err at most twice as much as the plain low-precision
path does (the rule of flash-attention's and Cut Cross-Entropy's tests).
"""

from __future__ import annotations

import gc
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu.rows import Measure, absent, figure

T = TypeVar("T")
ROUNDS = 5  # variants of one race take turns, so that clocks and heat drift for all of them alike


@dataclass(frozen=True)
class Case:
    """One cell of a part: `shape` identifies it in the rows, `run` measures it."""

    shape: dict[str, Any]
    run: Callable[[], Iterable[Measure]]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: percentiles over n calls, each timed on its own."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    n: int


@dataclass(frozen=True)
class Check:
    """Relative error ||out - truth|| / ||truth|| and the bound that it had to keep."""

    error: float
    bound: float

    @property
    def is_right(self) -> bool:
        """False for NaN too: an unwritten output never passes."""
        return self.error <= self.bound

    def measure(self, metric: str = "relative_error") -> Measure:
        """The row for it: `wrong`, which fails the suite, where the bound is broken."""
        if self.is_right:
            return figure(metric, "1", self.error, bound=self.bound)
        note = f"error {self.error:.3e} > bound {self.bound:.3e}: no speed is reported"
        return Measure(metric, "1", status="wrong", note=note)


@dataclass(frozen=True)
class Finished:
    """A subprocess that ended, or was killed at its limit (`code` is then None)."""

    code: int | None
    seconds: float
    output: str


class Bench:
    """The machine under test. toy: sizes that a CPU core finishes in a second.

    Args: device; toy; deadline (time.monotonic() seconds) after which no new case starts.
    """

    def __init__(self, device: torch.device, *, toy: bool, deadline: float) -> None:
        self.device, self.toy, self.deadline = device, toy, deadline
        self.on_gpu = device.type == "cuda"
        self.target_ms = (20.0 if self.on_gpu else 1.0) if toy else 250.0
        self.min_calls = 2 if toy else 10

    def pick(self, full: T, toy: T) -> T:
        """The size for this run."""
        return toy if self.toy else full

    def seconds_left(self) -> float:
        """Seconds until the deadline; negative after it."""
        return self.deadline - time.monotonic()

    def randn(
        self, *shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16
    ) -> torch.Tensor:
        """Fresh normal values on the device, drawn in fp32 and rounded once."""
        return (torch.randn(*shape, device=self.device) * std).to(dtype)

    def synchronize(self) -> None:
        """Wait for the device. Raises: RuntimeError if an earlier kernel failed."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give cached device memory back, so that one case does not starve the next."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()

    # ---- time

    def race(
        self, variants: Mapping[str, Callable[[], object]], *, cold: bool = False
    ) -> dict[str, Timing]:
        """Time each variant for at least 200 ms, taking turns, by device events.

        cold: overwrite the L2 cache before each call, for memory-bound work on small inputs.
        """
        calls = {name: self._plan_calls(variant, cold) for name, variant in variants.items()}
        samples: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(ROUNDS):
            for name, variant in variants.items():
                samples[name] += self._sample(variant, calls[name], cold)
        return {name: _summarize(times) for name, times in samples.items()}

    def time(self, call: Callable[[], object], *, cold: bool = False) -> Timing:
        """`race` with one runner."""
        return self.race({"": call}, cold=cold)[""]

    def _plan_calls(self, call: Callable[[], object], cold: bool) -> int:
        self._sample(call, 1 if self.toy else 3, cold)  # loads modules, picks algorithms
        warm = _summarize(self._sample(call, 1 if self.toy else 5, cold)).p50_ms
        if not self.toy:
            self._sample(call, _between(1, self.target_ms / 4 / max(warm, 1e-3), 500), cold)
        return _between(self.min_calls, self.target_ms / ROUNDS / max(warm, 1e-3), 2000)

    def _sample(self, call: Callable[[], object], calls: int, cold: bool) -> list[float]:
        if not self.on_gpu:
            return [_wall_ms(call) for _ in range(calls)]
        pairs = []
        for _ in range(calls):
            if cold:
                self._flush_buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        self.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]

    @cached_property
    def _flush_buffer(self) -> torch.Tensor:
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        # Overwriting it must take longer than a launch from Python, or a short kernel's time would
        # be that of waiting for its launch: 0.5 GB are 0.12 ms on an H200, more elsewhere.
        return torch.empty(max(4 * l2_bytes, 512 << 20), dtype=torch.uint8, device=self.device)

    # ---- ceilings

    @cached_property
    def copy_gb_per_s(self) -> float:
        """Device-to-device copy, bytes read plus bytes written, measured in this process."""
        source = torch.randn(self.pick(1 << 28, 1 << 16), device=self.device)
        target = torch.empty_like(source)
        timing = self.time(lambda: target.copy_(source))
        return 2 * source.nbytes / timing.p50_ms / 1e6

    @cached_property
    def matmul_tflops(self) -> float:
        """bf16 product of two random 8192 x 8192 matrices, measured in this process."""
        size = self.pick(8192, 64)
        a, b = self.randn(size, size), self.randn(size, size)
        return 2 * size**3 / self.time(lambda: a @ b).p50_ms / 1e9

    def speed(
        self,
        metric: str,
        timing: Timing,
        *,
        flops: float | None = None,
        moved_bytes: float | None = None,
        **derived: Any,
    ) -> Measure:
        """A timing as a row, with the rates that follow and their share of the ceilings."""
        if flops is not None:
            rate = flops / timing.p50_ms / 1e9
            derived |= {"tflops": rate, "percent_of_matmul": 100 * rate / self.matmul_tflops}
        if moved_bytes is not None:
            rate = moved_bytes / timing.p50_ms / 1e6
            derived |= {"gb_per_s": rate, "percent_of_copy": 100 * rate / self.copy_gb_per_s}
        percentiles = (timing.p20_ms, timing.p50_ms, timing.p80_ms)
        return Measure(metric, "ms", *percentiles, timing.n, derived=derived)

    # ---- memory, errors, optional paths

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """Device bytes that `call` allocates above what stood before; None without statistics."""
        self.release()
        if not self.on_gpu:
            call()
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    @staticmethod
    def judge(out: torch.Tensor, truth: torch.Tensor, plain: torch.Tensor) -> Check:
        """Compare `out` with `truth` (fp64); it may err twice as much as `plain`, the eager path
        in the dtype of the test, plus 1e-5."""
        scale = truth.norm()
        error, eager = ((x.to(truth) - truth).norm() / scale for x in (out, plain))
        return Check(float(error), 2 * float(eager) + 1e-5)

    @staticmethod
    def probe(metric: str, call: Callable[[], T]) -> T | Measure:
        """Try an optional path once: its result, or the row that says why there is none.

        Only what a missing or refusing backend raises is caught; running out of memory, a wrong
        argument or a wrong type is an error of the case.
        """
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except (ImportError, AttributeError, NotImplementedError, RuntimeError) as error:
            return absent(metric, f"{type(error).__name__}: {error}")

    def run_limited(self, command: list[str], *, cwd: Path, **environment: str) -> Finished:
        """Run a command to its end or to this part's deadline; then its process group is killed."""
        start = time.monotonic()
        child = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,
        )
        code: int | None = None
        try:
            output, _ = child.communicate(timeout=max(self.seconds_left(), 1.0))
            code = child.returncode
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
        finally:
            if child.poll() is None:  # we are being stopped ourselves
                os.killpg(child.pid, signal.SIGKILL)
        return Finished(code, time.monotonic() - start, output)


def _wall_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _between(low: int, value: float, high: int) -> int:
    return max(low, min(math.ceil(value), high))


def _summarize(times_ms: list[float]) -> Timing:
    times = torch.tensor(times_ms, dtype=torch.float64)
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = times.quantile(points).tolist()
    return Timing(p20, p50, p80, len(times_ms))
