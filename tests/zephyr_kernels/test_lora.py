"""LoRA's products against fp64, masks against finite differences, augmented K against two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from tolerance import assert_within
from torch.utils._python_dispatch import TorchDispatchMode
from zephyr_kernels import lora, reference
from zephyr_kernels.lora import (
    Dropout,
    Span,
    a_backward,
    input_backward_,
    linear,
    linear_backward,
    rank_backward,
    shrink,
)

A, B, C = Dropout(0.05, 1), Dropout(0.3, 2**40 + 9), Dropout(0.5, 3)

# T, I, N, R and the spans of R: one row, ragged, no rows, q/k/v of one input, plain rows between,
# more than a launch holds, a rank that no single block covers.
CASES: dict[str, tuple[tuple[int, int, int, int], list[Span]]] = {
    "plain": ((37, 51, 45, 13), []),
    "one row": ((1, 33, 17, 5), [(0, 5, B)]),
    "no rows": ((0, 8, 9, 4), [(0, 4, B)]),
    "rank one": ((40, 64, 32, 1), [(0, 1, A)]),
    "q, k, v": ((33, 130, 20, 48), [(0, 16, A), (16, 32, B), (32, 48, C)]),
    "some rows": ((37, 51, 45, 13), [(9, 12, B), (1, 4, A)]),
    "four": ((20, 40, 24, 9), [(0, 2, A), (2, 4, B), (4, 6, C), (7, 9, A)]),
    "rank 150": ((17, 35, 12, 150), [(3, 150, B)]),
}
cases = pytest.mark.parametrize(("sizes", "spans"), CASES.values(), ids=list(CASES))
Sizes = tuple[int, int, int, int]
Normal = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def _several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test is large enough for two programs of the sizes that suit a GPU."""
    monkeypatch.setattr(lora, "A_CHUNK_T", 32)
    monkeypatch.setattr(lora, "RANK_CHUNK_T", 32)
    monkeypatch.setattr(lora, "RANK_BLOCK_N", 64)


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """What an operation allocates and does not write shows as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def factors(x_TI: torch.Tensor, rank: int, spans: Sequence[Span]) -> torch.Tensor:
    """fp64 [R, T, I]: what each row of A sees X multiplied with."""
    factor_RTI = torch.ones(rank, *x_TI.shape, dtype=torch.float64, device=x_TI.device)
    for start, stop, dropout in spans:
        mask = reference.dropout_mask(dropout.seed, dropout.rate, *x_TI.shape, x_TI.device)
        factor_RTI[start:stop] = mask * dropout.scale
    return factor_RTI


@cases
def test_shrink(sizes: Sizes, spans: list[Span], dtype: torch.dtype, normal: Normal) -> None:
    tokens, width, _, rank = sizes
    x, a = normal(tokens, width, dtype=dtype), normal(rank, width, dtype=dtype, seed=1)
    factor = factors(x, rank, spans)
    truth = torch.einsum("ti,rti,ri->tr", x.double(), factor, a.double())
    eager = torch.einsum("rti,ri->tr", x * factor.to(dtype), a)
    found = shrink(x, a, spans)
    assert_within(found, truth, eager)
    assert torch.equal(found, shrink(x, a, spans)), "twice the same"


@cases
def test_a_backward(sizes: Sizes, spans: list[Span], dtype: torch.dtype, normal: Normal) -> None:
    tokens, width, _, rank = sizes
    x, ds = normal(tokens, width, dtype=dtype), normal(tokens, rank, dtype=dtype, seed=1)
    factor = factors(x, rank, spans)
    truth = torch.einsum("ti,rti,tr->ri", x.double(), factor, ds.double())
    found = a_backward(ds, x, spans)
    assert_within(
        found, truth, torch.einsum("ti,rti,tr->ri", x.float(), factor.float(), ds.float())
    )
    assert torch.equal(found, a_backward(ds, x, spans)), "twice the same"


@cases
def test_input_backward(
    sizes: Sizes, spans: list[Span], dtype: torch.dtype, normal: Normal
) -> None:
    tokens, width, _, rank = sizes
    before = normal(tokens, width, dtype=dtype)
    ds, a = normal(tokens, rank, dtype=dtype, seed=1), normal(rank, width, dtype=dtype, seed=2)
    factor = factors(before, rank, spans)
    truth = before.double() + torch.einsum("tr,rti,ri->ti", ds.double(), factor, a.double())
    eager = before + torch.einsum("tr,rti,ri->ti", ds, factor.to(dtype), a)
    found = before.clone()
    input_backward_(found, ds, a, spans)
    assert_within(found, truth, eager)
    again = before.clone()
    input_backward_(again, ds, a, spans)
    assert torch.equal(found, again), "twice the same"


@pytest.mark.parametrize("one_read", [True, False])
@pytest.mark.parametrize("sizes", [(1, 17, 5), (0, 9, 4), (70, 90, 13), (64, 64, 16), (5, 33, 1)])
def test_rank_backward(
    sizes: tuple[int, int, int],
    one_read: bool,
    dtype: torch.dtype,
    normal: Normal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora, "_one_read_pays", lambda *_: one_read)
    tokens, width, rank = sizes
    dy, s, b = (
        normal(*shape, dtype=dtype, seed=i)
        for i, shape in enumerate([(tokens, width), (tokens, rank), (width, rank)])
    )
    ds, db = rank_backward(dy, s, b, True)
    assert db is not None
    assert_within(ds, dy.double() @ b.double(), dy @ b)
    assert_within(db, dy.double().T @ s.double(), dy.float().T @ s.float())
    ds_again, db_again = rank_backward(dy, s, b, True)
    assert db_again is not None
    assert torch.equal(ds, ds_again) and torch.equal(db, db_again), "twice the same"


def test_rank_backward_of_a_frozen_b(dtype: torch.dtype, normal: Normal) -> None:
    dy, s, b = (normal(*shape, dtype=dtype) for shape in ((6, 40), (6, 3), (40, 3)))
    ds, db = rank_backward(dy, s, b, False)
    assert db is None
    assert_within(ds, dy.double() @ b.double(), dy @ b)


def test_rank_backward_of_the_columns_that_train(
    dtype: torch.dtype, normal: Normal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "_one_read_pays", lambda *_: True)
    dy, s, b = (normal(*shape, dtype=dtype) for shape in ((6, 40), (6, 8), (40, 8)))
    ds, db = rank_backward(dy, s[:, 3:7], b, True)
    assert db is not None
    assert_within(ds, dy.double() @ b.double(), dy @ b)
    assert_within(db, dy.double().T @ s[:, 3:7].double(), dy.float().T @ s[:, 3:7].float())


@pytest.mark.parametrize(
    ("tokens", "width", "rank", "dtype", "pays"),
    [
        (4096, 4096, 16, torch.bfloat16, True),
        (4096, 14336, 16, torch.bfloat16, True),
        (4096, 4096, 128, torch.bfloat16, False),
        (4096, 4096, 32, torch.bfloat16, False),
        (4096, 4096, 16, torch.float32, False),
        (1, 4096, 16, torch.bfloat16, False),
    ],
)
def test_one_read_of_dy_is_taken_where_it_moves_less(
    tokens: int,
    width: int,
    rank: int,
    dtype: torch.dtype,
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    dy = torch.empty(tokens, width, dtype=dtype, device="meta")
    assert lora._one_read_pays(dy, rank) is pays


def test_column_slices_stay_within_their_columns(
    dtype: torch.dtype, normal: Normal, poisoned: Callable[..., Any]
) -> None:
    """Every operand a slice of a buffer of NaN: none is read from it, none written to it."""
    same = torch.testing.assert_close  # cuBLAS and BLAS may sum in another order
    tokens, width, rank = 37, 50, 12
    spans = [(0, 4, A), (6, 12, B)]

    def sliced(rows: int, columns: int, seed: int) -> torch.Tensor:
        view, _ = poisoned(rows, columns, dtype)
        return view.copy_(normal(rows, columns, dtype=dtype, seed=seed))

    x, a, ds, dx = (
        sliced(*shape, seed)
        for seed, shape in enumerate(
            [(tokens, width), (rank, width), (tokens, rank), (tokens, width)]
        )
    )
    whole = [view.contiguous() for view in (x, a, ds, dx)]
    same(shrink(x, a, spans), shrink(whole[0], whole[1], spans))
    same(a_backward(ds, x, spans), a_backward(whole[2], whole[0], spans))
    input_backward_(dx, ds, a, spans)
    input_backward_(whole[3], whole[2], whole[1], spans)
    same(dx, whole[3])
    assert dx._base is not None and dx._base[:, width:].isnan().all()


class _LoraLinear(torch.autograd.Function):
    """Y = X W' + S B' by the operations, as a layer strings them together."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> torch.Tensor:
        x, w, a, b, spans = args
        s = shrink(x, a, spans)
        ctx.save_for_backward(x, w, a, b, s)
        ctx.spans = spans
        return linear(x, w, s, b)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, w, a, b, s = ctx.saved_tensors
        dy = grads[0].contiguous()
        ds, db = rank_backward(dy, s, b, True)
        dx = dy @ w
        input_backward_(dx, ds, a, ctx.spans)
        return dx, None, a_backward(ds, x, ctx.spans), db, None


@cases
def test_gradients_are_those_of_finite_differences(
    sizes: Sizes, spans: list[Span], device: torch.device, normal: Normal
) -> None:
    """In fp64: a backward with another mask than the forward's would differ."""
    tokens, width, outputs, rank = min(sizes[0], 3), min(sizes[1], 7), 5, min(sizes[3], 13)
    spans = [(start, min(stop, rank), d) for start, stop, d in spans if start < rank]
    shapes = [(tokens, width), (outputs, width), (rank, width), (outputs, rank)]
    x, w, a, b = (normal(*s, dtype=torch.float64, seed=i) for i, s in enumerate(shapes))
    trained = [leaf.requires_grad_() for leaf in (x, a, b)]

    def of_leaves(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
        return _LoraLinear.apply(x, w, a, b, spans)

    assert torch.autograd.gradcheck(of_leaves, trained)


# ---------------------------------------------------------------- linear


class Products(TorchDispatchMode):
    """Names of the matrix products that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if "mm" in name:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", ["apart", "after", "before", "gap", "crossed"])
@pytest.mark.parametrize("sizes", [(7, 20, 9, 5), (1, 4, 4, 4), (0, 6, 5, 2)], ids=str)
def test_linear(
    layout: str, sizes: Sizes, dtype: torch.dtype, normal: Normal, poisoned: Callable[..., Any]
) -> None:
    """Neighbouring columns in one order are one product, everything else two; the same result."""
    tokens, width, outputs, rank = sizes
    shapes = [(tokens, width), (outputs, width), (tokens, rank), (outputs, rank)]
    x, w, s, b = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    truth = x.double() @ w.double().T + s.double() @ b.double().T
    eager = x @ w.T + s @ b.T

    def beside(left: torch.Tensor, right: torch.Tensor, gap: int = 0) -> list[torch.Tensor]:
        nan = left.new_full((len(left), gap), torch.nan)
        both = torch.cat([left, nan, right], 1)
        return [both[:, : left.shape[1]], both[:, left.shape[1] + gap :]]

    if layout in ("after", "crossed", "gap"):
        x, s = beside(x, s, gap=1 if layout == "gap" else 0)
    if layout in ("after", "gap"):
        w, b = beside(w, b)
    if layout in ("before", "crossed"):
        b, w = beside(b, w)
    if layout == "before":
        s, x = beside(s, x)
    out, rest = poisoned(tokens, outputs, dtype)
    with Products() as ran:
        found = linear(x, w, s, b, out)
    assert found.data_ptr() == out.data_ptr()
    assert_within(out, truth, eager)
    assert rest.isnan().all()
    assert_within(linear(x, w, s, b), truth, eager)
    if tokens:  # an empty tensor lies nowhere
        assert ran.names == (["mm"] if layout in ("after", "before") else ["mm", "addmm_"])


@pytest.mark.parametrize("layout", ["apart", "joined", "gap in columns", "gap in rows", "narrow"])
@pytest.mark.parametrize(
    "sizes", [(7, 20, 9, 5), (1, 4, 4, 4), (0, 6, 5, 2), (3, 8, 8, 0)], ids=str
)
def test_linear_backward(
    layout: str, sizes: Sizes, dtype: torch.dtype, normal: Normal, poisoned: Callable[..., Any]
) -> None:
    """dS behind dY and A below W are one product, everything else two; the same result."""
    tokens, width, outputs, rank = sizes
    shapes = [(tokens, outputs), (outputs, width), (tokens, rank), (rank, width)]
    dy, w, ds, a = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
    truth = dy.double() @ w.double() + ds.double() @ a.double()
    eager = dy @ w + ds @ a
    if layout != "apart":
        behind = outputs + (layout == "gap in columns")
        below = outputs + (layout == "gap in rows")
        rows = dy.new_full((tokens, behind + rank), torch.nan)
        border = dy.new_full((below + rank, width + (layout != "narrow")), torch.nan)
        rows[:, :outputs], rows[:, behind:] = dy, ds
        border[:outputs, :width], border[below:, :width] = w, a
        dy, ds = rows[:, :outputs], rows[:, behind:]
        w, a = border[:outputs, :width], border[below:, :width]
    out, rest = poisoned(tokens, width, dtype=dtype)
    with Products() as ran:
        found = linear_backward(dy, w, ds, a, out)
    assert found.data_ptr() == out.data_ptr()
    assert_within(out, truth, eager)
    assert rest.isnan().all()
    assert_within(linear_backward(dy, w, ds, a), truth, eager)
    if tokens and rank:
        assert ran.names == (["mm"] if layout in ("joined", "narrow") else ["mm", "addmm_"])


def test_neighbours_at_another_stride_are_not_joined(normal: Normal) -> None:
    """s begins where x's first row ends, but its rows lie twice as far apart."""
    buffer = normal(60)
    x, s = buffer.as_strided((3, 4), (10, 1)), buffer.as_strided((3, 2), (20, 1), 4)
    w, b = normal(5, 6, seed=1).split([4, 2], 1)
    torch.testing.assert_close(linear(x, w, s, b), x @ w.T + s @ b.T)


def test_neighbours_of_two_allocations_are_not_joined() -> None:
    """One row each, and what follows x in memory happens to be s."""
    memory = bytearray(torch.arange(6.0).numpy().tobytes())
    x = torch.frombuffer(memory, dtype=torch.float32, count=4).as_strided((1, 4), (6, 1))
    s = torch.frombuffer(memory, dtype=torch.float32, offset=16).as_strided((1, 2), (6, 1))
    w, b = torch.ones(5, 6).split([4, 2], 1)
    assert linear(x, w, s, b).tolist() == [[15.0] * 5]


def test_linear_without_adapters(dtype: torch.dtype, normal: Normal) -> None:
    x, w = normal(5, 8, dtype=dtype), normal(3, 8, dtype=dtype, seed=1)
    empty = linear(x, w, normal(5, 0, dtype=dtype), normal(3, 0, dtype=dtype))
    assert torch.equal(empty, torch.mm(x, w.T))
    assert shrink(x, normal(0, 8, dtype=dtype)).shape == (5, 0)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("spans", [[(0, 3, A), (2, 4, B)], [(3, 6, A)], [(-1, 2, A)], [(3, 1, A)]])
def test_spans_that_overlap_or_leave_the_rank_are_refused(
    spans: list[Span], normal: Normal
) -> None:
    with pytest.raises(ValueError, match="spans"):
        shrink(normal(4, 8), normal(5, 8), spans)


def test_operands_that_a_kernel_would_read_past_are_refused() -> None:
    """PyTorch's own products check their shapes; the launchers do this."""
    x_TI, a_RI = torch.zeros(4, 8), torch.zeros(5, 9)
    lora._check(TI=x_TI, TR=torch.zeros(4, 5), RI=a_RI[:, :8])
    with pytest.raises(ValueError, match="I must be 8"):
        lora._check(TI=x_TI, RI=a_RI)
    with pytest.raises(ValueError, match="contiguous"):
        lora._check(TI=x_TI.T)
