"""Held-out loss of dialogues: over all tokens, as published, and over the answers alone."""

from __future__ import annotations

import math

from zephyr_lite.data.layout import Documents, document_layout, fill, pack_masked
from zephyr_lite.model.policy import Policy


def evaluate_documents(
    policy: Policy, documents: Documents, max_length: int, tokens_per_micro_batch: int
) -> dict[str, float]:
    """`eval_loss` and `eval_loss_assistant` in nats per token, `perplexity` of the former.

    Documents are cut at `max_length` tokens and each attends to itself only.
    """
    rows = pack_masked(documents, max_length)
    sizes = [sum(stop - start for start, stop in row) for row in rows]
    total = answers = 0.0
    n_total = n_answers = 0
    for members in fill(sizes, tokens_per_micro_batch):
        spans = [documents.span(*span) for m in members for span in rows[m]]
        layout = document_layout(spans)
        logp_N = policy.log_probs(layout).double().cpu().numpy()
        total -= logp_N.sum()
        answers -= logp_N[layout.answer_N].sum()
        n_total += len(logp_N)
        n_answers += int(layout.answer_N.sum())
    loss = float(total / max(1, n_total))
    figures = {"eval_loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if n_answers:
        figures["eval_loss_assistant"] = float(answers / n_answers)
    return figures | {"eval_tokens": n_total, "eval_tokens_assistant": n_answers}
