"""The GPU's attention: torch's FlashAttention-2, which stands behind two aten operations."""

from __future__ import annotations

import torch

from zephyr_kernels.varlen import Varlen


def computes(gpu: torch.device, dtype: torch.dtype, head_width: int) -> bool:
    """Whether flash attention computes such heads on this GPU (Ampere and later)."""
    if dtype not in (torch.bfloat16, torch.float16) or head_width > 256 or head_width % 8:
        return False
    return torch.cuda.get_device_capability(gpu)[0] >= 8


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Varlen, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [U, H, D] and lse [U, H]."""
    keys, values = plan.gather(k), plan.gather(v)
    out, lse_HU, *_ = torch.ops.aten._flash_attention_forward(
        q, keys, values, plan.cu_q, plan.cu_k, plan.longest_q, plan.longest_k,
        0.0, True, False, scale=scale,
    )  # fmt: skip
    return out, lse_HU.T


def backward_(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Varlen,
    scale: float,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write dq, dk, dv; without dropout the random state that the operation asks for is unused."""
    keys, values = plan.gather(k), plan.gather(v)
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    found = torch.ops.aten._flash_attention_backward(
        dout.contiguous(), q, keys, values, out, lse.T.contiguous(), plan.cu_q, plan.cu_k,
        plan.longest_q, plan.longest_k, 0.0, True, unused, unused, scale=scale,
    )  # fmt: skip
    grads[0].copy_(found[0])
    for grad, copies in zip(grads[1:], found[1:], strict=True):
        plan.put_back_(grad, copies)
