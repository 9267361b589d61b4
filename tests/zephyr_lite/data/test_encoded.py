"""The truncation rule at its boundaries."""

from __future__ import annotations

import numpy as np
import pytest

from zephyr_lite.data.encoded import truncate_pair
from zephyr_lite.errors import RecipeError

# (prompt, chosen, rejected) lengths in, the same out, under 1024 / 512. By hand from TRL 0.7.10:
# the prompt is cut only when prompt + longer answer > 1024, answers only when it is still so.
CASES = {
    "fits": ((100, 200, 300), (100, 200, 300)),
    "exactly 1024": ((524, 500, 20), (524, 500, 20)),
    "exactly 1024, rejected longer": ((1000, 2, 24), (1000, 2, 24)),
    "exactly 1024, prompt short": ((100, 924, 20), (100, 924, 20)),
    "1025, prompt long": ((525, 500, 20), (512, 500, 20)),
    "1025 by the rejected answer": ((525, 20, 500), (512, 20, 500)),
    "1025, prompt exactly 512": ((512, 513, 20), (512, 512, 20)),
    "1025, prompt short: answers lose more than needed": ((100, 925, 20), (100, 512, 20)),
    "prompt short, both answers long": ((511, 1000, 600), (511, 512, 512)),
    "prompt 513, cut prompt is enough": ((513, 512, 512), (512, 512, 512)),
    "prompt 513, one more": ((513, 513, 512), (512, 512, 512)),
    "everything long": ((3000, 3000, 3000), (512, 512, 512)),
}


@pytest.mark.parametrize("case", CASES)
def test_lengths(case: str) -> None:
    before, after = CASES[case]
    prompt, chosen, rejected = (np.arange(n, dtype=np.int32) for n in before)
    pair = truncate_pair(prompt, chosen, rejected, 1024, 512, bos_id=0)
    assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == after
    flags = (pair.prompt_truncated, pair.chosen_truncated, pair.rejected_truncated)
    assert flags == tuple(b > a for b, a in zip(before, after, strict=True))
    assert np.array_equal(pair.chosen, chosen[: after[1]])
    assert np.array_equal(pair.rejected, rejected[: after[2]])


def test_the_prompt_keeps_its_end_and_one_bos() -> None:
    prompt, answer = np.arange(1000, dtype=np.int32), np.arange(600, dtype=np.int32)
    with_bos = truncate_pair(prompt, answer, answer[:5], 1024, 512, bos_id=0).prompt
    assert with_bos.tolist() == [0, *range(1000 - 511, 1000)]
    without = truncate_pair(prompt, answer, answer[:5], 1024, 512, bos_id=None).prompt
    assert without.tolist() == list(range(1000 - 512, 1000))


def test_answers_may_become_equal() -> None:
    prompt, same = np.arange(10, dtype=np.int32), np.zeros(40, dtype=np.int32)
    other = same.copy()
    other[39] = 1
    assert truncate_pair(prompt, same, other, 64, 16, bos_id=0).is_distinct
    assert not truncate_pair(prompt, same, other, 48, 16, bos_id=0).is_distinct


@pytest.mark.parametrize(("length", "prompt_length"), [(512, 512), (100, 512), (64, 1)])
def test_impossible_lengths(length: int, prompt_length: int) -> None:
    row = np.arange(4, dtype=np.int32)
    with pytest.raises(RecipeError, match="max_prompt_length"):
        truncate_pair(row, row, row, length, prompt_length, bos_id=0)
