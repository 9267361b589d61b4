"""Drift by hand, and gates that close."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from zephyr_lite.errors import DataError
from zephyr_lite.export.check.drift import GATES, Drift, Gate
from zephyr_lite.export.gguf.mixture import FILE_TYPES

LN2 = math.log(2)


def test_drift_by_hand() -> None:
    drift = Drift()
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.125, 0.125])
    drift.add(p.log(), q.log(), 1)
    drift.add(p.log(), p.log(), 0)
    figures = drift.figures(0.01)
    # KL = .5 ln 2 + .25 ln .5 + .25 ln 2 = .5 ln 2
    assert figures["kl_max"] == figures["kl_p95"] == pytest.approx(0.5 * LN2)
    assert figures["kl_mean"] == pytest.approx(0.25 * LN2)
    assert figures["top1"] == figures["decided_top1"] == 0.5
    assert figures["nll_truth"] == pytest.approx((2 + 1) / 2 * LN2)
    assert figures["nll_file"] == pytest.approx((1 + 1) / 2 * LN2)
    assert figures["perplexity_truth"] == pytest.approx(2**1.5)
    assert figures["perplexity_percent"] == pytest.approx(100 * (2**-0.5 - 1))
    # The two changes are -ln 2 and 0: deviation ln 2 / sqrt 2, error of the mean ln 2 / 2.
    assert figures["perplexity_percent_surely"] == pytest.approx(100 * (2**-2 - 1))
    assert drift.figures(LN2 + 0.01)["decided_positions"] == 0


def test_a_sum_that_fp32_lost_is_no_negative_kl() -> None:
    drift = Drift()
    p = torch.tensor([0.9, 0.1]).log()
    drift.add(p, p + 1e-5, 0)
    assert abs(drift.figures(0.01)["kl_mean"]) < 1e-12


def test_p95_is_the_95th_of_a_hundred() -> None:
    drift = Drift()
    drift.add(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, 0.5]).log(), 0)
    drift.kl, drift.nll = [float(n) for n in range(100, 0, -1)], [(1.0, 1.0)] * 100
    drift.agree, drift.gap = [True] * 100, [1.0] * 100
    assert drift.figures(0.01)["kl_p95"] == 95


def test_nothing_compared_is_no_success() -> None:
    with pytest.raises(DataError, match="no prompts"):
        Drift().figures(0.01)


def test_every_type_that_can_be_written_has_a_gate_and_coarser_ones_wider() -> None:
    assert set(GATES) == {kind.name for kind in FILE_TYPES.values()}
    by_size = ["ALL_F32", "MOSTLY_F16", "MOSTLY_BF16", "MOSTLY_Q8_0", "MOSTLY_Q6_K"]
    by_size += [f"MOSTLY_{k}" for k in ("Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M")]
    gates = [GATES[name] for name in by_size]
    for finer, coarser in pairwise(gates):
        assert finer.mean_kl < coarser.mean_kl
        assert finer.perplexity_percent <= coarser.perplexity_percent
        assert finer.decided_top1 >= coarser.decided_top1


def figures(**changes: float) -> dict[str, float]:
    sound = {"kl_mean": 0.01, "decided_top1": 1.0, "decided_positions": 100}
    return {**sound, "perplexity_percent": 9.0, "perplexity_percent_surely": 0.5, **changes}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kl_mean": 0.02}, "mean KL 0.02 nats, allowed 0.02"),
        ({"kl_mean": math.nan}, "mean KL nan"),
        ({"decided_top1": 0.97}, "top-1 equal at 97.00% of 100 decided positions"),
        ({"perplexity_percent_surely": 1.0}, "perplexity +9.00 %, allowed +1 %"),
        ({"perplexity_percent_surely": math.nan}, "perplexity"),
    ],
)
def test_a_gate_closes(changes: dict[str, float], why: str) -> None:
    gate = Gate(mean_kl=0.02, decided_gap=1.0, decided_top1=0.98, perplexity_percent=1.0)
    assert gate.failures(figures()) == []
    (failure,) = gate.failures(figures(**changes))
    assert failure.startswith(why)


def test_one_miss_is_forgiven_where_the_gate_is_not_1() -> None:
    one_of_ten = figures(decided_top1=0.9, decided_positions=10)
    two_of_ten = figures(decided_top1=0.8, decided_positions=10)
    assert not Gate(0.02, 1.0, 0.98, 1.0).failures(one_of_ten)
    assert Gate(0.02, 1.0, 0.98, 1.0).failures(two_of_ten)
    assert Gate(0.02, 1.0, 1.0, 1.0).failures(one_of_ten)


def test_an_allowance_only_widens() -> None:
    wide = Gate(1e-4, 0.01, 1.0, 0.1).widened(Gate(0.06, 1.0, 0.98, 6.0))
    assert wide == Gate(0.0601, 1.0, 0.98, 6.1)
