"""How far a file's predictions are from the model's, and how far each type may be.

Over n positions, p = the model, q = the file, y = the token that follows:

    KL          sum_v p_v (log p_v - log q_v), nats, at least 0
    top-1       argmax p = argmax q, told apart where the model is decided: its two best tokens are
                `decided_gap` nats apart, so that an equal choice is not a coin's
    perplexity  exp(mean -log q_y) / exp(mean -log p_y) - 1, percent
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zephyr_lite.errors import DataError


@dataclass(frozen=True)
class Gate:
    """What a type must keep to.

    mean_kl: nats over all positions. decided_gap: nats. decided_top1: share of decided positions;
    one miss is allowed however few there are, unless it is 1. perplexity_percent: its increase,
    after three standard errors of the positions are taken off.
    """

    mean_kl: float
    decided_gap: float
    decided_top1: float
    perplexity_percent: float

    def failures(self, figures: Mapping[str, Any]) -> list[str]:
        """What of `Drift.figures(self.decided_gap)` is beyond the gate, in words."""
        found = []
        if not figures["kl_mean"] < self.mean_kl:
            found.append(f"mean KL {figures['kl_mean']:.2g} nats, allowed {self.mean_kl:.2g}")
        share, decided = figures["decided_top1"], figures["decided_positions"]
        allowed = max(1.0, (1 - self.decided_top1) * decided) if self.decided_top1 < 1 else 0.0
        if round((1 - share) * decided) > allowed:
            found.append(f"top-1 equal at {share:.2%} of {decided} decided positions")
        if not figures["perplexity_percent_surely"] < self.perplexity_percent:
            found.append(
                f"perplexity {figures['perplexity_percent']:+.2f} %, "
                f"allowed +{self.perplexity_percent:g} %"
            )
        return found

    def widened(self, allowance: Gate) -> Gate:
        """The gate for a file that also differs for another, known reason."""
        return Gate(
            self.mean_kl + allowance.mean_kl,
            max(self.decided_gap, allowance.decided_gap),
            min(self.decided_top1, allowance.decided_top1),
            self.perplexity_percent + allowance.perplexity_percent,
        )


# What sound files measured. 8B: Llama 3 8B, `tools/perplexity/README.md` of llama.cpp (wikitext;
# its q8_0 row includes 0.0006 of its own storage). tiny: the 256-wide model of the recipe `tiny`,
# 1280 positions. narrow: the 64-wide stories260K, 960 positions, whose rows no super-block divides
# (ffn_down stays F16). KL in nats, then the increase of perplexity in percent. A gate is about
# twice what the 8B measured. Decided top-1 measured 1.0 but for narrow Q5 0.9984, Q3_K_M 0.9977.
# Damage measured on the F16 files of tiny and narrow, KL: rows of all queries and keys not permuted
# 1.2 and 4.0, of one layer's queries 0.24 and 1.1; rope base 1e6 for 1e4 0.43 and 0.62; two layers
# swapped 6.1 and 3.1; one layer's noise, 0.3 of its spread, 0.010 and 0.77; the DPO adapter
# forgotten 0.12, all adapters 4.3 (tiny). So what is small beside a type's own rounding passes that
# type's gate: export F16 beside it, or compare the weights themselves (`reread.py`).
GATES = {
    # tiny 5e-13, narrow below 1e-7
    "ALL_F32": Gate(1e-5, 0.01, 1.0, 0.1),
    # tiny 1.4e-7, narrow 9e-7
    "MOSTLY_F16": Gate(1e-4, 0.01, 1.0, 0.1),
    # 8B against its F16 3e-5 +0.04; tiny 7e-6 +0.02, narrow 8e-5 +0.05
    "MOSTLY_BF16": Gate(5e-4, 0.1, 1.0, 0.2),
    # 8B 1.4e-3 +0.04; tiny 8e-5 +0.1, narrow 7.5e-4 -0.13 (1.3e-3 over other text)
    "MOSTLY_Q8_0": Gate(3e-3, 0.5, 0.99, 0.5),
    # 8B 5.5e-3 +0.35; tiny 5.6e-4 +0.2
    "MOSTLY_Q6_K": Gate(0.012, 0.5, 0.99, 1.0),
    # 8B 0.011 +0.9; tiny 1.7e-3 -0.1, narrow 0.016 +1.4
    "MOSTLY_Q5_K_M": Gate(0.025, 1.0, 0.985, 2.5),
    # 8B 0.017 +1.7; tiny 1.7e-3 -0.1, narrow 0.017 +1.8
    "MOSTLY_Q5_K_S": Gate(0.035, 1.0, 0.985, 3.5),
    # 8B 0.031 +2.8, a 7B (Llama 2) 0.013 +1.4; tiny 5.9e-3 -0.3, narrow 0.016 +2.0
    "MOSTLY_Q4_K_M": Gate(0.06, 1.0, 0.98, 6.0),
    # 8B 0.043 +4.3; tiny 5.3e-3 +0.0, narrow 0.017 +2.0
    "MOSTLY_Q4_K_S": Gate(0.09, 1.0, 0.98, 9.0),
    # 8B 0.072 +7.5; tiny 0.011 -0.4, narrow 0.079 +8.1
    "MOSTLY_Q4_0": Gate(0.15, 2.0, 0.98, 15.0),
    # 8B 0.102 +10.5; tiny 0.018 -0.5, narrow 0.063 +6.9
    "MOSTLY_Q3_K_M": Gate(0.2, 2.0, 0.98, 21.0),
}


class Drift:
    """Collects, position by position, what separates two predictions."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.agree: list[bool] = []
        self.gap: list[float] = []
        self.nll: list[tuple[float, float]] = []

    def add(self, truth_V: torch.Tensor, file_V: torch.Tensor, target: int) -> None:
        """One position: log-probabilities of both (fp32 [V]), and the token that follows."""
        # Normalised again: what fp32 lost of a sum of one would make a KL of 1e-6 negative.
        p, q = truth_V.double().log_softmax(0), file_V.double().log_softmax(0)
        # A probability of zero adds nothing, but 0 * -inf would be NaN.
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum()
        first, second = p.topk(2).values.tolist()
        self.kl.append(float(kl))
        self.agree.append(int(p.argmax()) == int(q.argmax()))
        self.gap.append(first - second)
        self.nll.append((-float(p[target]), -float(q[target])))

    def figures(self, decided_gap: float) -> dict[str, Any]:
        """Means over positions, in nats; top-1 as shares of positions; perplexity in percent.

        Raises: DataError without a position.
        """
        n = len(self.kl)
        if n == 0:
            raise DataError("no prompts to compare the file over")
        pairs = zip(self.agree, self.gap, strict=True)
        decided = [same for same, gap in pairs if gap > decided_gap]
        truth, file = (statistics.fmean(side) for side in zip(*self.nll, strict=True))
        changes = [f - t for t, f in self.nll]
        error = statistics.stdev(changes) / math.sqrt(n) if n > 1 else 0.0
        return {
            "positions": n,
            "kl_mean": statistics.fmean(self.kl),
            "kl_p95": sorted(self.kl)[math.ceil(0.95 * n) - 1],
            "kl_max": max(self.kl),
            "top1": sum(self.agree) / n,
            "decided_gap": decided_gap,
            "decided_positions": len(decided),
            "decided_top1": sum(decided) / len(decided) if decided else 1.0,
            "nll_truth": truth,
            "nll_file": file,
            "perplexity_truth": math.exp(truth),
            "perplexity_percent": 100 * math.expm1(file - truth),
            "perplexity_percent_surely": 100 * math.expm1(file - truth - 3 * error),
        }
