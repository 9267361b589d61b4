"""Examples that a recipe's training could have had: random ids of real lengths, cut by its rules.

Each function gives the objective and, for a plan, the lengths of the same rows. At toy size there
are a few examples, a 64th as long.
"""

from __future__ import annotations

import numpy as np

from gpu.bench import Bench
from lengths.real import dialogue_lengths, pair_lengths
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Documents
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.plan.estimates import truncated
from zephyr_lite.plan.lengths import DocumentLengths, PairLengths, documents_of, pairs_of
from zephyr_lite.recipe import Dpo, Sft
from zephyr_lite.train.objectives import LanguageModelling, Preference

SHORTER = 64


def documents(
    bench: Bench, vocabulary: int, settings: Sft
) -> tuple[LanguageModelling, DocumentLengths]:
    """Dialogues, packed; the budget of a micro-batch is one token until it is set."""
    lengths = dialogue_lengths()
    lengths = bench.pick(lengths, [n // SHORTER + 2 for n in lengths[:16]])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    stream = Documents(_ids(vocabulary, int(offsets[-1])), np.ones(offsets[-1], bool), offsets)
    packed = documents_of(stream, settings)
    return LanguageModelling(stream, list(packed.rows), settings.loss_on, 1), packed


def pairs(bench: Bench, vocabulary: int, settings: Dpo) -> tuple[Preference, PairLengths]:
    """UltraFeedback's pairs, their reference log-probs 0; the budget as in `documents`."""
    lengths = np.array(pair_lengths(), np.int64)
    cut = truncated(bench.pick(lengths, lengths[:8] // SHORTER + 1), settings)
    stream, ends = _ids(vocabulary, int(cut.sum())), cut.flatten().cumsum()
    pieces = np.split(stream, ends[:-1])  # prompt, chosen, rejected, prompt, ...
    found = [EncodedPair(*p) for p in zip(pieces[0::3], pieces[1::3], pieces[2::3], strict=True)]
    nothing = np.zeros(len(found), np.float32)
    reference = ReferenceLogProbs(nothing, nothing, *cut[:, 1:].T.astype(np.int32))
    names = [str(number) for number in range(len(found))]
    return Preference(found, names, reference, settings, 1), pairs_of(found)


def _ids(vocabulary: int, count: int) -> np.ndarray:
    """Token ids, none of them special."""
    return np.random.default_rng(0).integers(3, vocabulary, count).astype(np.int32)
