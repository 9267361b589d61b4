"""Is [prompt | chosen | rejected] with copied prompt keys right and fast in one varlen call?

Two bottom-right causal segments per pair: (q = p + c, k = p + c) and (q = r, k = p + r), the
prompt's keys and values gathered once more for the second. The truth attends each of the two
sequences on its own, in fp64. `shared_` rows time the layout, copy and its gradient included;
`two_sequences_` rows time the same pairs with the prompt computed twice. FlexAttention reads the
shared prompt through its mask and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from gpu.attention import pack_documents, pack_pairs
from gpu.attention_race import MISTRAL, TOY, race_backends
from gpu.bench import Bench, Case
from gpu.rows import Measure, Part

PART = Part("attention_shared", 1, "Shared prompt with copied keys: right, and how fast?")
Pair = tuple[int, int, int]  # tokens of prompt, chosen, rejected
# An empty prompt, one-token answers, lengths around a block of 64: for the check.
SMALL: list[Pair] = [(37, 50, 61), (0, 17, 33), (5, 1, 1), (64, 64, 63), (129, 3, 70)]
# Medians of UltraFeedback (p 150, c 330) with its spread; long prompts (p 500, c 250).
ULTRAFEEDBACK: list[Pair] = [
    (150, 330, 318),
    (61, 402, 277),
    (233, 298, 391),
    (118, 511, 342),
    (512, 204, 308),
    (84, 187, 355),
    (172, 362, 129),
    (97, 266, 301),
    (140, 455, 240),
    (205, 331, 286),
]
LONG_PROMPTS: list[Pair] = [(500, 250, 250), (512, 231, 304), (471, 262, 219), (488, 305, 243)] * 2


def cases(bench: Bench) -> Iterator[Case]:
    """UltraFeedback-like pairs and long-prompt pairs, about 8000 tokens each."""
    layouts = {"ultrafeedback": ULTRAFEEDBACK, "long_prompts": LONG_PROMPTS}
    for name, pairs in bench.pick(layouts, {"ultrafeedback": [(7, 9, 5), (3, 8, 6)]}).items():
        shape = {"layout": name, "pairs": pairs}
        yield Case(shape, lambda pairs=pairs: _measure(bench, pairs))


def _measure(bench: Bench, pairs: list[Pair]) -> Iterator[Measure]:
    small = pack_pairs(bench.pick(SMALL, SMALL[1:3]), bench.device)
    twice = [p + answer for p, c, r in pairs for answer in (c, r)]
    layouts = {
        "shared_": pack_pairs(pairs, bench.device),
        "two_sequences_": pack_documents(twice, bench.device),
    }
    yield from race_backends(bench, small, layouts, bench.pick(MISTRAL, TOY))
