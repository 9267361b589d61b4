"""The head against its definition: values, gradients, sure tokens, soft cap, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_within
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from zephyr_kernels import backend, linear_logprob
from zephyr_kernels.linear_logprob import log_probs
from zephyr_kernels.reference import linear_log_probs, logits_of

CHUNKS = (1, 3, 7, 8, 64)  # one row at a time, a ragged last chunk, exactly all, more than all
CAPS = pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
Head = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture(autouse=True, params=[(1024, 1600), (3, 5)], ids=["tiles", "small-tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in tiles that hold it whole, and in tiles that cut both ways raggedly."""
    for name, size in zip(("TILE_ROWS", "TILE_VOCAB"), request.param, strict=True):
        monkeypatch.setattr(linear_logprob, name, size)


def problem(
    n: int, width: int, vocab: int, dtype: torch.dtype, device: Any = "cpu", sure: bool = False
) -> Head:
    """(hidden, head, targets); sure rows give their target from 0.9 to 1 - 1e-6."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5
    target = torch.randint(0, vocab, (n,), generator=generator)
    if sure:
        pull = torch.linspace(8, 20, n, dtype=torch.float64)[:, None]
        hidden = pull * torch.nn.functional.normalize(head[target], dim=-1) + 0.2 * hidden
    return hidden.to(device, dtype), head.to(device, dtype), target.to(device)


def results(
    function: Callable[..., torch.Tensor], problem: Head, dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and the gradient of their weighted sum, computed in `dtype`."""
    hidden, head, target = problem
    leaf = hidden.detach().to(dtype).requires_grad_()
    logp = function(leaf, head.to(dtype), target, **options)
    logp.backward(torch.linspace(-1, 2, len(target), device=logp.device).to(logp.dtype))
    assert leaf.grad is not None
    return logp.detach(), leaf.grad


@CAPS
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradient_is_right_in_fp64(
    chunk_rows: int, softcap: float | None, device: torch.device
) -> None:
    """With rows that occur twice, as the prompt's last token does."""
    hidden, head, target = problem(7, 5, 11, torch.float64, device)
    rows = torch.tensor([0, 0, 2, 6, 5, 3, 3], device=device)
    hidden.requires_grad_()

    def of_rows(h: torch.Tensor) -> torch.Tensor:
        return log_probs(h[rows], head, target, chunk_rows=chunk_rows, softcap=softcap)

    assert torch.autograd.gradcheck(of_rows, (hidden,))


@CAPS
@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_equals_its_definition(chunk_rows: int, softcap: float | None) -> None:
    hidden, head, target = problem(8, 16, 50, torch.float64)
    found = log_probs(hidden, head, target, chunk_rows=chunk_rows, softcap=softcap)
    truth = linear_log_probs(hidden, head, target, softcap)
    assert (found - truth).abs().max() < 1e-13
    by_logits = logits_of(hidden, head, softcap).log_softmax(-1).gather(1, target[:, None])
    assert (by_logits.squeeze(1) - truth).abs().max() < 1e-13
    trained = log_probs(
        hidden.requires_grad_(), head, target, chunk_rows=chunk_rows, softcap=softcap
    )
    assert torch.equal(trained.detach(), found), "training changes no value"


# One token, one row, a block and a bit more, more than one block of the row kernel.
@CAPS
@pytest.mark.parametrize("sizes", [(3, 4, 1), (1, 7, 16), (9, 33, 65), (5, 8, 4100)], ids=str)
def test_error_is_no_worse_than_twice_the_frameworks(
    sizes: tuple[int, int, int], softcap: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Also in memory full of NaN, and twice the same bits."""
    given = problem(*sizes, dtype, device)
    truth = results(linear_log_probs, given, torch.float64, softcap=softcap)
    theirs = results(linear_log_probs, given, dtype, softcap=softcap)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ours = results(log_probs, given, dtype, chunk_rows=4, softcap=softcap)
        again = results(log_probs, given, dtype, chunk_rows=4, softcap=softcap)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_within(ours[0], truth[0], theirs[0])
    # Of one rounding of the gradient: eager's product is fp32 throughout and rounds only the end.
    rounding = truth[1].to(dtype).double() * (1 + torch.finfo(dtype).eps)
    eager_like = theirs[1] if dtype == torch.float32 else rounding.to(dtype)
    assert_within(ours[1], truth[1], eager_like)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


# Not fp16: the smallest share that it can hold is 6e-8.
@CAPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_sure_tokens_keep_their_gradient(
    softcap: float | None, dtype: torch.dtype, device: torch.device
) -> None:
    """softmax - onehot of a token at 1 - 1e-6 is far below the rounding of either."""
    given = problem(40, 64, 300, dtype, device, sure=True)
    cap = None if softcap is None else 40.0
    truth, logp_grad = results(linear_log_probs, given, torch.float64, softcap=cap)
    ours, grad = results(log_probs, given, dtype, chunk_rows=16, softcap=cap)
    assert truth.max() > -1e-4 and truth.min() > -3
    assert ((ours - truth).abs() <= 1e-6 + 1e-4 * truth.abs()).all()
    errors = (grad.double() - logp_grad).norm(dim=1)
    worst = (errors / logp_grad.norm(dim=1)).nan_to_num().max().item()
    assert worst < (1e-4 if dtype == torch.float32 else 2**-7)


def test_the_largest_logit_may_stand_in_any_block(device: torch.device) -> None:
    """Rising and falling rows over three blocks of the row kernel: a running sum is rescaled."""
    vocab = 2 * 4096 + 100
    head = torch.linspace(-9, 9, vocab, dtype=torch.float64, device=device)[:, None]
    hidden = torch.tensor([[1.0], [-1.0], [0.01]], dtype=torch.float64, device=device)
    given = (hidden, head, torch.tensor([5000, 3, vocab - 1], device=device))
    for ours, truth in zip(
        results(log_probs, given, torch.float32),
        results(linear_log_probs, given, torch.float64),
        strict=True,
    ):
        assert ((ours - truth).abs() <= 1e-4 * truth.abs()).all()


@pytest.mark.parametrize("far", [50.0, 200.0, 3e4])
def test_hopeless_tokens_stay_finite(far: float, device: torch.device) -> None:
    """A target whose probability underflows still has its log-prob and a full gradient."""
    hidden = torch.tensor([[1.0, 0.0]], device=device, requires_grad=True)
    head = torch.tensor([[far, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=device)
    logp = log_probs(hidden, head, torch.tensor([1], device=device))
    logp.sum().backward()
    assert logp.item() == pytest.approx(-far, rel=1e-6)
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [pytest.approx([-far, 1.0], rel=1e-6)]


def test_hidden_may_be_a_slice(device: torch.device) -> None:
    hidden, head, target = problem(6, 10, 20, torch.float32, device)
    wide = torch.full((6, 13), torch.nan, device=device)
    wide[:, :10] = hidden
    whole = results(log_probs, (hidden, head, target), torch.float32)
    sliced = results(log_probs, (wide[:, :10], head, target), torch.float32)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(whole, sliced, strict=True))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@CAPS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_logits_never_exist(
    dtype: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, width, vocab, chunk_rows = 300, 16, 500, 30
    monkeypatch.setattr(linear_logprob, "TILE_ROWS", 60)
    monkeypatch.setattr(linear_logprob, "TILE_VOCAB", 200)
    tile = 60 * 200 if dtype == torch.float32 else chunk_rows * vocab
    hidden, head, target = problem(n, width, vocab, dtype)
    saved: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    )
    options = {"chunk_rows": chunk_rows, "softcap": softcap}
    with backend.using("torch"), Largest() as largest, hooks:
        log_probs(hidden.requires_grad_(), head, target, **options).sum().backward()
    assert saved == [(n, width)]
    assert largest.elements == tile


@pytest.mark.parametrize("needs_grad", [False, True])
def test_no_rows_at_all(needs_grad: bool, device: torch.device) -> None:
    hidden, head, target = problem(0, 4, 9, torch.float32, device)
    logp = log_probs(hidden.requires_grad_(needs_grad), head, target)
    assert logp.shape == (0,)
    if needs_grad:
        logp.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_results_are_fp32_nats(dtype: torch.dtype, device: torch.device) -> None:
    hidden, head, target = problem(5, 8, 9, dtype, device)
    assert log_probs(hidden, head, target).dtype == torch.float32
    logp = log_probs(hidden.requires_grad_(), head, target)
    logp.sum().backward()
    assert logp.dtype == torch.float32
    assert hidden.grad is not None and hidden.grad.dtype == dtype


def test_a_head_of_another_dtype(device: torch.device) -> None:
    hidden, head, target = problem(5, 8, 9, torch.float32, device)
    wide = results(log_probs, (hidden, head.half().float(), target), torch.float32)
    leaf = hidden.requires_grad_()
    logp = log_probs(leaf, head.half(), target)
    logp.backward(torch.linspace(-1, 2, 5, device=device))
    assert (logp.detach() - wide[0]).abs().max() < 1e-6
    assert leaf.grad is not None and (leaf.grad - wide[1]).norm() < 2e-3 * wide[1].norm()


def test_a_trainable_head_is_refused() -> None:
    hidden, head, target = problem(3, 4, 9, torch.float32)
    with pytest.raises(ValueError, match="frozen"):
        log_probs(hidden, head.requires_grad_(), target)


@pytest.mark.parametrize("softcap", [0.0, -1.0, float("nan")])
def test_a_cap_of_nothing_is_refused(softcap: float) -> None:
    with pytest.raises(ValueError, match="softcap"):
        log_probs(*problem(3, 4, 9, torch.float32), softcap=softcap)


@pytest.mark.parametrize(("rows", "width", "targets"), [(3, 5, 3), (3, 4, 2)])
def test_shapes_that_do_not_fit_are_refused(rows: int, width: int, targets: int) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        log_probs(torch.zeros(rows, width), torch.zeros(9, 4), torch.zeros(targets).long())
