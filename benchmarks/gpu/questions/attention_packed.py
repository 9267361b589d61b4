"""Which attention for packed documents: torch's varlen flash, batched SDPA, or FlexAttention?

Forward and backward at the heads of Mistral-7B (32 query, 8 key/value, 128 wide), for documents
cut to 2048 tokens (packed supervised data) and for documents of mixed length. `varlen_expanded`
repeats keys and values to all heads first: what native GQA saves.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpu.attention import pack_documents
from gpu.attention_race import MISTRAL, TOY, race_backends
from gpu.bench import Bench, Case
from gpu.rows import Measure, Part

PART = Part("attention_packed", 1, "Packed documents: varlen flash, SDPA or FlexAttention?")
# Odd lengths, a single token, more than one block: for the check, before anything is timed.
SMALL = [37, 1, 130, 63, 255]
# 8192 tokens in conversations of mixed length, fixed so that every card gets the same row.
MIXED = [1411, 96, 733, 2048, 415, 1189, 257, 611, 882, 148, 402]


def cases(bench: Bench) -> Iterator[Case]:
    """Four documents of 2048, then eleven mixed ones: 8192 tokens either way."""
    layouts = {"2048": [2048] * 4, "mixed": MIXED}
    for name, lengths in bench.pick(layouts, {"equal": [16, 16], "mixed": [9, 23]}).items():
        shape = {"layout": name, "documents": lengths}
        yield Case(shape, lambda lengths=lengths: _measure(bench, lengths))


def _measure(bench: Bench, lengths: list[int]) -> Iterator[Measure]:
    # The check keeps the case's kind: equal lengths, which batched SDPA needs, or odd ones.
    is_equal = len(set(lengths)) == 1
    small = pack_documents([96, 96] if is_equal else bench.pick(SMALL, SMALL[:3]), bench.device)
    layouts = {"": pack_documents(lengths, bench.device)}
    yield from race_backends(bench, small, layouts, bench.pick(MISTRAL, TOY))
