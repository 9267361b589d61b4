"""Is the memory plan right on a GPU? Two steps of a 7B, planned and measured, as plans/rig.py does.

What is compared is the second step's peak, when optimizer states exist. `allocated` is what torch's
allocator handed out, `reserved` what it took from CUDA for that, and what the card has in use
beyond that is CUDA's context: of this process alone, where nothing else runs on the card. On a CPU
the peak is that of live tensor bytes, what waits in host memory included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from gpu.bench import Bench
from gpu.model import compute_dtype
from gpu.rig import GIB, Shared, card
from gpu.rows import Measure, absent, figure
from plans.cases import Case
from plans.live_bytes import LiveBytes, tensors_in
from plans.rig import Enough, cut_of, memory_of, planned, setting_of, trained
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.plan.ledger import HostParts, Parts
from zephyr_lite.plan.roofline import micro_batch_seconds, step_seconds
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import Work
from zephyr_lite.recipe import Memory

STEPS = 2
OVER, UNDER = 3.0, -2.0  # percent that the plan may be off on a GPU
OVER_ON_CPU = 5.0  # either way


@dataclass(frozen=True)
class Configuration(Case):
    """A case whose micro-batches have a budget of their own, tokens."""

    budget: int = 2048
    gemm: Gemm = "exact"

    @property
    def tokens(self) -> int:
        """See `budget`."""
        return self.budget

    @property
    def shape(self) -> dict[str, Any]:
        """What tells it apart, its rows as their number and tokens."""
        values = asdict(self)
        for name in ("name", "micro", "rows"):
            del values[name]
        return {**values, "rows": len(self.rows), "row_tokens": sum(map(sum, self.rows))}


@dataclass
class Peaks:
    """A listener that measures each step on its own.

    live: counts bytes on a CPU, None on a GPU, where the allocator does. before: bytes that stood
    before the first step.
    """

    bench: Bench
    live: LiveBytes | None
    before: int
    seconds: float = 0.0
    allocated: int = 0
    requested: int = 0
    reserved: int = 0
    outside: int | None = None
    _at: float = 0.0
    _done: int = field(default=0)

    def start(self, label: str, total: int, done: int) -> None:
        """See `Listener`."""
        self._reset()

    def step(self, record: dict[str, Any]) -> None:
        """See `Listener`. Raises: Enough, after the second step."""
        self.bench.synchronize()
        self.seconds = time.perf_counter() - self._at
        if self.live is not None:
            self.allocated = self.requested = self.live.peak
        else:
            stats = torch.cuda.memory_stats(self.bench.device)
            self.allocated = stats["allocated_bytes.all.peak"]
            self.requested = stats["requested_bytes.all.peak"]
            self.reserved = stats["reserved_bytes.all.peak"]
            self.outside = outside_allocator(self.bench)
        self._done += 1
        if self._done == STEPS:
            raise Enough
        self._reset()

    def note(self, text: str) -> None:
        """See `Listener`: nothing is said in two steps without a rehearsal."""

    def end(self) -> None:
        """See `Listener`."""

    def _reset(self) -> None:
        if self.live is not None:
            self.live.reset()
        else:
            torch.cuda.reset_peak_memory_stats(self.bench.device)
        self._at = time.perf_counter()


def outside_allocator(bench: Bench) -> int:
    """Bytes of the card in use beyond what torch's allocator reserves now."""
    free, total = torch.cuda.mem_get_info(bench.device)
    return total - free - torch.cuda.memory_reserved(bench.device)


def measure(shared: Shared, case: Configuration) -> Iterator[Measure]:
    """Rows of one configuration: bytes allocated, reserved and outside, seconds; each planned."""
    bench, geometry = shared.bench, shared.geometry
    works, peaks = _train(shared, case)
    setting = setting_of(case, "cuda" if bench.on_gpu else "cpu")
    setting = replace(setting, gemm=case.gemm)
    workspaces = _cublas_bytes(bench)
    parts, there = planned(case, geometry, setting, works)
    yield _allocated(bench, parts, there, peaks, workspaces)
    yield from _around(bench, parts, peaks)
    yield _seconds(shared, setting, cut_of(case, geometry), works, peaks)
    shared.release()


def _train(shared: Shared, case: Configuration) -> tuple[list[Work], Peaks]:
    """Two steps: micro-batches of the second, and what it took. Nothing of the policy stays."""
    bench, policy = shared.bench, _policy(shared, case)
    if bench.on_gpu:
        peaks = Peaks(bench, None, before=torch.cuda.memory_allocated(bench.device))
        return trained(case, policy, peaks), peaks
    with LiveBytes(tensors_in(policy)) as live:
        peaks = Peaks(bench, live, before=live.now)
        return trained(case, policy, peaks), peaks


def _policy(shared: Shared, case: Configuration) -> Policy:
    """The configuration's, over the base that all share."""
    bench = shared.bench
    adapters = ({"frozen": case.frozen} if case.frozen else {}) | {"trained": case.rank}
    model = shared.adapted(adapters, 0.05 if case.dropout else 0.0)
    memory = Memory.model_validate(memory_of(case, shared.geometry))
    dtype = compute_dtype(bench)
    policy = make_policy(model, dtype, bench.device, memory, gemm=case.gemm, self_test=False)
    policy.use(list(adapters), "trained")
    return policy


def _cublas_bytes(bench: Bench) -> int:
    """What cuBLAS' workspaces take of the allocator: in `allocated`, and in the plan's context."""
    if not bench.on_gpu:
        return 0
    bench.release()
    before = torch.cuda.memory_allocated(bench.device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(bench.device)


def _allocated(
    bench: Bench, parts: Parts, there: HostParts, peaks: Peaks, workspaces: int
) -> Measure:
    """Peak of allocated bytes; wrong where the plan is further off than it may be."""
    total = parts.live if bench.on_gpu else parts.live + there.total
    error = 100 * (total - peaks.allocated) / peaks.allocated
    # The plan has cuBLAS' workspaces under `context`.
    fair = error + 100 * workspaces / peaks.allocated
    over, under = (OVER, UNDER) if bench.on_gpu else (OVER_ON_CPU, -OVER_ON_CPU)
    is_right = under <= fair <= over
    note = f"the plan is {fair:+.2f} % off, and may be {under:+.0f} to {over:+.0f} %"
    value = peaks.allocated / GIB
    derived = {
        "planned_gib": total / GIB,
        "error_percent": error,
        "error_percent_with_workspaces": fair,
        "before_bytes": peaks.before,
        "allocated_bytes": peaks.allocated,
        "requested_bytes": peaks.requested,
        "cublas_workspace_bytes": workspaces,
        "planned_bytes": asdict(parts),
        "host_bytes": asdict(there),
    }
    return Measure(
        "peak_allocated", "GiB", value, value, value, 1,
        status="ok" if is_right else "wrong", note="" if is_right else note, derived=derived,
    )  # fmt: skip


def _around(bench: Bench, parts: Parts, peaks: Peaks) -> Iterator[Measure]:
    """What the allocator takes beyond what it hands out, and CUDA beyond the allocator."""
    if not bench.on_gpu or peaks.outside is None:
        yield absent("peak_reserved", "a CPU keeps no statistics of its allocator")
        yield absent("outside_allocator", "a CPU has no context")
        return
    slack, passing = peaks.reserved - peaks.allocated, parts.activations + parts.workspace
    yield figure(
        "peak_reserved", "GiB", peaks.reserved / GIB, slack_bytes=slack,
        slack_of_passing=slack / passing, passing_bytes=passing, planned_slack_bytes=parts.slack,
    )  # fmt: skip
    outside = peaks.outside
    yield figure("outside_allocator", "GiB", outside / GIB, planned_context_bytes=parts.context)


def _seconds(
    shared: Shared, setting: Setting, cut: Cut, works: list[Work], peaks: Peaks
) -> Measure:
    """Milliseconds of the second step beside what the roofline projects by this card's rates."""
    gpu, geometry = card(shared.bench), shared.geometry
    once = step_seconds(geometry, setting, cut, gpu)
    least = once + sum(micro_batch_seconds(geometry, setting, cut, w, gpu) for w in works)
    tokens = sum(work.tokens for work in works)
    return figure(
        "step", "ms", 1e3 * peaks.seconds, projected_ms=1e3 * least,
        percent_of_projected=100 * least / peaks.seconds,
        tokens_per_second=tokens / peaks.seconds, micro_batches=len(works),
    )  # fmt: skip
