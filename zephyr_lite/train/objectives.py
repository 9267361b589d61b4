"""Objectives: how examples become micro-batches and log-probs become a loss.

An objective knows its examples by index. `step` cuts the examples of one optimizer step into
micro-batches and says what the step's loss is divided by, so that the update is the recipe's batch
however it is cut. `loss` returns a *sum* and the sums its metrics are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import (
    Documents,
    Layout,
    Order,
    Row,
    document_layout,
    fill,
    pair_layout,
)
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.model.policy import sum_by_sequence
from zephyr_lite.plan.lengths import heaviest
from zephyr_lite.recipe import Dpo
from zephyr_lite.train.losses import preference_loss


@dataclass(frozen=True)
class MicroBatch:
    """A layout and the examples that are in it, in its order."""

    layout: Layout
    examples: Sequence[int]


Sums = dict[str, torch.Tensor]


class Objective(Protocol):
    """What the loop trains on.

    tokens_per_micro_batch: the budget that steps are cut by; may be set between steps.
    """

    tokens_per_micro_batch: int

    @property
    def n_examples(self) -> int:
        """Examples of one epoch."""
        ...

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        ...

    def step(self, examples: Sequence[int]) -> tuple[list[MicroBatch], float]:
        """Micro-batches of one optimizer step, and what its loss and metrics are divided by."""
        ...

    def heaviest(self, order: Order) -> MicroBatch:
        """The micro-batch with the most tokens of all that `step` makes of an order's steps."""
        ...

    def loss(self, logp_N: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        """Sum of the loss over a micro-batch, and sums of its metrics (detached)."""
        ...

    def names(self, examples: Sequence[int]) -> list[str]:
        """Row ids of examples, for error messages."""
        ...


@dataclass
class LanguageModelling:
    """Mean negative log-likelihood per scored token over packed rows: dSFT and pre-training."""

    documents: Documents
    rows: list[Row]
    loss_on: str
    tokens_per_micro_batch: int

    @property
    def n_examples(self) -> int:
        """Packed rows."""
        return len(self.rows)

    @property
    def longest(self) -> int:
        """See `Objective.longest`."""
        return max(self._sizes(range(self.n_examples)))

    def step(self, examples: Sequence[int]) -> tuple[list[MicroBatch], float]:
        """See `Objective.step`; the divisor is the step's scored tokens."""
        cut = fill(self._sizes(examples), self.tokens_per_micro_batch)
        micros = [self._micro_batch([examples[m] for m in members]) for members in cut]
        return micros, float(max(1, sum(len(m.layout.targets_N) for m in micros)))

    def heaviest(self, order: Order) -> MicroBatch:
        """See `Objective.heaviest`."""
        sizes_E = np.array(self._sizes(range(self.n_examples)), np.int64)
        return self._micro_batch(heaviest(sizes_E, self.tokens_per_micro_batch, order))

    def loss(self, logp_N: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        """See `Objective.loss`."""
        total = -logp_N.sum()
        return total, {"loss": total.detach()}

    def names(self, examples: Sequence[int]) -> list[str]:
        """See `Objective.names`."""
        return [f"packed row {i}" for i in examples]

    def _sizes(self, examples: Sequence[int]) -> list[int]:
        return [sum(stop - start for start, stop in self.rows[i]) for i in examples]

    def _micro_batch(self, examples: list[int]) -> MicroBatch:
        spans = [self.documents.span(*s) for i in examples for s in self.rows[i]]
        return MicroBatch(document_layout(spans, self.loss_on), examples)


@dataclass
class Preference:
    """dDPO over encoded pairs against stored reference log-probs."""

    pairs: Sequence[EncodedPair]
    ids: Sequence[str]
    reference: ReferenceLogProbs
    settings: Dpo
    tokens_per_micro_batch: int

    @property
    def n_examples(self) -> int:
        """Pairs."""
        return len(self.pairs)

    @property
    def longest(self) -> int:
        """See `Objective.longest`."""
        return max(self._sizes(range(self.n_examples)))

    def step(self, examples: Sequence[int]) -> tuple[list[MicroBatch], float]:
        """See `Objective.step`; the divisor is the step's pairs."""
        cut = fill(self._sizes(examples), self.tokens_per_micro_batch)
        micros = [self._micro_batch([examples[m] for m in members]) for members in cut]
        return micros, float(len(examples))

    def heaviest(self, order: Order) -> MicroBatch:
        """See `Objective.heaviest`."""
        sizes_E = np.array(self._sizes(range(self.n_examples)), np.int64)
        return self._micro_batch(heaviest(sizes_E, self.tokens_per_micro_batch, order))

    def loss(self, logp_N: torch.Tensor, micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        """See `Objective.loss`; metrics carry TRL's names."""
        logp_S = sum_by_sequence(logp_N, micro.layout)
        chosen_P, rejected_P = logp_S[0::2], logp_S[1::2]
        reference = self.reference_of(micro.examples, logp_N.device)
        loss_P = preference_loss(self.settings, chosen_P, rejected_P, *reference)
        with torch.no_grad():
            win_P = self.settings.beta * (chosen_P - reference[0])
            lose_P = self.settings.beta * (rejected_P - reference[1])
            sums = {
                "loss": loss_P.sum(),
                "rewards/chosen": win_P.sum(),
                "rewards/rejected": lose_P.sum(),
                "rewards/margins": (win_P - lose_P).sum(),
                "rewards/accuracies": (win_P > lose_P).float().sum(),
                "logps/chosen": chosen_P.sum(),
                "logps/rejected": rejected_P.sum(),
            }
        return loss_P.sum(), {name: value.detach() for name, value in sums.items()}

    def names(self, examples: Sequence[int]) -> list[str]:
        """See `Objective.names`."""
        return [self.ids[i] for i in examples]

    def reference_of(
        self, examples: Sequence[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Reference log-probs and lengths: chosen_P, rejected_P, chosen_len_P, rejected_len_P."""
        index = list(examples)
        stored = self.reference
        columns = (stored.chosen_P, stored.rejected_P, stored.chosen_len_P, stored.rejected_len_P)
        a, b, c, d = (torch.from_numpy(column[index]).to(device) for column in columns)
        return a, b, c, d

    def _sizes(self, examples: Sequence[int]) -> list[int]:
        return [pair_tokens(self.pairs[i]) for i in examples]

    def _micro_batch(self, examples: list[int]) -> MicroBatch:
        return MicroBatch(pair_layout([self.pairs[i] for i in examples]), examples)


def pair_tokens(pair: EncodedPair) -> int:
    """Tokens of a pair in the shared layout."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)
