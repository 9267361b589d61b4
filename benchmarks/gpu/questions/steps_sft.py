"""How fast is a supervised step at Mistral-7B's geometry, on this card and on smaller ones?

NF4, LoRA r 16 on all linears, 8 rows of one 2048-token document a step, loss on every token. Caps
stand for cards of 24, 16, 12 and 8 GB less their context. Engine `hf` is measured beside ours.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu.bench import Bench, Case
from gpu.rig import Rig, Setting, Task, geometry_of, optimizer_of
from gpu.rows import Part
from gpu.steps import step_cases
from zephyr_lite.data.layout import Documents
from zephyr_lite.recipe import Sft
from zephyr_lite.train.objectives import LanguageModelling

PART = Part("steps_sft", 1, "SFT steps at 7B: tokens/s, memory, percent of roofline?", True)
ROWS = 64
SETTINGS = [
    # What is claimed first: no recomputation, with dropout and without, uncapped and at 24 GB.
    Setting(None, "native", "none", 8192),
    Setting(22.5, "native", "none", 4096),
    Setting(22.5, "native", "none", 4096, gemm="fp16acc"),
    Setting(None, "native", "none", 8192, 0.05),
    Setting(None, "hf", "none", 8192),
    Setting(22.5, "native", "full", 8192),
    Setting(14.5, "native", "none", 2048),
    Setting(14.5, "native", "full", 8192),
    Setting(10.8, "native", "full", 4096),
    Setting(7.0, "native", "full", 2048),
    Setting(7.0, "native", "offload", 2048),
    Setting(None, "native", "none", 2048),
    Setting(None, "native", "none", 4096),
    Setting(None, "native", "none", 16384),
    Setting(None, "native", "full", 8192),
    Setting(None, "native", "offload", 8192),
    Setting(22.5, "native", "none", 4096, 0.05),
    Setting(22.5, "native", "offload", 16384),
    Setting(14.5, "native", "offload", 8192),
    Setting(10.8, "native", "none", 2048),
    Setting(10.8, "native", "offload", 8192),
    Setting(None, "hf", "none", 8192, 0.05),
    Setting(None, "hf", "full", 8192),
    Setting(22.5, "hf", "none", 2048),
    Setting(22.5, "hf", "full", 8192),
    Setting(14.5, "hf", "full", 4096),
    Setting(10.8, "hf", "full", 2048),
    Setting(7.0, "hf", "full", 2048),
]
TOY_SETTINGS = [
    Setting(None, "native", "none", 32, 0.05),
    Setting(22.5, "native", "offload", 32),
    Setting(None, "native", "none", 32, gemm="fp16acc"),
    Setting(None, "hf", "full", 32),
]


def cases(bench: Bench) -> Iterator[Case]:
    """All settings over one model."""
    geometry = geometry_of(bench)
    length, batch = bench.pick((2048, 8), (16, 2))
    ids = np.random.default_rng(0).integers(3, geometry.vocabulary, ROWS * length).astype(np.int32)
    offsets = np.arange(ROWS + 1, dtype=np.int64) * length
    documents = Documents(ids, np.zeros(len(ids), bool), offsets)
    rows = [[(int(at), int(at) + length)] for at in offsets[:-1]]
    task = Task(
        name="sft",
        unit="rows",
        adapters={"sft": bench.pick(16, 4)},
        settings=Sft.model_validate({"batch_size": batch, "optimizer": optimizer_of(bench)}),
        make_objective=lambda s: LanguageModelling(documents, rows, "all", s.tokens),
    )
    yield from step_cases(bench, Rig(bench, task, geometry), bench.pick(SETTINGS, TOY_SETTINGS))
