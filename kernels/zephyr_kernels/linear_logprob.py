"""The head: log-probability of each target token, without ever holding the logits.

    logp[n] = z[n, y[n]] - logsumexp_v z[n, v]        z[n, v] = h[n] . W[v]
    d logp[n] / d h[n] = W[y[n]] - sum_v softmax(z[n])[v] W[v]

and with a soft cap c, as Gemma's head has, z = c tanh(h . W / c), whose slope is 1 - (z / c)^2.

W is frozen, so the gradient of row n is known up to the scalar that the loss will send back: it is
formed while the chunk's logits are alive and scaled in the backward. Two products with W per row
when training, one in the reference pass, and a chunk of fp32 logits is all that ever exists.
Log-probs are never taken from bf16 logits: over 128 tokens that is wrong by 0.3 nats. onehot -
softmax is formed in fp32 and then rounded to W's dtype: rounding the softmax first would lose the
gradient of a sure token, which is the difference.

On a CPU a chunk is taken tile by tile of the vocabulary, each read while it is in the cache.

Shapes: N predicting rows, C rows of a chunk, B vocabulary entries of a tile, D hidden width,
V vocabulary.

Bytes moved a row beside the two products, V = 32000: the Triton kernel reads the fp32 logits twice
and writes the excess in bf16, 320 kB (128 kB in the reference pass). The products are 4 V D
floating-point operations, the least for an exact gradient.

One program a row, BLOCK_V = 4096: an online maximum and sum; then, by another kernel, the same row
again for the excess. No atomics and one order of summation, in training as in the reference pass:
the same input gives the same bits.

Source: the chunking is that of Liger (arXiv 2410.10989), the deferred scale our own.
Reference: `reference.linear_log_probs`, `.logits_of`, `.log_probs_of_logits_`.
"""

from __future__ import annotations

from typing import Any

import torch

from zephyr_kernels import reference
from zephyr_kernels.backend import runs_triton
from zephyr_kernels.launch import launch

# Rows and vocabulary entries of a tile on a CPU; its 6.5 MB of fp32 stay in two cores' caches.
TILE_ROWS, TILE_VOCAB = 1024, 1600


def log_probs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    *,
    chunk_rows: int = 1024,
    softcap: float | None = None,
) -> torch.Tensor:
    """Log-probability of each target under a frozen head.

    Args:
        hidden_ND: fp32, bf16, fp16 (or fp64 in tests) hidden states of the predicting rows.
        weight_VD: the lm_head; gets no gradient.
        target_N: int64 in [0, V).
        chunk_rows: rows of logits alive at once.
        softcap: bound of the logits, or None.
    Returns: logp_N, fp32 (fp64 for fp64 input), nats.
    Memory: a tile of 6.5 MB for fp32 on a CPU. Else chunk_rows * V in fp32; when a gradient is
        needed also N * D for it, chunk_rows * V in W's dtype when that is narrower, and once more
        in fp32 for a soft cap without Triton.
    Raises: ValueError when shapes disagree, the cap is not above 0 or the head wants a gradient.
    """
    if hidden_ND.shape[1] != weight_VD.shape[1] or len(hidden_ND) != len(target_N):
        raise ValueError(
            f"hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)} and target "
            f"{tuple(target_N.shape)} do not fit together"
        )
    if weight_VD.requires_grad:
        raise ValueError("the head must be frozen; use reference.linear_log_probs to train it")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, got {softcap}")
    if torch.is_grad_enabled() and hidden_ND.requires_grad:
        result: Any = _LinearLogProb.apply(hidden_ND, weight_VD, target_N, chunk_rows, softcap)
        return result
    return _forward(hidden_ND, weight_VD, target_N, chunk_rows, softcap, None)


def _forward(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    chunk_rows: int,
    softcap: float | None,
    grad_ND: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probs; also d logp[n] / d h[n] into grad_ND when it is given."""
    wide = reference.accumulate_dtype(hidden_ND)
    if hidden_ND.device.type == "cpu" and hidden_ND.dtype == weight_VD.dtype == wide:
        return _tiled(hidden_ND, weight_VD, target_N, softcap, grad_ND)
    step = _triton_chunk if runs_triton(hidden_ND) else _torch_chunk
    logp_N = torch.empty(len(target_N), dtype=wide, device=hidden_ND.device)
    rows = min(chunk_rows, len(target_N)) if hidden_ND.dtype == wide else 0
    memory = hidden_ND.new_empty(rows, len(weight_VD))  # one chunk's, for all chunks
    for start in range(0, len(target_N), chunk_rows):
        chunk = slice(start, start + chunk_rows)
        hidden_CD, target_C = hidden_ND[chunk], target_N[chunk]
        logits_CV = reference.logits_of(hidden_CD, weight_VD, out_CV=memory[: len(target_C)])
        grad_CD = None if grad_ND is None else grad_ND[chunk]
        logp_N[chunk] = step(logits_CV, weight_VD, target_C, softcap, grad_CD)
        del logits_CV  # or two chunks' would be alive while the next is made
    return logp_N


def _tiled(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    target_N: torch.Tensor,
    softcap: float | None,
    grad_ND: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probs tile by tile of the vocabulary, so that no logit leaves a core's cache.

    The running maximum, sum and gradient of a row are rescaled when a tile raises the maximum, as
    FlashAttention does with keys. As in `reference.log_probs_of_logits_` only the others' share is
    summed, so nothing cancels for a sure token.
    """
    logp_N = hidden_ND.new_empty(len(target_N))
    memory = hidden_ND.new_empty(min(TILE_ROWS, len(target_N)) * min(TILE_VOCAB, len(weight_VD)))
    for start in range(0, len(target_N), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        grad_CD = None if grad_ND is None else grad_ND[rows].zero_()
        logp_N[rows] = _tiled_rows(
            hidden_ND[rows], weight_VD, target_N[rows], softcap, grad_CD, memory
        )
    return logp_N


def _tiled_rows(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_C: torch.Tensor,
    softcap: float | None,
    sum_CD: torch.Tensor | None,
    memory: torch.Tensor,
) -> torch.Tensor:
    """Log-probs of one chunk; over `sum_CD`, zeros at first, the gradient before its scale."""
    order_C = target_C.argsort()
    edges = range(0, len(weight_VD) + TILE_VOCAB, TILE_VOCAB)
    bounds = torch.searchsorted(target_C[order_C], torch.tensor(edges)).tolist()
    top_C1 = hidden_CD.new_full((len(hidden_CD), 1), float("-inf"))
    others_C1 = torch.zeros_like(top_C1)
    for tile, first in enumerate(edges[:-1]):
        weight_BD = weight_VD[first : first + TILE_VOCAB]
        shape = (len(hidden_CD), len(weight_BD))
        z_CB = torch.mm(hidden_CD, weight_BD.T, out=memory[: shape[0] * shape[1]].view(shape))
        if softcap is not None:
            reference.soft_cap_(z_CB, softcap)
        slope_CB = None if softcap is None or sum_CD is None else 1 - (z_CB / softcap).square_()
        before_C1, top_C1 = top_C1, torch.maximum(top_C1, z_CB.amax(1, keepdim=True))
        fade_C1 = (before_C1 - top_C1).exp_()
        z_CB.sub_(top_C1).exp_()
        mine = order_C[bounds[tile] : bounds[tile + 1]]
        z_CB[mine, target_C[mine] - first] = 0.0
        others_C1.mul_(fade_C1).add_(z_CB.sum(1, keepdim=True))
        if sum_CD is not None:
            if slope_CB is not None:
                z_CB.mul_(slope_CB)
            sum_CD.mul_(fade_C1).addmm_(z_CB, weight_BD)
    own_CD = weight_VD[target_C]
    chosen_C1 = torch.linalg.vecdot(hidden_CD, own_CD)[:, None]
    if softcap is not None:
        reference.soft_cap_(chosen_C1, softcap)
    surplus_C1 = others_C1 + (chosen_C1 - top_C1).expm1()  # total - 1
    if sum_CD is not None:
        if softcap is not None:
            own_CD.mul_(1 - (chosen_C1 / softcap).square_())
        sum_CD.neg_().addcmul_(own_CD, others_C1).div_(surplus_C1 + 1)
    return (chosen_C1 - top_C1 - surplus_C1.log1p()).squeeze(1)


def _torch_chunk(
    logits_CV: torch.Tensor,
    weight_VD: torch.Tensor,
    target_C: torch.Tensor,
    softcap: float | None,
    grad_CD: torch.Tensor | None,
) -> torch.Tensor:
    slope_CV = None
    if softcap is not None:
        reference.soft_cap_(logits_CV, softcap)
        if grad_CD is not None:
            slope_CV = (logits_CV / softcap).square_().neg_().add_(1.0)
    logp_C, total_C1 = reference.log_probs_of_logits_(logits_CV, target_C)
    if grad_CD is None:
        return logp_C
    # Over the logits is now total * (softmax - onehot): nothing passes over it to divide, the
    # product's few columns are divided, unless it must be written again anyway to be narrower.
    if slope_CV is not None:
        logits_CV.mul_(slope_CV)
    if weight_VD.dtype == grad_CD.dtype == logits_CV.dtype:
        torch.mm(logits_CV, weight_VD, out=grad_CD).div_(total_C1.neg_())
    else:
        excess_CV = torch.empty_like(logits_CV, dtype=weight_VD.dtype)
        torch.div(logits_CV, total_C1.neg_(), out=excess_CV)
        grad_CD.copy_(excess_CV @ weight_VD)
    return logp_C


def _triton_chunk(
    logits_CV: torch.Tensor,
    weight_VD: torch.Tensor,
    target_C: torch.Tensor,
    softcap: float | None,
    grad_CD: torch.Tensor | None,
) -> torch.Tensor:
    from zephyr_kernels._linear_logprob_triton import excess_kernel, row_log_prob_kernel

    (rows, vocab), target_C = logits_CV.shape, target_C.contiguous()
    logp_C = logits_CV.new_empty(rows)
    sums_C3 = logits_CV.new_empty(rows, 3)
    shape = {
        "VOCAB": vocab,
        "HAS_SOFTCAP": softcap is not None,
        "BLOCK_V": min(4096, max(16, 1 << (vocab - 1).bit_length())),
        "num_warps": 8,
    }
    launch(
        row_log_prob_kernel, (rows,),
        logits_CV, target_C, logp_C, sums_C3, logits_CV.stride(0), softcap or 1.0, **shape,
    )  # fmt: skip
    if grad_CD is None:
        return logp_C
    excess_CV = logits_CV
    if weight_VD.dtype != logits_CV.dtype:
        excess_CV = torch.empty_like(logits_CV, dtype=weight_VD.dtype)
    launch(
        excess_kernel, (rows,),
        logits_CV, target_C, sums_C3, excess_CV,
        logits_CV.stride(0), excess_CV.stride(0), softcap or 1.0, **shape,
    )  # fmt: skip
    if weight_VD.dtype == grad_CD.dtype:
        torch.mm(excess_CV, weight_VD, out=grad_CD)
    else:
        grad_CD.copy_(excess_CV @ weight_VD)
    return logp_C


class _LinearLogProb(torch.autograd.Function):
    """See the module's formula. Saves one [N, D] buffer: the gradient before its scale."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        target_N: torch.Tensor,
        chunk_rows: int,
        softcap: float | None,
    ) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format)
        logp_N = _forward(hidden_ND, weight_VD, target_N, chunk_rows, softcap, grad_ND)
        ctx.save_for_backward(grad_ND)
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad_ND,) = ctx.saved_tensors
        # Multiplied in the wider dtype and rounded once, without a buffer of that dtype.
        scaled_ND = torch.mul(grad_ND, grads[0][:, None], out=torch.empty_like(grad_ND))
        return scaled_ND, None, None, None, None
