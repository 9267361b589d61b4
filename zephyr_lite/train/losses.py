"""Preference losses, one value per pair. Pure functions; every formula names its source.

    h = (log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x))        DPO, eq. 7

Shapes: P pairs. Log-probs are sums over an answer's tokens, fp32 nats.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, relu

from zephyr_lite.recipe import Dpo


def preference_loss(
    settings: Dpo,
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    ref_chosen_P: torch.Tensor,
    ref_rejected_P: torch.Tensor,
    chosen_len_P: torch.Tensor,
    rejected_len_P: torch.Tensor,
) -> torch.Tensor:
    """Loss of each pair under `settings.loss`, plus the SFT term where its weight is not 0.

    sigmoid   -(1 - e) log s(b h) - e log s(-b h)              arXiv 2305.18290 eq. 7; e: cDPO
    ipo       (h' - 1 / (2 b))^2, h' from per-token means      arXiv 2310.12036 eq. 17
    hinge     max(0, 1 - b h)                                  SLiC, arXiv 2309.06657
    sft       -log pi(y_w|x) / |y_w|                           dSFT-2, arXiv 2310.16944 table 3
    robust    (-(1 - e) log s(b h) + e log s(-b h)) / (1 - 2e)     arXiv 2403.00409

    with b = beta, e = label_smoothing, s the logistic function. IPO divides each answer's log-prob
    by its length, as the field's reference implementation does.
    """
    win_P, lose_P = chosen_P - ref_chosen_P, rejected_P - ref_rejected_P
    beta, smoothing = settings.beta, settings.label_smoothing
    scaled_P = beta * (win_P - lose_P)
    if settings.loss == "sigmoid":
        loss_P = -(1 - smoothing) * logsigmoid(scaled_P) - smoothing * logsigmoid(-scaled_P)
    elif settings.loss == "ipo":
        loss_P = (win_P / chosen_len_P - lose_P / rejected_len_P - 1 / (2 * beta)) ** 2
    elif settings.loss == "hinge":
        loss_P = relu(1 - scaled_P)
    elif settings.loss == "sft":
        loss_P = -chosen_P / chosen_len_P
    else:
        unbiased = -(1 - smoothing) * logsigmoid(scaled_P) + smoothing * logsigmoid(-scaled_P)
        loss_P = unbiased / (1 - 2 * smoothing)
    if settings.sft_weight:
        loss_P = loss_P - settings.sft_weight * chosen_P / chosen_len_P
    return loss_P
