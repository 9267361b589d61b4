"""Each preference loss against its formula, written again in double precision; gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from zephyr_lite.recipe import Dpo
from zephyr_lite.train.losses import preference_loss

CASES = [
    {"loss": "sigmoid", "beta": 0.1},
    {"loss": "sigmoid", "beta": 0.5, "label_smoothing": 0.2},
    {"loss": "ipo", "beta": 0.1},
    {"loss": "hinge", "beta": 0.05},
    {"loss": "robust", "beta": 0.1, "label_smoothing": 0.3},
    {"loss": "sft", "beta": 0.1},
    {"loss": "sigmoid", "beta": 0.1, "sft_weight": 0.7},
    {"loss": "ipo", "beta": 0.2, "sft_weight": 1.5},
]
IDS = ["-".join(map(str, case.values())) for case in CASES]
# chosen, rejected, reference chosen, reference rejected (nats); lengths of the two answers (tokens)
ROWS = [
    (-20.0, -30.0, -25.0, -26.0, 7, 11),
    (-12.5, -8.25, -11.0, -9.5, 3, 2),
    (-400.0, -90.0, -90.0, -400.0, 120, 80),
    (-1.0, -1.0, -1.0, -1.0, 1, 1),
    (-90.0, -400.0, -400.0, -90.0, 80, 120),
]


def settings(case: dict[str, Any]) -> Dpo:
    return Dpo.model_validate(case)


def columns(rows: list[tuple[float, ...]], dtype: torch.dtype) -> list[torch.Tensor]:
    values = [torch.tensor(c, dtype=dtype) for c in zip(*(r[:4] for r in rows), strict=True)]
    lengths = [torch.tensor(c, dtype=torch.int32) for c in zip(*(r[4:] for r in rows), strict=True)]
    return [*values, *lengths]


def formula(case: dict[str, Any], row: tuple[float, ...]) -> float:
    """The loss of one pair, from probabilities with plain floats."""
    chosen, rejected, ref_chosen, ref_rejected, n_chosen, n_rejected = row
    beta, eps = case["beta"], case.get("label_smoothing", 0.0)
    logratio = (chosen - rejected) - (ref_chosen - ref_rejected)

    def nll_of_preferring(x: float) -> float:  # -log(1 / (1 + exp(-x)))
        return math.log1p(math.exp(-x)) if x > 0 else -x + math.log1p(math.exp(x))

    right, wrong = nll_of_preferring(beta * logratio), nll_of_preferring(-beta * logratio)
    if case["loss"] == "sigmoid":
        value = (1 - eps) * right + eps * wrong
    elif case["loss"] == "robust":
        value = ((1 - eps) * right - eps * wrong) / (1 - 2 * eps)
    elif case["loss"] == "hinge":
        value = max(0.0, 1 - beta * logratio)
    elif case["loss"] == "sft":
        value = -chosen / n_chosen
    else:
        mean = (chosen - ref_chosen) / n_chosen - (rejected - ref_rejected) / n_rejected
        value = (mean - 0.5 / beta) ** 2
    return value + case.get("sft_weight", 0.0) * -chosen / n_chosen


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_equals_its_formula(case: dict[str, Any]) -> None:
    truth = torch.tensor([formula(case, row) for row in ROWS], dtype=torch.float64)
    exact = preference_loss(settings(case), *columns(ROWS, torch.float64))
    torch.testing.assert_close(exact, truth, rtol=1e-12, atol=1e-12)
    single = preference_loss(settings(case), *columns(ROWS, torch.float32))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradients(case: dict[str, Any]) -> None:
    """Of the policy's log-probs; the two rows of 300 nats are flat or at the hinge's edge."""
    chosen, rejected, *rest = columns([ROWS[0], ROWS[1], ROWS[3]], torch.float64)

    def loss(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return preference_loss(settings(case), c, r, *rest)

    leaves = (chosen.requires_grad_(), rejected.requires_grad_())
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_difference_is_ln_2(beta: float, smoothing: float, tolerance: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = -500 * torch.rand(2, 64, generator=generator)
    lengths = torch.ones(64, dtype=torch.int32)
    case = {"beta": beta, "label_smoothing": smoothing}
    loss = preference_loss(settings(case), chosen, rejected, chosen, rejected, lengths, lengths)
    assert loss.dtype == torch.float32
    assert (loss - math.log(2)).abs().max() < tolerance.ln2
    assert abs(loss.mean().item() - math.log(2)) < tolerance.ln2


def test_the_pull_at_the_start_is_half_of_beta() -> None:
    """The loss falls as the chosen answer rises and as the rejected one falls."""
    chosen, rejected, *_ = columns([ROWS[3]], torch.float64)
    lengths = torch.ones(1, dtype=torch.int32)
    leaves = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss = preference_loss(settings({"beta": 0.1}), *leaves, chosen, rejected, lengths, lengths)
    loss.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[0].grad.item() == pytest.approx(-0.05)
    assert leaves[1].grad.item() == pytest.approx(0.05)


def test_far_apart_pairs_stay_finite() -> None:
    """Thousands of nats overflow exp in fp32; the loss must not."""
    far = [(-9000.0, -10.0, -10.0, -9000.0, 9, 9), (-10.0, -9000.0, -9000.0, -10.0, 9, 9)]
    for case in CASES:
        chosen, rejected, *rest = columns(far, torch.float32)
        leaves = (chosen.requires_grad_(), rejected.requires_grad_())
        loss = preference_loss(settings(case), *leaves, *rest)
        grads = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
        assert torch.isfinite(torch.stack([loss.detach(), *grads])).all(), case
