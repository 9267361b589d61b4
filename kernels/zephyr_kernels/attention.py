"""Attention over segments of one row, forward and backward, without padding where it can be.

    out[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]

A segment is a span of queries whose keys are a *context* span (or none) and its own span, causal,
aligned bottom right: query n of a segment sees the whole context and its own keys 0 to n + lead,
where lead is how many of its keys stand before its first query (0 unless queries were left out).

Two parts, exact when put together:

    own        causal attention of a segment to itself
    context    the segment's queries over the context's keys, no mask at all

Each part gives an output and its log-sum-exp; they merge by weights exp(lse_part - lse). The
backward calls the parts again with the *merged* output and lse, which makes each part's gradient
that of the whole softmax. So a shared prompt's keys are read where they lie: no copy, no mask.

On a CPU the parts are torch's flash kernel; `reference.attention` is the definition. On a GPU all
segments go through one variable-length call (`varlen.py`), whose mask is the whole rule; there the
keys of a context are copied once per segment. It is torch's flash attention, or xformers' where
`use` chose it. A GPU or dtype that the chosen one does not compute gets the definition.

Shapes: T keys of the row, U queries (T, unless some were left out), H query heads, J key and value
heads, D head width. Source: FlashAttention-2 (arXiv 2307.08691) for the algorithm and the merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch

from zephyr_kernels import _flash, reference, varlen
from zephyr_kernels.segments import Segment

Kernel = Literal["flash", "xformers"]

# Segments shorter than this are gathered into padded batches, for a call costs as much as they do.
SHORT = 128
LENGTH_STEP = 8

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_kernel: Kernel = "flash"


@dataclass(frozen=True)
class Batch:
    """Short segments that share a padded call: B of them, W tokens wide.

    queries_BW, keys_BW: rows to gather. real: flat index of what is no padding, among B * W.
    query_rows, key_rows: the rows that `real` stands for.
    """

    shape: tuple[int, int]
    queries: torch.Tensor
    keys: torch.Tensor
    real: torch.Tensor
    query_rows: torch.Tensor
    key_rows: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """What to call, decided once per layout for all layers.

    spans: (q_start, k_start, length) of segments that go alone. contexts: (q_start, q_len, c_start,
    c_len). varlen: what one variable-length call needs, on a GPU in place of spans and batches.
    """

    n_queries: int
    n_keys: int
    spans: tuple[tuple[int, int, int], ...]
    batches: tuple[Batch, ...]
    contexts: tuple[tuple[int, int, int, int], ...]
    segments: tuple[Segment, ...]
    varlen: varlen.Varlen | None

    def seen(self, device: torch.device) -> torch.Tensor:
        """Who sees whom: bool [U, T], the whole rule in one mask."""
        seen_UT = torch.zeros(self.n_queries, self.n_keys, dtype=torch.bool, device=device)
        for s in self.segments:
            rows = slice(s.q_start, s.q_start + s.q_len)
            own = torch.ones(s.q_len, s.lead + s.q_len, dtype=torch.bool, device=device)
            seen_UT[rows, s.k_start : s.k_start + s.lead + s.q_len] = own.tril(s.lead)
            seen_UT[rows, s.c_start : s.c_start + s.c_len] = True
        return seen_UT


def make_plan(
    segments: Sequence[Segment], n_queries: int, n_keys: int, device: torch.device
) -> Plan:
    """Plan the calls. Every query belongs to one segment; a key may be context of many."""
    contexts = [(s.q_start, s.q_len, s.c_start, s.c_len) for s in segments if s.c_len]
    # Keys before the first query are seen by every query of the segment: a context like any other.
    contexts += [(s.q_start, s.q_len, s.k_start, s.lead) for s in segments if s.lead]
    spans, batches = ([], []) if device.type == "cuda" else _calls(segments, device)
    return Plan(
        n_queries,
        n_keys,
        tuple(spans),
        tuple(batches),
        tuple(sorted(contexts)),
        tuple(segments),
        varlen.plan(segments, n_keys, device) if device.type == "cuda" else None,
    )


Span = tuple[int, int, int]


def _calls(segments: Sequence[Segment], device: torch.device) -> tuple[list[Span], list[Batch]]:
    """A CPU's: segments that go alone, and short ones that share a call."""
    groups: dict[int, list[Span]] = {}
    for s in segments:
        width = -(-s.q_len // LENGTH_STEP) * LENGTH_STEP
        span = (s.q_start, s.k_start + s.lead, s.q_len)
        groups.setdefault(width if width <= SHORT else -1, []).append(span)
    spans, batches = groups.pop(-1, []), []
    for width, members in sorted(groups.items()):
        if len(members) == 1:
            spans += members
        else:
            batches.append(_batch(members, width, device))
    return spans, batches


def _batch(members: list[Span], width: int, device: torch.device) -> Batch:
    q_start, k_start, length = (torch.tensor(x)[:, None] for x in zip(*members, strict=True))
    slot = torch.arange(width)[None]
    inside = torch.minimum(slot, length - 1)
    queries, keys = (q_start + inside).flatten(), (k_start + inside).flatten()
    real = (slot < length).flatten().nonzero().squeeze(1)
    tensors = (queries, keys, real, queries[real], keys[real])
    return Batch((len(members), width), *(x.to(device) for x in tensors))


def use(kernel: Kernel) -> Kernel:
    """Choose a GPU's attention for the whole process; returns what was chosen before.

    For the process, and not for a context: autograd runs a GPU's backward in a thread of its own.
    Raises: ImportError when xformers is chosen and cannot be imported.
    """
    global _kernel
    if kernel == "xformers":
        from zephyr_kernels import _xformers

        _xformers.fmha()
    before, _kernel = _kernel, kernel
    return before


def computed_by(
    device: torch.device, dtype: torch.dtype, head_width: int
) -> Literal["flash", "xformers", "dense"]:
    """What computes such heads there; `dense` is the definition, where the chosen one cannot."""
    if device.type == "cpu":
        return "flash"
    return _kernel if _module().computes(device, dtype, head_width) else "dense"


def _module() -> ModuleType:
    if _kernel == "flash":
        return _flash
    from zephyr_kernels import _xformers

    return _xformers


def _taken(q_UHD: torch.Tensor, plan: Plan) -> ModuleType | None:
    """What takes these heads in one variable-length call, if anything does."""
    if plan.varlen is None or not q_UHD.is_cuda:
        return None
    module = _module()
    return module if module.computes(q_UHD.device, q_UHD.dtype, q_UHD.shape[-1]) else None


def attention(
    q_UHD: torch.Tensor, k_TJD: torch.Tensor, v_TJD: torch.Tensor, plan: Plan, scale: float
) -> torch.Tensor:
    """Attention with gradients; see the module. Returns out [U, H, D] in the dtype of q."""
    result: Any = _Attention.apply(q_UHD, k_TJD, v_TJD, plan, scale)
    return result


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Plan, scale: float
    ) -> torch.Tensor:
        out, lse = forward(q, k, v, plan, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        backward_(grads[0], q, k, v, out, lse, ctx.plan, ctx.scale, (dq, dk, dv))
        return dq, dk, dv, None, None


def forward(
    q_UHD: torch.Tensor, k_TJD: torch.Tensor, v_TJD: torch.Tensor, plan: Plan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [U, H, D] and log-sum-exp [U, H] (fp32; fp64 for fp64 input). No gradient.

    xformers' log-sum-exp may lie otherwise; `backward_` alone reads it.
    """
    if (one_call := _taken(q_UHD, plan)) is not None:
        return one_call.forward(q_UHD, k_TJD, v_TJD, plan.varlen, scale)
    if q_UHD.device.type != "cpu":
        return reference.attention(q_UHD, k_TJD, v_TJD, plan.seen(q_UHD.device), scale)
    out = torch.empty(q_UHD.shape, dtype=q_UHD.dtype, device=q_UHD.device)
    wide = torch.float64 if q_UHD.dtype == torch.float64 else torch.float32
    lse = torch.empty(q_UHD.shape[:2], dtype=wide, device=q_UHD.device)
    for q_at, k_at, n in plan.spans:
        q, k, v = _spans(q_UHD, k_TJD, v_TJD, q_at, n, k_at, n)
        part, lse_part = _forward(q, k, v, 0.0, True, scale=scale)
        out[q_at : q_at + n] = part[0].transpose(0, 1)
        lse[q_at : q_at + n] = lse_part[0].T
    for b in plan.batches:
        q, k, v = _gathered(q_UHD, k_TJD, v_TJD, b)
        part, lse_part = _forward(q, k, v, 0.0, True, scale=scale)
        out[b.query_rows] = part.transpose(1, 2).flatten(0, 1)[b.real]
        lse[b.query_rows] = lse_part.transpose(1, 2).flatten(0, 1)[b.real]
    for q_at, n, c_at, c_len in plan.contexts:
        q, k, v = _spans(q_UHD, k_TJD, v_TJD, q_at, n, c_at, c_len)
        part, lse_part = _forward(q, k, v, 0.0, False, scale=scale)
        here = slice(q_at, q_at + n)
        _merge_(out[here], lse[here], part[0].transpose(0, 1), lse_part[0].T)
    return out, lse


def backward_(
    dout_UHD: torch.Tensor,
    q_UHD: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    out_UHD: torch.Tensor,
    lse_UH: torch.Tensor,
    plan: Plan,
    scale: float,
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Write dq, dk and dv into `grads`, which may be strided; their contents are overwritten."""
    if (one_call := _taken(q_UHD, plan)) is not None:
        saved = (q_UHD, k_TJD, v_TJD, out_UHD, lse_UH)
        one_call.backward_(dout_UHD, *saved, plan.varlen, scale, grads)
        return
    if q_UHD.device.type != "cpu":
        _dense_backward(dout_UHD, (q_UHD, k_TJD, v_TJD), plan, scale, grads)
        return
    dq_UHD, dk_TJD, dv_TJD = grads
    if len(q_UHD) != len(k_TJD):  # keys that are nobody's own get a gradient as context only
        dk_TJD.zero_()
        dv_TJD.zero_()
    rest = (dout_UHD, out_UHD)
    for q_at, k_at, n in plan.spans:
        tensors = _spans(q_UHD, k_TJD, v_TJD, q_at, n, k_at, n)
        found = _part_backward(rest, lse_UH, tensors, q_at, n, True, scale)
        for grad, part, at in zip(grads, found, (q_at, k_at, k_at), strict=True):
            grad[at : at + n] = part
    for b in plan.batches:
        _batch_backward(dout_UHD, out_UHD, lse_UH, (q_UHD, k_TJD, v_TJD), b, scale, grads)
    for q_at, n, c_at, c_len in plan.contexts:
        tensors = _spans(q_UHD, k_TJD, v_TJD, q_at, n, c_at, c_len)
        found = _part_backward(rest, lse_UH, tensors, q_at, n, False, scale)
        dq_UHD[q_at : q_at + n] += found[0]
        dk_TJD[c_at : c_at + c_len] += found[1]
        dv_TJD[c_at : c_at + c_len] += found[2]


Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _spans(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_at: int, n: int, k_at: int, m: int
) -> Heads:
    """Views [1, heads, tokens, D] of n queries and m keys."""
    keys = slice(k_at, k_at + m)
    return tuple(x.transpose(0, 1)[None] for x in (q[q_at : q_at + n], k[keys], v[keys]))  # type: ignore[return-value]


def _gathered(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, b: Batch) -> Heads:
    rows = (b.queries, b.keys, b.keys)
    return tuple(  # type: ignore[return-value]
        x[r].view(*b.shape, *x.shape[1:]).transpose(1, 2)
        for x, r in zip((q, k, v), rows, strict=True)
    )


def _part_backward(
    rest: tuple[torch.Tensor, torch.Tensor],
    lse_UH: torch.Tensor,
    tensors: Heads,
    q_at: int,
    n: int,
    causal: bool,
    scale: float,
) -> Heads:
    """Gradients [tokens, heads, D] of one call, given the merged output and lse."""
    dout, out = (x[q_at : q_at + n].transpose(0, 1)[None] for x in rest)
    lse = lse_UH[q_at : q_at + n].T[None]
    found = _backward(dout, *tensors, out, lse, 0.0, causal, scale=scale)
    return tuple(x[0].transpose(0, 1) for x in found)  # type: ignore[return-value]


def _batch_backward(
    dout: torch.Tensor,
    out: torch.Tensor,
    lse_UH: torch.Tensor,
    tensors: Heads,
    b: Batch,
    scale: float,
    grads: Heads,
) -> None:
    """Gradients of short segments. A padded query repeats the last one and sends nothing back."""
    q, k, v = _gathered(*tensors, b)
    dout_rows = dout.new_zeros(len(b.queries), *dout.shape[1:])
    dout_rows[b.real] = dout[b.query_rows]
    dout_BHWD, out_BHWD = (
        x.view(*b.shape, *dout.shape[1:]).transpose(1, 2) for x in (dout_rows, out[b.queries])
    )
    lse_BHW = lse_UH[b.queries].view(*b.shape, -1).transpose(1, 2)
    found = _backward(dout_BHWD, q, k, v, out_BHWD, lse_BHW, 0.0, True, scale=scale)
    for grad, part, rows in zip(grads, found, (b.query_rows, b.key_rows, b.key_rows), strict=True):
        grad[rows] = part.transpose(1, 2).flatten(0, 1)[b.real]


def _dense_backward(
    dout: torch.Tensor, tensors: Heads, plan: Plan, scale: float, grads: Heads
) -> None:
    """The definition's gradients, where a GPU has no flash attention for the dtype."""
    with torch.enable_grad():
        q, k, v = leaves = tuple(x.detach().requires_grad_() for x in tensors)
        out, _ = reference.attention(q, k, v, plan.seen(dout.device), scale)
    for grad, found in zip(grads, torch.autograd.grad(out, leaves, dout), strict=True):
        grad.copy_(found)


def _merge_(
    out_UHD: torch.Tensor, lse_UH: torch.Tensor, part_UHD: torch.Tensor, lse_part_UH: torch.Tensor
) -> None:
    """Put a further part into `out` and `lse`: exp(lse) is a sum over all keys, part by part."""
    weight_UH = torch.sigmoid(lse_part_UH - lse_UH)  # of the new part
    torch.logaddexp(lse_UH, lse_part_UH, out=lse_UH)
    out_UHD.lerp_(part_UHD, weight_UH[..., None].to(out_UHD.dtype))
