"""Token ids of dialogues and pairs, and the recipe's truncation rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from zephyr_lite.errors import RecipeError


class EncodedDialogue(NamedTuple):
    """`ids_T`: int32. `assistant_T`: bool, True on answers and their `</s>`."""

    ids: np.ndarray
    assistant: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class EncodedPair:
    """int32 ids. `prompt` begins with BOS and ends with `<|assistant|>\\n`; answers with `</s>`.

    The flags say what `truncate_pair` cut; an answer that was cut has no `</s>`.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prompt_truncated: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False

    @property
    def is_distinct(self) -> bool:
        """Whether the two answers still differ after truncation."""
        return not np.array_equal(self.chosen, self.rejected)


def truncate_pair(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    max_length: int,
    max_prompt_length: int,
    bos_id: int | None,
) -> EncodedPair:
    """Zephyr's rule (TRL 0.7, keep_end): nothing is cut while prompt + longer answer fit.

    Else the prompt keeps its last `max_prompt_length` tokens, and if that is not enough both
    answers keep their first `max_length - max_prompt_length`. Departure: TRL lost the BOS with the
    prompt's head; here it stays at position 0 and the last `max_prompt_length - 1` tokens follow.
    """
    if not 2 <= max_prompt_length < max_length:
        sizes = f"max_prompt_length {max_prompt_length}, max_length {max_length}"
        raise RecipeError(f"lengths must satisfy 2 <= max_prompt_length < max_length: {sizes}")
    longer = max(len(chosen), len(rejected))
    short = prompt
    if len(prompt) + longer > max_length and len(prompt) > max_prompt_length:
        short = prompt[-max_prompt_length:]
        if bos_id is not None:
            short = np.concatenate([prompt[:1], prompt[1 - max_prompt_length :]])
    room = longer if len(short) + longer <= max_length else max_length - max_prompt_length
    return EncodedPair(
        prompt=short,
        chosen=chosen[:room],
        rejected=rejected[:room],
        prompt_truncated=len(short) < len(prompt),
        chosen_truncated=len(chosen) > room,
        rejected_truncated=len(rejected) > room,
    )
