"""Held-out preferences: does the policy prefer the chosen answer, and by how much.

Two accuracies, because they answer two questions. `eval_rewards/accuracies` compares implicit
rewards, beta * (log pi - log ref): what DPO trains, and 0 by definition for the reference itself.
`eval_logps/accuracies` compares the answers' log-probs alone, so it can be asked of any model, a
parent beside its child.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import fill, pair_layout
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.model.policy import Policy
from zephyr_lite.recipe import Dpo
from zephyr_lite.train.losses import preference_loss
from zephyr_lite.train.objectives import pair_tokens

BOOTSTRAP_DRAWS = 1000


def pair_log_probs(
    policy: Policy, pairs: Sequence[EncodedPair], tokens_per_micro_batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Summed log-probs (chosen_P, rejected_P), float32 nats, without gradient."""
    chosen_P, rejected_P = np.zeros((2, len(pairs)), np.float32)
    for members in fill([pair_tokens(p) for p in pairs], tokens_per_micro_batch):
        logp_S = policy.sequence_log_probs(pair_layout([pairs[m] for m in members]))
        logp_S = logp_S.float().cpu().numpy()
        chosen_P[members], rejected_P[members] = logp_S[0::2], logp_S[1::2]
    return chosen_P, rejected_P


def preference_figures(
    settings: Dpo, chosen_P: np.ndarray, rejected_P: np.ndarray, reference: ReferenceLogProbs
) -> dict[str, float]:
    """Figures under TRL's names, each a mean over P pairs, and a 95 % bootstrap interval."""
    win_P = settings.beta * (chosen_P - reference.chosen_P)
    lose_P = settings.beta * (rejected_P - reference.rejected_P)
    stored = (reference.chosen_P, reference.rejected_P,
              reference.chosen_len_P, reference.rejected_len_P)  # fmt: skip
    loss_P = preference_loss(
        settings,
        *(torch.from_numpy(np.ascontiguousarray(x)) for x in (chosen_P, rejected_P, *stored)),
    )
    correct_P = win_P > lose_P
    low, high = _interval(correct_P)
    return {
        "eval_loss": loss_P.mean().item(),
        "eval_rewards/chosen": float(win_P.mean()),
        "eval_rewards/rejected": float(lose_P.mean()),
        "eval_rewards/margins": float((win_P - lose_P).mean()),
        "eval_rewards/accuracies": float(correct_P.mean()),
        "eval_rewards/accuracies_low": low,
        "eval_rewards/accuracies_high": high,
        **log_prob_figures(chosen_P, rejected_P),
    }


def log_prob_figures(chosen_P: np.ndarray, rejected_P: np.ndarray) -> dict[str, float]:
    """What can be said of any model: log-probs, and how often the chosen answer's is higher."""
    return {
        "eval_logps/chosen": float(chosen_P.mean()),
        "eval_logps/rejected": float(rejected_P.mean()),
        "eval_logps/accuracies": float((chosen_P > rejected_P).mean()),
        "eval_pairs": len(chosen_P),
    }


def _interval(correct_P: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap of a mean; a fixed generator, so the same rows give the same."""
    draws = np.random.default_rng(0).integers(0, len(correct_P), (BOOTSTRAP_DRAWS, len(correct_P)))
    low, high = np.percentile(correct_P[draws].mean(1), [2.5, 97.5])
    return float(low), float(high)
