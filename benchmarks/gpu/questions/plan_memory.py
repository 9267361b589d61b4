"""How right is the memory plan at Mistral-7B's geometry, and what do CUDA and its allocator take?

The plan counts every tensor; what torch's allocator cannot use, and what CUDA takes before the
first tensor, are constants of zephyr_lite/plan/memory.py that these rows are for. Configurations
that a recipe could have come first, then what differs from them in one thing at a time: how many
layers keep their activations and what the others do, ranks, optimizers, dropout, tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np

from gpu.bench import Bench, Case
from gpu.plan import Configuration, measure
from gpu.rig import Shared, geometry_of
from gpu.rows import Part
from lengths.real import dialogue_lengths, pair_lengths
from plans.cases import Rows
from zephyr_lite.data.layout import Documents, pack_masked

PART = Part("plan_memory", 1, "Planned bytes against the allocator's peak at 7B?", by_commit=True)
SFT_ROWS, PAIRS = 8, 16  # of an optimizer step, as the recipes have it
DPO = {"frozen": 16, "rank": 128}


def cases(bench: Bench) -> Iterator[Case]:
    """All configurations over one base."""
    shared = Shared(bench, geometry_of(bench))
    for case in bench.pick(configurations, toys)():
        yield Case(case.shape, lambda c=case: measure(shared, c))


@cache
def configurations() -> list[Configuration]:
    """Of Mistral-7B, the most telling first. `keep`: of 32 layers, None for all."""
    return [
        # What 24 GB and 8 GB are planned for, and both policies that a peak hangs on.
        dpo(4096, optimizer="adamw", keep=0),
        sft(4096, dropout=True),
        dpo(1024, optimizer="adamw", keep=0, rest="offload", place="host"),
        sft(2048, dropout=True, keep=0),
        dpo(2048, optimizer="adamw", keep=16),
        sft(8192, dropout=True, keep=0),
        dpo(4096),
        sft(8192, keep=16, rest="offload"),
        # One thing at a time.
        sft(4096),
        sft(4096, keep=0),
        sft(4096, keep=16),
        sft(4096, keep=0, rest="offload"),
        sft(4096, keep=8, rank=64, optimizer="adamw"),
        sft(4096, keep=8, rank=128, optimizer="adamw", dropout=True),
        sft(2048, keep=0, rank=128, optimizer="adamw", place="host"),
        sft(1024, keep=0, rank=16, rest="offload", optimizer="adamw", place="host"),
        sft(8192, rank=64, dropout=True),
        sft(6144, keep=24, frozen=16, rank=64),
        dpo(4096, keep=0),
        dpo(4096, keep=0, rest="offload", optimizer="adamw"),
        dpo(4096, keep=8, optimizer="adamw", place="host"),
        dpo(4096, keep=16, frozen=0, rank=16),
        dpo(4096, keep=16, rank=64, dropout=True),
        dpo(8192, keep=0),
        dpo(8192, keep=4, rest="offload", frozen=0, rank=64, optimizer="adamw"),
        dpo(1024, optimizer="adamw"),
        dpo(1024, keep=0, rank=64),
        sft(4096, keep=0, gemm="fp16acc"),
    ]


def toys() -> list[Configuration]:
    """Of two layers of a CPU."""
    pairs: Rows = ((11, 30, 24), (5, 40, 33), (9, 20, 26), (3, 28, 50))
    documents: Rows = ((40, 24), (30, 34), (64,), (20, 44))
    return [
        Configuration("sft", "toy", "sft", documents, budget=128, rank=4, dropout=True),
        Configuration("dpo", "toy", "dpo", pairs, budget=160, keep=0, rank=4, frozen=2),
        Configuration(
            "host", "toy", "dpo", pairs, budget=96, keep=1, rest="offload", rank=4, frozen=2,
            place="host",
        ),
    ]  # fmt: skip


def sft(tokens: int, **fields: object) -> Configuration:
    """Dialogues of real lengths, packed into rows of 2048 tokens, or of a smaller micro-batch."""
    return _named("sft", tokens, _packed(min(tokens, 2048)), {"optimizer": "adamw_8bit"} | fields)


def dpo(tokens: int, **fields: object) -> Configuration:
    """Pairs of UltraFeedback's lengths, prompts shared, the SFT adapter frozen beside."""
    return _named("dpo", tokens, _pairs(), {"optimizer": "adamw_8bit", **DPO} | fields)


def _named(stage: str, tokens: int, rows: Rows, fields: dict[str, object]) -> Configuration:
    values = {"stage": stage, "rows": rows, "budget": tokens, **fields}
    return Configuration(name=stage, size="mistral-7b", **values)  # pyright: ignore[reportArgumentType]


@cache
def _packed(length: int) -> Rows:
    """A step's rows, the fullest first: lengths of their documents."""
    offsets = np.concatenate([[0], np.cumsum(dialogue_lengths())]).astype(np.int64)
    nothing = np.empty(0, np.int32)
    rows = pack_masked(Documents(nothing, nothing.astype(bool), offsets), length)
    several = [row for row in rows if len(row) > 1] or rows
    chosen = sorted(several, key=lambda row: -sum(stop - start for start, stop in row))
    return tuple(tuple(stop - start for start, stop in row) for row in chosen[:SFT_ROWS])


@cache
def _pairs() -> Rows:
    """A step's pairs: every 55th."""
    lengths = pair_lengths()
    return tuple(lengths[:: len(lengths) // PAIRS][:PAIRS])
