"""What kernels ask of a matrix: contiguous rows, at any distance from each other.

A column slice of a wider buffer is such a matrix: gate and up of one product, or the first K of the
K + R columns of an augmented operand.
"""

from __future__ import annotations

import torch


def row_strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """The distance between rows of each, in elements.

    Raises: ValueError if one is no matrix of the first's shape, or its rows are not contiguous.
    """
    shape = tensors[0].shape
    for x in tensors:
        if x.dim() != 2 or x.shape != shape:
            raise ValueError(f"shape must be {list(shape)} and 2-D, got {list(x.shape)}")
        if x.stride(1) != 1 and x.shape[1] > 1:
            raise ValueError(f"rows must be contiguous, got strides {x.stride()}")
    return tuple(x.stride(0) for x in tensors)
