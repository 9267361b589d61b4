"""The head against its definition: values, gradients, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from zephyr_lite.model.head import log_probs, reference_log_probs

CHUNKS = (1, 3, 7, 8, 64)  # one row at a time, a ragged last chunk, exactly all, more than all


def problem(
    n: int, width: int, vocab: int, dtype: torch.dtype, *, confident: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden, head, targets); confident rows give their target up to 0.999."""
    generator = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, width, generator=generator, dtype=torch.float64)
    head = torch.randn(vocab, width, generator=generator, dtype=torch.float64) / width**0.5
    target = torch.randint(0, vocab, (n,), generator=generator)
    if confident:
        pull = torch.linspace(8, 16, n, dtype=torch.float64)[:, None]
        hidden = pull * torch.nn.functional.normalize(head[target], dim=-1) + 0.2 * hidden
    return hidden.to(dtype), head.to(dtype), target


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_gradient_is_right_in_fp64(chunk_rows: int) -> None:
    """With rows that occur twice, as the prompt's last token does."""
    hidden, head, target = problem(7, 5, 11, torch.float64)
    rows = torch.tensor([0, 0, 2, 6, 5, 3, 3])
    hidden.requires_grad_()

    def of_rows(h: torch.Tensor) -> torch.Tensor:
        return log_probs(h[rows], head, target, chunk_rows=chunk_rows)

    assert torch.autograd.gradcheck(of_rows, (hidden,))


@pytest.mark.parametrize("chunk_rows", CHUNKS)
def test_equals_its_definition(chunk_rows: int, tolerance: Any) -> None:
    hidden, head, target = problem(8, 16, 50, torch.float64)
    found = log_probs(hidden, head, target, chunk_rows=chunk_rows)
    assert (found - reference_log_probs(hidden, head, target)).abs().max() < tolerance.fp64
    trained = log_probs(hidden.requires_grad_(), head, target, chunk_rows=chunk_rows)
    assert torch.equal(trained.detach(), found), "training changes no value"


def errors(
    function: Callable[..., torch.Tensor], hidden: torch.Tensor, head: torch.Tensor, target: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Error of each row's log-prob, and of its gradient relative to its size, against fp64."""
    results = []
    for f, dtype in ((function, hidden.dtype), (reference_log_probs, torch.float64)):
        leaf = hidden.to(dtype).detach().requires_grad_()
        logp = f(leaf, head.to(dtype), target)
        logp.sum().backward()
        assert leaf.grad is not None
        results.append((logp.detach().double(), leaf.grad.double()))
    (logp, grad), (true_logp, true_grad) = results
    return (logp - true_logp).abs(), (grad - true_grad).norm(dim=1) / true_grad.norm(dim=1)


@pytest.mark.parametrize("confident", [False, True], ids=["unsure", "confident"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_is_no_worse_than_twice_the_frameworks(dtype: torch.dtype, confident: bool) -> None:
    hidden, head, target = problem(60, 64, 300, dtype, confident=confident)
    ours = errors(lambda *x: log_probs(*x, chunk_rows=7), hidden, head, target)
    theirs = errors(reference_log_probs, hidden, head, target)
    assert ours[0].max() <= 2 * theirs[0].max() + 1e-6, "log-probs"
    tiny = 1e-6 if dtype == torch.float32 else 2**-8
    assert ours[1].max() <= 2 * theirs[1].max() + tiny, "gradient"


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_logits_never_exist(dtype: torch.dtype) -> None:
    n, width, vocab, chunk_rows = 300, 16, 500, 30
    hidden, head, target = problem(n, width, vocab, dtype)
    saved: list[tuple[int, ...]] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(tuple(t.shape)) or t, lambda t: t
    )
    with Largest() as largest, hooks:
        logp = log_probs(hidden.requires_grad_(), head, target, chunk_rows=chunk_rows)
        logp.sum().backward()
    assert saved == [(n, width)]
    assert largest.elements == chunk_rows * vocab


@pytest.mark.parametrize("needs_grad", [False, True])
def test_no_rows_at_all(needs_grad: bool) -> None:
    hidden, head, target = problem(0, 4, 9, torch.float32)
    logp = log_probs(hidden.requires_grad_(needs_grad), head, target)
    assert logp.shape == (0,)
    if needs_grad:
        logp.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == (0, 4)


def test_results_are_fp32_nats_for_bf16_input() -> None:
    hidden, head, target = problem(5, 8, 9, torch.bfloat16)
    assert log_probs(hidden, head, target).dtype == torch.float32
    logp = log_probs(hidden.requires_grad_(), head, target)
    logp.sum().backward()
    assert hidden.grad is not None and hidden.grad.dtype == torch.bfloat16


def test_a_trainable_head_is_refused() -> None:
    hidden, head, target = problem(3, 4, 9, torch.float32)
    with pytest.raises(ValueError, match="frozen"):
        log_probs(hidden, head.requires_grad_(), target)


@pytest.mark.parametrize(("rows", "width", "targets"), [(3, 5, 3), (3, 4, 2)])
def test_shapes_that_do_not_fit_are_refused(rows: int, width: int, targets: int) -> None:
    with pytest.raises(ValueError, match="do not fit together"):
        log_probs(torch.zeros(rows, width), torch.zeros(9, 4), torch.zeros(targets).long())
