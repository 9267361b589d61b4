"""The one rule by which a kernel's numbers are accepted: at most twice as wrong as eager."""

from __future__ import annotations

import torch

EAGER_FACTOR = 2.0  # two roundings of a dtype may fall on either side of one
FLOOR = 1e-5  # of the truth's norm: eager can be exact by luck


def assert_within(out: torch.Tensor, truth64: torch.Tensor, eager: torch.Tensor) -> None:
    """||out - truth|| <= 2 ||eager - truth|| + 1e-5 ||truth||, in the Frobenius norm.

    Args:
        out: what the kernel gave, of any dtype; a NaN in it fails.
        truth64: the same computed in fp64, from the same rounded inputs.
        eager: the same computed by plain PyTorch in the dtype of `out`.
    """
    assert out.shape == truth64.shape, f"shape {tuple(out.shape)}, not {tuple(truth64.shape)}"
    assert out.dtype == eager.dtype, f"{out.dtype}, not {eager.dtype} as eager gives"
    truth = truth64.detach().double().cpu()
    error = (out.detach().double().cpu() - truth).norm().item()
    eager_error = (eager.detach().double().cpu() - truth).norm().item()
    limit = EAGER_FACTOR * eager_error + FLOOR * truth.norm().item()
    # Written so that a NaN on either side fails.
    assert error <= limit, f"error {error:.3e} above {limit:.3e} (eager's own {eager_error:.3e})"
