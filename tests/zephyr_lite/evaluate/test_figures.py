"""Held-out figures against stock transformers and against hand calculation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from zephyr_lite.data.layout import Documents, join_documents
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.evaluate.perplexity import evaluate_documents
from zephyr_lite.evaluate.preferences import (
    log_prob_figures,
    pair_log_probs,
    preference_figures,
)
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Dpo, Memory

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy(load_tiny: Any) -> Policy:
    return make_policy(load_tiny("none"), torch.float32, CPU, Memory(head_rows=64))


@pytest.fixture(scope="module")
def stock(tiny_mistral: Any) -> Any:
    """The same weights under transformers alone."""
    return AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32).eval()


def stock_nll(stock: Any, ids: np.ndarray) -> torch.Tensor:
    """NLL of each token but the first, one sequence at a time."""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        logp = stock(row).logits[0, :-1].double().log_softmax(-1)
    return -logp.gather(1, row[0, 1:, None]).squeeze(1)


def test_eval_loss_is_stock_transformers_mean_over_tokens(policy, stock, random_documents) -> None:
    """Packed or not, and however full the micro-batches are."""
    documents = random_documents([30, 1, 12, 39, 2, 25])
    nll = torch.cat([stock_nll(stock, ids) for ids, _ in documents if len(ids) > 1])
    answer = np.concatenate([a[1:] for _, a in documents])
    for budget in (8, 50, 4096):
        figures = evaluate_documents(policy, join_documents(documents), 40, budget)
        assert figures["eval_loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
        on_answers = nll[torch.from_numpy(answer)].mean().item()
        assert figures["eval_loss_assistant"] == pytest.approx(on_answers, abs=1e-5)
        assert figures["perplexity"] == pytest.approx(math.exp(figures["eval_loss"]))
        assert figures["eval_tokens"] == len(nll) == 29 + 0 + 11 + 38 + 1 + 24
        assert figures["eval_tokens_assistant"] == answer.sum()


def test_loss_on_answers_by_a_hand_mask(policy, stock, random_documents) -> None:
    ((ids, _),) = random_documents([10], seed=4)
    mask = np.array([1, 0, 0, 1, 1, 0, 0, 0, 0, 1], bool)  # the first token has no predecessor
    figures = evaluate_documents(policy, join_documents([(ids, mask)]), 40, 4096)
    nll = stock_nll(stock, ids)
    truth = (nll[2] + nll[3] + nll[8]) / 3
    assert figures["eval_loss_assistant"] == pytest.approx(truth.item(), abs=1e-5)
    assert figures["eval_tokens_assistant"] == 3


def test_documents_are_cut_at_the_length(policy, stock, random_documents) -> None:
    ((ids, answer),) = random_documents([50])
    figures = evaluate_documents(policy, join_documents([(ids, answer)]), 20, 4096)
    parts = torch.cat([stock_nll(stock, ids[at : at + 20]) for at in (0, 20, 40)])
    assert figures["eval_loss"] == pytest.approx(parts.mean().item(), abs=1e-5)


def test_no_answer_gives_no_figure(policy, random_documents) -> None:
    ((ids, _),) = random_documents([10])
    documents: Documents = join_documents([(ids, np.zeros(10, bool))])
    assert "eval_loss_assistant" not in evaluate_documents(policy, documents, 40, 4096)


@pytest.mark.parametrize("budget", [8, 60, 4096])
def test_pair_log_probs_are_stock_transformers(policy, stock, random_pairs, budget) -> None:
    """In the order of the pairs, whatever order the micro-batches took."""
    pairs = random_pairs([(5, 8, 6), (30, 3, 9), (1, 7, 7), (20, 10, 4)])
    found = pair_log_probs(policy, pairs, budget)
    for side, answers in enumerate(([p.chosen for p in pairs], [p.rejected for p in pairs])):
        truth = [
            -stock_nll(stock, np.concatenate([p.prompt, a]))[len(p.prompt) - 1 :].sum().item()
            for p, a in zip(pairs, answers, strict=True)
        ]
        assert found[side] == pytest.approx(truth, abs=1e-4)
        assert found[side].dtype == np.float32


CHOSEN = np.array([-10.0, -20.0, -30.0, -8.0], np.float32)
REJECTED = np.array([-12.0, -15.0, -30.0, -9.0], np.float32)
REFERENCE = ReferenceLogProbs(
    np.array([-11.0, -20.0, -31.0, -7.0], np.float32),
    np.array([-11.0, -16.0, -31.0, -9.0], np.float32),
    np.array([2, 3, 4, 5], np.int32),
    np.array([3, 3, 3, 3], np.int32),
)


def test_preference_figures_by_hand() -> None:
    figures = preference_figures(Dpo(beta=0.5), CHOSEN, REJECTED, REFERENCE)
    # chosen - reference: 1, 0, 1, -1; rejected - reference: -1, 1, 1, 0; times beta
    losses = [math.log1p(math.exp(-0.5 * h)) for h in (2, -1, 0, -1)]
    truth = {
        "eval_loss": sum(losses) / 4,
        "eval_rewards/chosen": 0.5 * 1 / 4,
        "eval_rewards/rejected": 0.5 * 1 / 4,
        "eval_rewards/margins": 0.0,
        "eval_rewards/accuracies": 0.25,  # a tie is not a win
        "eval_logps/chosen": -17.0,
        "eval_logps/rejected": -16.5,
        "eval_logps/accuracies": 0.5,
        "eval_pairs": 4,
    }
    assert {k: figures[k] for k in truth} == pytest.approx(truth)
    assert set(figures) - set(truth) == {
        "eval_rewards/accuracies_low",
        "eval_rewards/accuracies_high",
    }


def test_a_parent_has_no_rewards() -> None:
    figures = log_prob_figures(CHOSEN, REJECTED)
    assert figures == pytest.approx(
        {
            "eval_logps/chosen": -17.0,
            "eval_logps/rejected": -16.5,
            "eval_logps/accuracies": 0.5,
            "eval_pairs": 4,
        }
    )


def test_the_reference_itself_has_loss_ln_2(tolerance: Any) -> None:
    stored = (REFERENCE.chosen_P, REFERENCE.rejected_P)
    figures = preference_figures(Dpo(beta=0.1), *stored, REFERENCE)
    assert abs(figures["eval_loss"] - math.log(2)) < tolerance.ln2
    assert figures["eval_rewards/accuracies"] == 0.0


@pytest.mark.parametrize(("n", "rate"), [(40, 0.5), (400, 0.8), (25, 1.0), (1, 0.0)])
def test_the_bootstrap_interval(n: int, rate: float) -> None:
    """Holds the mean, is about as wide as the binomial's, and is the same every time."""
    wins = np.arange(n) < round(rate * n)
    chosen = np.where(wins, -1.0, -3.0).astype(np.float32)
    rejected = np.full(n, -2.0, np.float32)
    ones = np.ones(n, np.int32)
    reference = ReferenceLogProbs(np.zeros(n, np.float32), np.zeros(n, np.float32), ones, ones)
    figures = preference_figures(Dpo(beta=0.1), chosen, rejected, reference)
    low, high = (figures[f"eval_rewards/accuracies_{side}"] for side in ("low", "high"))
    mean = figures["eval_rewards/accuracies"]
    assert mean == pytest.approx(wins.mean())
    assert low <= mean <= high
    width = 2 * 1.96 * math.sqrt(rate * (1 - rate) / n)
    assert high - low == pytest.approx(width, rel=0.2)
    assert preference_figures(Dpo(beta=0.1), chosen, rejected, reference) == figures
