"""The head: log-probability of each target token, without ever holding the logits.

    logp[n] = z[n, y[n]] - logsumexp_v z[n, v]        z[n, v] = h[n] . W[v]
    d logp[n] / d h[n] = W[y[n]] - sum_v softmax(z[n])[v] W[v]

W is frozen, so the gradient of row n is known up to the scalar that the loss will send back: it is
formed while the chunk's logits are alive and scaled in the backward. Two products with W per row
when training, one in the reference pass, and a chunk of fp32 logits is all that ever exists.
Log-probs are never taken from bf16 logits: over 128 tokens that is wrong by 0.3 nats.

Shapes: N predicting rows, D hidden width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch


def reference_log_probs(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, target_N: torch.Tensor
) -> torch.Tensor:
    """The definition, by log_softmax over all logits: what the tests hold the head against, and
    what runs where the head itself is trained. Same arguments and result as `log_probs`.
    """
    logits_NV = hidden_ND.to(_accumulate(hidden_ND)) @ weight_VD.to(_accumulate(hidden_ND)).T
    return logits_NV.log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)


def log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    *,
    chunk_rows: int = 1024,
) -> torch.Tensor:
    """Log-probability of each target under a frozen head.

    Args:
        hidden_ND: fp32, bf16 (or fp64 in tests) hidden states of the predicting rows.
        weight_VD: the lm_head; gets no gradient.
        target_N: int64 in [0, V).
        chunk_rows: rows of logits alive at once.
    Returns: logp_N, fp32 (fp64 for fp64 input), nats.
    Memory: chunk_rows * V in fp32, and N * D for the gradient when one is needed.
    Raises: ValueError when shapes disagree or the head wants a gradient.
    """
    if hidden_ND.shape[1] != weight_VD.shape[1] or len(hidden_ND) != len(target_N):
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)} and target "
            f"{tuple(target_N.shape)} do not fit together"
        )
    if weight_VD.requires_grad:
        raise ValueError("the head must be frozen; use reference_log_probs to train it")
    if torch.is_grad_enabled() and hidden_ND.requires_grad:
        result: Any = _LinearLogProb.apply(hidden_ND, weight_VD, target_N, chunk_rows)
        return result
    return _forward(hidden_ND, weight_VD, target_N, chunk_rows, None)


def _accumulate(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def logits_of(hidden_CD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    """fp32 logits of one chunk; bf16 operands keep their fast product with an fp32 result."""
    if hidden_CD.dtype in (torch.float32, torch.float64):
        return hidden_CD @ weight_VD.to(hidden_CD.dtype).T
    if hidden_CD.is_cuda:
        weight = weight_VD.to(hidden_CD.dtype)
        return torch.mm(hidden_CD, weight.T, out_dtype=torch.float32)
    return hidden_CD.float() @ weight_VD.float().T


def _forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    chunk_rows: int,
    grad_ND: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probs; also d logp[n] / d h[n] into grad_ND when it is given."""
    logp_N = torch.empty(len(target_N), dtype=_accumulate(hidden_ND), device=hidden_ND.device)
    for start in range(0, len(target_N), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits_CV = logits_of(hidden_ND[chunk], weight_VD)
        target_C1 = target_N[chunk, None]
        # In place, pass by pass: logsumexp would make a copy of the chunk and a second exponential.
        top_C1 = logits_CV.amax(1, keepdim=True)
        chosen_C1 = logits_CV.gather(1, target_C1) - top_C1
        power_CV = logits_CV.sub_(top_C1).exp_()
        total_C1 = power_CV.sum(1, keepdim=True)
        logp_N[chunk] = (chosen_C1 - total_C1.log()).squeeze(1)
        if grad_ND is not None:
            # softmax - onehot in fp32, rounded afterwards: of a sure token only their difference
            # is left, and rounding the softmax first would lose all of it in bf16.
            excess_CV = power_CV.div_(total_C1)
            excess_CV.scatter_add_(1, target_C1, excess_CV.new_full(target_C1.shape, -1.0))
            grad_ND[chunk] = -(excess_CV.to(weight_VD.dtype) @ weight_VD).to(grad_ND.dtype)
    return logp_N


class _LinearLogProb(torch.autograd.Function):
    """See the module's formula. Saves one [N, D] buffer: the gradient before its scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        target_N: torch.Tensor,
        chunk_rows: int,
    ) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND)
        logp_N = _forward(hidden_ND, weight_VD, target_N, chunk_rows, grad_ND)
        ctx.save_for_backward(grad_ND)
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        scaled = grad_ND.to(grads[0].dtype) * grads[0][:, None]
        return scaled.to(grad_ND.dtype), None, None, None
