"""Which implementation runs: the Triton kernels, or the plain-PyTorch reference.

Triton runs on a GPU; everything else computes by the reference, which is exact and complete. The
choice is made per call from the tensor's device. `use` overrides it for the whole process, and not
for a context, because autograd runs the backward of a GPU in a thread of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch

Choice = Literal["auto", "triton", "torch"]

HAS_TRITON = find_spec("triton") is not None
_choice: Choice = "auto"


def runs_triton(x: torch.Tensor) -> bool:
    """Whether operations on `x` launch Triton kernels; never in fp64, which is for tests."""
    if x.dtype == torch.float64:
        return False
    if _choice == "auto":
        return HAS_TRITON and x.is_cuda
    return _choice == "triton"


def use(choice: Choice) -> Choice:
    """Choose for the whole process; returns what was chosen before.

    `triton` on CPU tensors works under TRITON_INTERPRET=1 only, set before this package's import.
    """
    global _choice
    before, _choice = _choice, choice
    return before


@contextmanager
def using(choice: Choice) -> Iterator[None]:
    """Choose for a block, whichever thread computes in it."""
    before = use(choice)
    try:
        yield
    finally:
        use(before)
