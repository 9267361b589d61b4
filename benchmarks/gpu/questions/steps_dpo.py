"""How fast is a preference step at Mistral-7B's geometry, on this card and on smaller ones?

NF4, the frozen SFT adapter (r 16) beside the one that trains (r 128), 16 pairs a step in the shared
layout, reference log-probs given. The lengths are those of real pairs of UltraFeedback.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from gpu.bench import Bench, Case
from gpu.rig import Rig, Setting, Task, geometry_of, optimizer_of
from gpu.rows import Part
from gpu.steps import step_cases
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.recipe import Dpo
from zephyr_lite.train.objectives import Preference

PART = Part("steps_dpo", 1, "DPO steps at 7B: pairs/s, memory, percent of roofline?", True)
# Tokens of prompt, chosen, rejected: every 13th of 886 usable pairs of UltraFeedback (binarised),
# in Mistral's tokens and Zephyr's template, cut to 1024 with 512 of the prompt. Mean 781 a pair.
LENGTHS = [
    (44, 15, 404), (42, 498, 355), (56, 143, 118), (57, 549, 351), (855, 54, 51), (37, 225, 207),
    (101, 860, 710), (63, 410, 451), (88, 833, 571), (177, 506, 300), (57, 450, 436),
    (419, 512, 405), (84, 152, 101), (398, 306, 319), (91, 391, 308), (105, 211, 74),
    (38, 200, 261), (490, 388, 357), (104, 619, 472), (162, 65, 512), (123, 552, 621),
    (128, 524, 532), (35, 135, 247), (55, 17, 29), (102, 625, 689), (51, 371, 128),
    (255, 413, 349), (95, 23, 21), (102, 18, 200), (62, 100, 79), (110, 832, 776), (68, 480, 107),
    (146, 32, 37), (294, 110, 93), (123, 40, 34), (38, 639, 264), (472, 60, 512), (386, 2, 290),
    (67, 437, 491), (78, 512, 512), (39, 551, 255), (50, 670, 246), (52, 11, 9), (97, 118, 172),
    (111, 402, 174), (44, 255, 285), (33, 442, 254), (42, 381, 534), (437, 124, 284),
    (43, 597, 810), (65, 227, 288), (67, 796, 40), (370, 561, 64), (37, 121, 102), (97, 205, 73),
    (42, 675, 569), (63, 412, 222), (46, 586, 846), (132, 3, 104), (174, 204, 149), (51, 92, 256),
    (105, 454, 356), (407, 224, 203), (35, 367, 214),
]  # fmt: skip
SETTINGS = [
    Setting(None, "native", "none", 4096),
    Setting(22.5, "native", "none", 2048),
    Setting(22.5, "native", "none", 2048, gemm="fp16acc"),
    Setting(22.5, "native", "full", 4096),
    Setting(None, "hf", "none", 4096),
    # The least memory that a step of rank 128 takes.
    Setting(None, "native", "full", 1024),
    Setting(None, "native", "offload", 1024),
    Setting(7.0, "native", "offload", 1024, place="host"),
    Setting(None, "native", "full", 1024, place="host"),
    Setting(14.5, "native", "full", 4096),
    Setting(10.8, "native", "full", 4096),
    Setting(10.8, "native", "offload", 4096),
    Setting(10.8, "native", "full", 2048),
    Setting(10.8, "native", "offload", 2048),
    Setting(7.0, "native", "offload", 1024),
    Setting(None, "native", "none", 8192),
    Setting(None, "native", "full", 4096),
    Setting(None, "native", "offload", 4096),
    Setting(22.5, "native", "none", 4096),
    Setting(22.5, "native", "offload", 8192),
    Setting(14.5, "native", "none", 1024),
    Setting(14.5, "native", "offload", 4096),
    Setting(7.0, "native", "full", 1024),
    Setting(None, "hf", "full", 4096),
    Setting(22.5, "hf", "full", 4096),
    Setting(14.5, "hf", "full", 2048),
    Setting(10.8, "hf", "full", 1024),
]
TOY_SETTINGS = [
    Setting(None, "native", "none", 64),
    Setting(22.5, "native", "full", 64),
    Setting(None, "native", "offload", 64, place="host"),
    Setting(None, "hf", "none", 64),
]


def cases(bench: Bench) -> Iterator[Case]:
    """All settings over one model."""
    geometry = geometry_of(bench)
    lengths = bench.pick(LENGTHS, [(5, 7, 9), (3, 8, 2), (11, 1, 4), (6, 6, 6)])
    rng = np.random.default_rng(0)

    def ids(length: int) -> np.ndarray:
        return rng.integers(3, geometry.vocabulary, length).astype(np.int32)

    pairs = [EncodedPair(ids(p), ids(c), ids(r)) for p, c, r in lengths]
    zeros = np.zeros(len(pairs), np.float32)
    scored = np.array(lengths, np.int32)[:, 1:].T
    reference = ReferenceLogProbs(zeros, zeros, *scored)
    settings = Dpo.model_validate(
        {"batch_size": bench.pick(16, 2), "optimizer": optimizer_of(bench)}
    )
    names = [str(number) for number in range(len(pairs))]
    task = Task(
        name="dpo",
        unit="pairs",
        adapters=bench.pick({"sft": 16, "dpo": 128}, {"sft": 2, "dpo": 4}),
        settings=settings,
        make_objective=lambda s: Preference(pairs, names, reference, settings, s.tokens),
    )
    yield from step_cases(bench, Rig(bench, task, geometry), bench.pick(SETTINGS, TOY_SETTINGS))
