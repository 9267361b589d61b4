"""Attention over segments against the definition in fp64; the GPU's one call, emulated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tolerance import assert_within
from zephyr_kernels import _flash, _xformers, reference, varlen
from zephyr_kernels.attention import (
    LENGTH_STEP,
    SHORT,
    Plan,
    attention,
    backward_,
    computed_by,
    forward,
    make_plan,
    use,
)
from zephyr_kernels.segments import Segment

CPU = torch.device("cpu")
WIDTH = 16
SCALE = WIDTH**-0.5
LIMIT_FP64 = 1e-13
Normal = Callable[..., torch.Tensor]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What is allocated and not written shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def rows(*lengths: int) -> list[Segment]:
    """Segments behind each other, each seeing itself only."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [Segment(at, n, at) for at, n in zip(starts, lengths, strict=True)]


# Segments, U, T.
CASES: dict[str, tuple[list[Segment], int, int]] = {
    "one token": (rows(1), 1, 1),
    "one segment": (rows(13), 13, 13),
    "single tokens": (rows(1, 1, 1), 3, 3),
    "odd lengths": (rows(1, 7, 8, 9, 1, 17, 2), 45, 45),
    "short and long": (rows(8, SHORT + 12, 5, 8, SHORT, SHORT + 1, 3), 421, 421),
    "two pairs": (
        [
            Segment(0, 9, 0), Segment(9, 3, 9, c_start=0, c_len=5),
            Segment(12, 2, 12), Segment(14, 6, 14, c_start=12, c_len=1),
        ],
        20, 20,
    ),
    "one prompt, three answers": (
        [
            Segment(0, 11, 0), Segment(11, 2, 11, c_start=0, c_len=7),
            Segment(13, 9, 13, c_start=0, c_len=7), Segment(22, 1, 22, c_start=0, c_len=7),
        ],
        23, 23,
    ),
    "contexts that overlap, in no order": (
        [
            Segment(0, 12, 0), Segment(12, 3, 12, c_start=4, c_len=8),
            Segment(15, 5, 15, c_start=0, c_len=6), Segment(20, 2, 20, c_start=2, c_len=9),
        ],
        22, 22,
    ),
    "context behind its reader": (
        [Segment(0, 4, 0, c_start=4, c_len=5), Segment(4, 8, 4)], 12, 12,
    ),
    "long context": ([Segment(0, 150, 0), Segment(150, 140, 150, c_start=0, c_len=131)], 290, 290),
    "lead": ([Segment(0, 4, 0, lead=6)], 4, 10),
    "leads": ([Segment(0, 4, 0, lead=6), Segment(4, 1, 10, lead=2)], 5, 13),
    "lead and context": (
        [Segment(0, 3, 0, lead=4), Segment(3, 2, 7, lead=3, c_start=0, c_len=5)], 5, 12,
    ),
    "keys behind the last query": ([Segment(0, 6, 0)], 6, 9),
    "keys between": ([Segment(0, 3, 1), Segment(3, 2, 7, lead=1)], 5, 12),
    "nobody's keys, a context of nobody's": (
        [Segment(0, 3, 8, c_start=2, c_len=4), Segment(3, 130, 12)], 133, 145,
    ),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
heads = pytest.mark.parametrize(("h", "j"), [(4, 2), (3, 3), (6, 1)], ids=["gqa", "mha", "mqa"])
Case = tuple[list[Segment], int, int]


def seen(case: Case) -> torch.Tensor:
    """The rule of the module's docstring, query by query."""
    segments, queries, keys = case
    seen_UT = torch.zeros(queries, keys, dtype=torch.bool)
    for s in segments:
        for n in range(s.q_len):
            seen_UT[s.q_start + n, s.c_start : s.c_start + s.c_len] = True
            seen_UT[s.q_start + n, s.k_start : s.k_start + s.lead + n + 1] = True
    return seen_UT


def inputs(case: Case, h: int, j: int, dtype: torch.dtype, normal: Normal) -> list[torch.Tensor]:
    """q, k, v and d out."""
    _, queries, keys = case
    shapes = [(queries, h, WIDTH), (keys, j, WIDTH), (keys, j, WIDTH), (queries, h, WIDTH)]
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


def definition(case: Case, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv of the dense mask under autograd, in the tensors' dtype."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out, lse = reference.attention(*leaves, seen(case).to(tensors[0].device), SCALE)  # type: ignore[call-arg]
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def planned(case: Case, tensors: Sequence[torch.Tensor], plan: Plan) -> list[torch.Tensor]:
    """The same by the plan's calls, the gradients written into strided, poisoned buffers."""
    q, k, v, dout = tensors
    out, lse = forward(q, k, v, plan, SCALE)
    # As the layer has them: neighbouring heads of one buffer for keys and values, more around.
    h, j = q.shape[1], k.shape[1]
    dq = torch.full((len(q), h + 2, WIDTH), torch.nan, dtype=q.dtype, device=q.device)
    dkv = torch.full((len(k), 2 * j + 1, WIDTH), torch.nan, dtype=q.dtype, device=q.device)
    grads = (dq[:, :h], dkv[:, :j], dkv[:, j : 2 * j])
    backward_(dout, q, k, v, out, lse, plan, SCALE, grads)
    assert dq[:, h:].isnan().all() and dkv[:, 2 * j :].isnan().all(), "written beside"
    return [out, lse, *grads]


def assert_all_close(found: list[torch.Tensor], truth: list[torch.Tensor]) -> None:
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), found, truth, strict=True):
        error = ((x - y).norm() / y.norm().clamp_min(1)).item()
        assert x.shape == y.shape and error <= LIMIT_FP64, f"{name}: {error:.2g}"


@cases
@heads
def test_equals_the_definition_in_fp64(case: Case, h: int, j: int, device, normal: Normal) -> None:
    plan = make_plan(*case, device)
    assert torch.equal(plan.seen(CPU), seen(case))
    tensors = inputs(case, h, j, torch.float64, normal)
    assert_all_close(planned(case, tensors, plan), definition(case, tensors))


def eager(case: Case, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """out, lse, dq, dk, dv as written down, every step in the tensors' dtype."""
    q, k, v = leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    head_of = torch.arange(q.shape[1], device=q.device) // (q.shape[1] // k.shape[1])
    scores_HUT = torch.einsum("uhd,thd->hut", q, k[:, head_of]) * SCALE
    scores_HUT = scores_HUT.masked_fill(~seen(case).to(q.device), -torch.inf)
    out = torch.einsum("hut,thd->uhd", scores_HUT.softmax(-1), v[:, head_of])
    lse = scores_HUT.detach().logsumexp(-1).T.float()
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, tensors[3])]


@cases
def test_as_close_as_eager(case: Case, dtype: torch.dtype, device, normal: Normal) -> None:
    """Where each query sees one key, dq and dk are 0, and eager finds that without rounding."""
    tensors = inputs(case, 4, 2, dtype, normal)
    found = planned(case, tensors, make_plan(*case, device))
    truth, plain = definition(case, [x.double() for x in tensors]), eager(case, tensors)
    has_choice = bool((seen(case).sum(1) > 1).any())
    for at in range(5) if has_choice else (0, 1, 4):
        assert_within(found[at], truth[at], plain[at])


@cases
def test_strided_queries_and_keys(case: Case, device, normal: Normal) -> None:
    """As they come: heads of one product's output."""
    tensors = inputs(case, 4, 2, torch.float64, normal)
    wide = [torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]] for x in tensors]
    plan = make_plan(*case, device)
    assert_all_close(planned(case, wide, plan), planned(case, tensors, plan))


@cases
def test_under_autograd(case: Case, device, normal: Normal) -> None:
    tensors = inputs(case, 4, 2, torch.float64, normal)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    out = attention(*leaves, make_plan(*case, device), SCALE)  # type: ignore[call-arg]
    truth = definition(case, tensors)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    for x, y in zip((out, *grads), (truth[0], *truth[2:]), strict=True):
        assert (x - y).norm() <= LIMIT_FP64 * y.norm().clamp_min(1)


@cases
def test_twice_the_same_bits(case: Case, dtype: torch.dtype, device, normal: Normal) -> None:
    tensors, plan = inputs(case, 4, 2, dtype, normal), make_plan(*case, device)
    one, two = (planned(case, tensors, plan) for _ in range(2))
    if device.type == "cuda":  # where flash attention adds dq by atomics
        torch.testing.assert_close(one[1], two[1])
        one, two = (one[0], *one[2:]), (two[0], *two[2:])
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_goes_alone_and_what_is_gathered() -> None:
    lengths = (1, 7, 8, 9, 9, 64, SHORT - 1, SHORT, SHORT + 1, 1000)
    plan = make_plan(rows(*lengths), sum(lengths), sum(lengths), CPU)
    assert sorted(n for *_, n in plan.spans) == [64, SHORT + 1, 1000]
    assert [b.shape for b in plan.batches] == [(3, 8), (2, 16), (2, SHORT)]
    assert plan.varlen is None and plan.contexts == ()
    padding = sum(b.queries.numel() - b.real.numel() for b in plan.batches)
    assert padding < LENGTH_STEP * sum(b.shape[0] for b in plan.batches)


def test_a_context_and_a_lead_are_two_calls_without_a_mask() -> None:
    segments, queries, keys = CASES["lead and context"]
    plan = make_plan(segments, queries, keys, CPU)
    assert plan.contexts == ((0, 3, 0, 4), (3, 2, 0, 5), (3, 2, 7, 3))


# ---------------------------------------------------------------- one variable-length call


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's flash operations in dense fp64: causal from the bottom right, segment by segment.

    What the real ones leave unwritten, rows that belong to no segment, is NaN.
    """

    def segment(plan_of: Any, n: int, h: int, j: int, q: Any, k: Any, v: Any, scale: float) -> Any:
        cu_q, cu_k = plan_of
        at, to = slice(*cu_q[n : n + 2].tolist()), slice(*cu_k[n : n + 2].tolist())
        queries, keys = at.stop - at.start, to.stop - to.start
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        return at, to, reference.attention(q[at], k[to], v[to], mask, scale)

    def fwd(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout, causal, debug, *, scale):
        check(q, k, v, cu_q, cu_k, longest_q, longest_k)
        assert (dropout, causal, debug) == (0.0, True, False)
        out = torch.full_like(q, torch.nan)
        lse_HU = q.new_full((q.shape[1], len(q)), torch.nan)
        for n in range(len(cu_q) - 1):
            at, _, (part, lse) = segment((cu_q, cu_k), n, *heads_of(q, k), q, k, v, scale)
            out[at], lse_HU[:, at] = part, lse.T
        return out, lse_HU, *(torch.empty(0),) * 3

    def bwd(dout, q, k, v, out, lse_HU, cu_q, cu_k, longest_q, longest_k, *rest, scale):
        check(q, k, v, cu_q, cu_k, longest_q, longest_k)
        assert dout.is_contiguous() and lse_HU.is_contiguous() and rest[:2] == (0.0, True)
        truth, lse_truth, *_ = fwd(
            q, k, v, cu_q, cu_k, longest_q, longest_k, 0.0, True, False, scale=scale
        )
        torch.testing.assert_close(out, truth), torch.testing.assert_close(lse_HU, lse_truth)
        grads = [torch.full_like(x, torch.nan) for x in (q, k, v)]
        for n in range(len(cu_q) - 1):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                at, to, (part, _) = segment((cu_q, cu_k), n, *heads_of(q, k), *leaves, scale)
            found = torch.autograd.grad(part, leaves, dout[at])
            for grad, x, place in zip(grads, found, (at, to, to), strict=True):
                grad[place] = x[place]
        return grads

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", fwd)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", bwd)


def heads_of(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int]:
    return q.shape[1], k.shape[1]


def check(q, k, v, cu_q, cu_k, longest_q: int, longest_k: int) -> None:
    """What the real operations ask of their arguments, or read past the end without."""
    for cu, x, longest in ((cu_q, q, longest_q), (cu_k, k, longest_k)):
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] <= len(x)
        assert cu.diff().max() == longest and cu.diff().min() > 0
    assert k.shape == v.shape and all(x.stride(-1) == 1 for x in (q, k, v))


@cases
def test_one_variable_length_call_is_the_definition(
    case: Case, emulated: None, normal: Normal, device: torch.device
) -> None:
    """The plan of the GPU and the sum of the copies' gradients, the call itself emulated."""
    if device.type != "cpu":
        pytest.skip("the call itself is there")
    tensors = inputs(case, 4, 2, torch.float64, normal)
    q, k, v, dout = tensors
    plan = varlen.plan(case[0], case[2], CPU)
    out, lse = _flash.forward(q, k, v, plan, SCALE)
    buffers = [torch.full((len(x), 3, *x.shape[1:]), torch.nan).double() for x in (q, k, v)]
    grads = (buffers[0][:, 1], buffers[1][:, 1], buffers[2][:, 1])
    _flash.backward_(dout, q, k, v, out, lse, plan, SCALE, grads)
    assert_all_close([out, lse, *grads], definition(case, tensors))


def test_documents_in_a_row_are_not_copied() -> None:
    plan = varlen.plan(rows(5, 1, 9), 15, CPU)
    assert plan.key_rows is None and plan.q_lengths == plan.k_lengths == (5, 1, 9)
    assert plan.cu_q.tolist() == plan.cu_k.tolist() == [0, 5, 6, 15]


def test_a_prompt_is_copied_once_an_answer() -> None:
    segments, _, _ = CASES["one prompt, three answers"]
    plan = varlen.plan(segments, 23, CPU)
    assert plan.key_rows is not None
    copies = torch.bincount(plan.key_rows, minlength=23)
    assert copies.tolist() == [4] * 7 + [1] * 16
    assert (plan.longest_q, plan.longest_k) == (11, 16)


def test_where_a_kernel_computes_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision, heads of 8 to 256 in steps of 8, Ampere and later; a CPU has one for all."""
    gpu = torch.device("cuda")
    for major, wanted in ((8, "flash"), (7, "dense")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, at=major: (at, 0))
        assert computed_by(gpu, torch.bfloat16, 128) == wanted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert {computed_by(gpu, torch.bfloat16, width) for width in (4, 100, 264)} == {"dense"}
    assert computed_by(gpu, torch.float32, 128) == "dense"
    assert computed_by(CPU, torch.float32, 100) == "flash"


# ---------------------------------------------------------------- by xformers


@pytest.fixture
def xformers() -> Iterator[None]:
    """The choice of xformers, where it is installed."""
    pytest.importorskip("xformers.ops.fmha", reason="xformers is not installed")
    before = use("xformers")
    yield
    use(before)


@cases
def test_xformers_mask_is_the_rule(case: Case, xformers: None) -> None:
    """Its own mask, written out: gathered key by gathered key who is seen."""
    segments, queries, n_keys = case
    plan = varlen.plan(segments, n_keys, CPU)
    bias_UK = _xformers.mask(plan.q_lengths, plan.k_lengths, CPU).materialize(
        (queries, sum(plan.k_lengths))
    )
    tokens = torch.arange(n_keys) if plan.key_rows is None else plan.key_rows
    seen_UT = torch.zeros(queries, n_keys, dtype=torch.int64)
    seen_UT.index_add_(1, tokens, (bias_UK == 0).long())
    assert torch.equal(seen_UT, seen(case).long()), "each key once, or not at all"


@heads
def test_copies_of_key_heads_and_their_gradients(h: int, j: int, normal: Normal, device) -> None:
    """Attention to a copy for every query head, its gradients summed: that to the shared head."""
    case = CASES["two pairs"]
    q, k, v, dout = inputs(case, h, j, torch.float64, normal)
    keys, values = (_xformers.head_copies(x, h // j) for x in (k, v))
    out, lse, dq, dkeys, dvalues = definition(case, [q, keys, values, dout])
    dk, dv = (_xformers.sum_of_copies(x, h // j) for x in (dkeys, dvalues))
    assert_all_close([out, lse, dq, dk, dv], definition(case, [q, k, v, dout]))


def test_copies_are_summed_before_they_are_rounded() -> None:
    grads_THD = torch.tensor([1.0, 2**-8, 2**-8, 2**-8]).bfloat16().view(1, 4, 1)
    found = _xformers.sum_of_copies(grads_THD, 4)
    assert found.item() == torch.tensor(1 + 3 * 2**-8).bfloat16().item() != 1.0


def test_xformers_computes_nothing_on_a_cpu(xformers: None) -> None:
    assert not _xformers.computes(CPU, torch.float32, WIDTH)


def test_xformers_that_is_not_there_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    _xformers.fmha.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "xformers.ops.fmha", None)
        with pytest.raises(ImportError, match="xformers"):
            use("xformers")
    assert use("flash") == "flash"


@heads
def test_xformers_is_as_close_as_eager(h: int, j: int, xformers, device, normal) -> None:
    if device.type != "cuda":
        pytest.skip("xformers computes on a GPU only")
    assert computed_by(device, torch.bfloat16, WIDTH) == "xformers"
    for case in CASES.values():
        tensors = inputs(case, h, j, torch.bfloat16, normal)
        found = planned(case, tensors, make_plan(*case, device))
        truth, plain = definition(case, [x.double() for x in tensors]), eager(case, tensors)
        has_choice = bool((seen(case).sum(1) > 1).any())
        for at in (0, 2, 3, 4) if has_choice else (0, 4):  # its lse lies in a way of its own
            assert_within(found[at], truth[at], plain[at])
