"""One operation of zephyr_kernels on one set of inputs: ours, plain PyTorch, and the truth in fp64.

A trial's `formula` is the operation written in plain PyTorch: on its inputs it is torch's own path
in that dtype, on the same inputs in fp64 it is the truth. What a kernel writes is filled with NaN
first, in buffers wider than it may write.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gpu.bench import Bench, Check
from gpu.rows import Measure, failed, figure

Outputs = dict[str, torch.Tensor]
SPARE = 3  # columns of NaN behind every output, which must stay NaN
FLOOR = 1e-5  # of `Bench.judge`


@dataclass(frozen=True)
class Trial:
    """ours: runs the kernel on fresh copies. formula: the operation on `inputs`, in their dtype."""

    ours: Callable[[], Outputs]
    formula: Callable[..., Outputs]
    inputs: tuple[torch.Tensor, ...]

    def plain(self) -> Outputs:
        """torch's own path in the dtype of the trial."""
        return self.formula(*self.inputs)

    def truth(self) -> Outputs:
        """The same in fp64, from the same rounded inputs."""
        wide = (x.double() if x.is_floating_point() else x for x in self.inputs)
        return self.formula(*wide)


def examine(bench: Bench, trial: Trial) -> Measure:
    """One row: the output that is nearest to its bound, or beyond it, and all errors beside it."""
    fill_free_memory(bench)
    outputs, truths, plains = trial.ours(), trial.truth(), trial.plain()
    if not outputs.keys() == truths.keys() == plains.keys():
        raise ValueError(f"outputs {list(outputs)}, but the formula gives {list(truths)}")
    checks = {name: bench.judge(outputs[name], truths[name], plains[name]) for name in outputs}
    worst = max(checks, key=lambda name: _excess(checks[name]))
    errors = {name: [_readable(c.error), _readable(_own(c))] for name, c in checks.items()}
    check = checks[worst]
    if check.is_right:
        derived = {"torch_error": _own(check), "bound": check.bound, "passed": True}
        return figure("relative_error", "1", check.error, worst=worst, **derived, errors=errors)
    note = f"{worst}: error {check.error:.3e} > bound {check.bound:.3e}; [ours, torch] {errors}"
    return failed("relative_error", note, status="wrong")


def fill_free_memory(bench: Bench) -> None:
    """Leave NaN in what the allocator hands out next: the unwritten will not look like 0."""
    if bench.on_gpu:
        blocks = [torch.full((1 << 17,), math.nan, device=bench.device) for _ in range(64)]
        blocks.append(torch.full((1 << 26,), math.nan, device=bench.device))
        del blocks


def poisoned(rows: int, width: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `width` columns of a wider buffer of NaN, and the columns behind them."""
    buffer = like.new_full((rows, width + SPARE), math.nan)
    return buffer[:, :width], buffer[:, width:]


def still_poisoned(behind: torch.Tensor) -> None:
    """Raises: RuntimeError if a kernel wrote behind its rows."""
    if not behind.isnan().all():
        raise RuntimeError("the kernel wrote behind the end of its rows")


def _own(check: Check) -> float:
    """torch's own error, from the bound that `Bench.judge` made of it."""
    return (check.bound - FLOOR) / 2


def _excess(check: Check) -> float:
    """How near to its bound an error is; infinite for NaN."""
    ratio = check.error / check.bound
    return math.inf if math.isnan(ratio) else ratio


def _readable(value: float) -> float | str:
    """JSON has no NaN."""
    return float(f"{value:.4g}") if math.isfinite(value) else str(value)
