"""Launching a Triton kernel: what all launches share."""

from __future__ import annotations

from typing import Any


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, **constants: Any
) -> None:
    """Launch `kernel` over `grid` on the current device.

    Multiplications and additions are not fused: the default differs between versions of Triton,
    and NF4 would no longer be bit for bit. These kernels wait for memory, not for arithmetic.
    """
    kernel[grid](*arguments, num_warps=num_warps, enable_fp_fusion=False, **constants)
