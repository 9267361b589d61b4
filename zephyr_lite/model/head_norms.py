"""Norms of heads: q and k of every token, head by head, before they are turned (Qwen3).

    q[h] = rms_norm(q[h], gain_q)      k[j] = rms_norm(k[j], gain_k)

Heads of q and of k lie beside each other in a product's output; what is normed is a copy of them,
so that a layer keeps what it keeps without norms and has its heads again for one pass over memory.

Shapes: T tokens, H heads, W width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from zephyr_kernels.norm import rms_norm, rms_norm_backward_

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class HeadNorms:
    """Frozen gains [W] of q and k."""

    gain_q: torch.Tensor
    gain_k: torch.Tensor
    eps: float

    def forward(self, q_UHW: torch.Tensor, k_TJW: torch.Tensor) -> tuple[Pair, Pair]:
        """Normed copies of q and k, contiguous, and their rstd, a number a head."""
        (q, rstd_q), (k, rstd_k) = (
            rms_norm(_rows(x), gain, self.eps)
            for x, gain in ((q_UHW, self.gain_q), (k_TJW, self.gain_k))
        )
        return (q.view(q_UHW.shape), k.view(k_TJW.shape)), (rstd_q, rstd_k)

    def backward_(self, grads: Pair, inputs: Pair, rstds: Pair) -> None:
        """Write the gradients of `inputs`, which were normed, over those of the normed heads."""
        gains = (self.gain_q, self.gain_k)
        for grad, x, gain, rstd in zip(grads, inputs, gains, rstds, strict=True):
            found = rms_norm_backward_(_rows(grad), _rows(x), gain, rstd)
            grad.copy_(found.view(grad.shape))


def _rows(x_THW: torch.Tensor) -> torch.Tensor:
    """A head a row: a copy, where heads of something else stand between the tokens'."""
    return x_THW.reshape(-1, x_THW.shape[-1])
