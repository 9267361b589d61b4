"""dDPO's cache check: what rounding does to a sound cache, and what a faulty one looks like."""

from __future__ import annotations

import numpy as np
import pytest

from zephyr_lite.stages.dpo import AUDIT_PAIRS, is_biased

SPREAD = 0.042  # nats, of a margin: two branches that other micro-batches moved by 0.03 each


@pytest.mark.parametrize("pairs", [8, AUDIT_PAIRS])
def test_a_sound_cache_is_not_refused_by_chance(pairs: int) -> None:
    """By 3 of their own errors alone 8 pairs would be in one of 50, 64 in one of 260."""
    rng = np.random.default_rng(0)
    refused = sum(is_biased(rng.normal(0.0, SPREAD, pairs)) for _ in range(5000))
    assert refused <= (5 if pairs == AUDIT_PAIRS else 25)


def test_a_cache_that_was_summed_in_bf16_is_seen() -> None:
    rng = np.random.default_rng(0)
    margins = [rng.normal(0.034, SPREAD, AUDIT_PAIRS) for _ in range(500)]
    assert sum(map(is_biased, margins)) > 490


def test_one_pair_says_nothing_of_a_bias() -> None:
    assert not is_biased(np.array([0.5]))
