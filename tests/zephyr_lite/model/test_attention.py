"""Attention over a layout against a dense mask in double precision."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from zephyr_kernels.attention import attention as planned

from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.model.attention import to_device

CPU = torch.device("cpu")
WIDTH = 8
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def documents(*lengths: int) -> Layout:
    return document_layout([(np.arange(n), np.zeros(n, bool)) for n in lengths])


@pytest.fixture
def layouts(random_pairs: Callable) -> dict[str, Layout]:
    odd = [(5, 7, 3), (1, 9, 1), (1, 1, 1), (17, 1, 30), (130, 3, 127), (8, 8, 8), (5, 7, 3)]
    many = [(1 + 3 * i % 11, 1 + i % 5, 1 + 2 * i % 7) for i in range(25)]
    return {
        "one document": documents(13),
        "odd documents": documents(1, 7, 8, 9, 1, 127, 128, 129, 145, 2),
        "single tokens": documents(1, 1, 1),
        "pairs": pair_layout(random_pairs(odd)),
        "two sequences": pair_layout(random_pairs(odd), share_prompt=False),
        "many pairs": pair_layout(random_pairs(many)),
    }


def qkv(tokens: int, heads: int, kv_heads: int, dtype: torch.dtype, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, heads, WIDTH), (tokens, kv_heads, WIDTH), (tokens, kv_heads, WIDTH)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q_THD: torch.Tensor, k_TJD: torch.Tensor, v_TJD: torch.Tensor, layout: Layout):
    """The definition: one [T, T] mask that says who sees whom."""
    seen_TT = torch.zeros(layout.n_tokens, layout.n_tokens, dtype=torch.bool)
    columns = (layout.q_start_S, layout.q_len_S, layout.c_start_S, layout.c_len_S)
    for q_start, q_len, c_start, c_len in zip(*columns, strict=True):
        for row in range(q_start, q_start + q_len):
            seen_TT[row, c_start : c_start + c_len] = True
            seen_TT[row, q_start : row + 1] = True
    groups = q_THD.shape[1] // k_TJD.shape[1]
    head_of = torch.arange(q_THD.shape[1]) // groups
    scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_TJD[:, head_of]) * WIDTH**-0.5
    weights_HTT = scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTT, v_TJD[:, head_of])


def run(layout: Layout, tensors: Tensors) -> torch.Tensor:
    return planned(*tensors, to_device(layout, CPU).plan, WIDTH**-0.5)


def with_gradients(forward: Callable[[Tensors], torch.Tensor], tensors: Tensors) -> Tensors:
    """Output and the gradients of a random projection of it."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = forward((leaves[0], leaves[1], leaves[2]))
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = torch.autograd.grad((out * probe.to(out.dtype)).sum(), leaves)
    return (out.detach(), *grads)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (6, 1)])
def test_equals_the_dense_mask_in_fp64(layouts, heads, kv_heads, tolerance) -> None:
    for name, layout in layouts.items():
        tensors = qkv(layout.n_tokens, heads, kv_heads, torch.float64)
        truth = with_gradients(lambda x, at=layout: dense(*x, at), tensors)
        found = with_gradients(lambda x, at=layout: run(at, x), tensors)
        for ours, theirs in zip(found, truth, strict=True):
            error = (ours - theirs).norm() / theirs.norm().clamp_min(1)
            assert error < tolerance.fp64, f"{name}: {error:.2g}"


def test_fp32_is_as_close_to_the_truth_as_a_dense_mask_in_fp32(layouts) -> None:
    for name, layout in layouts.items():
        tensors = qkv(layout.n_tokens, 4, 2, torch.float32)
        exact = tuple(t.double() for t in tensors)
        truth = with_gradients(lambda x, at=layout: dense(*x, at), exact)
        theirs = with_gradients(lambda x, at=layout: dense(*x, at), tensors)
        found = with_gradients(lambda x, at=layout: run(at, x), tensors)
        for ours, plain, right in zip(found, theirs, truth, strict=True):
            limit = 2 * (plain - right).norm() + 1e-6
            assert (ours - right).norm() <= limit, name


def poisoned(layout: Layout, rows: slice, keep: np.ndarray) -> tuple[Tensors, Tensors]:
    """Output and gradients at `keep` with NaN at `rows`, and without."""
    clean = qkv(layout.n_tokens, 4, 2, torch.float32)
    spoilt = tuple(t.clone() for t in clean)
    for t in spoilt:
        t[rows] = torch.nan
    results = []
    for tensors in (clean, (spoilt[0], spoilt[1], spoilt[2])):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = run(layout, (leaves[0], leaves[1], leaves[2]))[keep]
        grads = torch.autograd.grad(out.sum(), leaves)
        results.append((out.detach(), *(g[keep] for g in grads)))
    return results[0], results[1]


@pytest.mark.parametrize("victim", range(5))
def test_nan_in_one_document_reaches_no_other(victim: int) -> None:
    lengths = [5, 8, 3, 8, 1]  # all but one share a bucket
    layout = documents(*lengths)
    start = sum(lengths[:victim])
    rows = slice(start, start + lengths[victim])
    others = np.delete(np.arange(layout.n_tokens), np.r_[rows])
    clean, spoilt = poisoned(layout, rows, others)
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("branch", ["chosen", "rejected"])
def test_nan_in_one_answer_reaches_neither_the_other_nor_a_neighbour(branch, random_pairs) -> None:
    layout = pair_layout(random_pairs([(4, 3, 5), (6, 2, 2)]))
    rows = slice(4, 7) if branch == "chosen" else slice(7, 12)
    # Who comes before the poison in its own segment is not asked: it meets it as a masked key.
    keep = np.r_[7:22] if branch == "chosen" else np.r_[0:7, 12:22]
    clean, spoilt = poisoned(layout, rows, keep)
    assert torch.equal(clean[0], spoilt[0])
    # The gradient of the prompt's keys is a sum over both answers; all others are untouched.
    apart = slice(0 if branch == "chosen" else 4, None)
    for gradient in spoilt[1:]:
        assert torch.isfinite(gradient[apart]).all()


def test_company_does_not_change_a_document() -> None:
    lengths = [9, 1, 40, 16, 131, 9]
    together = documents(*lengths)
    tensors = qkv(together.n_tokens, 4, 2, torch.float64)
    out = run(together, tensors)
    start = 0
    for n in lengths:
        part = tuple(t[start : start + n] for t in tensors)
        alone = run(documents(n), (part[0], part[1], part[2]))
        assert torch.allclose(out[start : start + n], alone, rtol=0, atol=1e-14)
        start += n


def test_only_short_segments_are_padded_and_by_less_than_a_step() -> None:
    lengths = [1, 7, 8, 9, 9, 64, 65, 66, 128, 127, 129, 129, 1000, 1000]
    plan = to_device(documents(*lengths), CPU).plan
    alone = sorted(n for _, _, n in plan.spans)
    assert alone == [64, 129, 129, 1000, 1000]
    padded = sum(b.shape[0] * b.shape[1] for b in plan.batches)
    assert padded - (sum(lengths) - sum(alone)) < 8 * (len(lengths) - len(alone))
    assert sorted(b.shape for b in plan.batches) == [(2, 16), (2, 72), (2, 128), (3, 8)]
