"""Disk: what a run leaves behind, and what it needs on the way; about, for the disk's owner.

base          its 16-bit files, downloaded, and the NF4 checkpoint made from them once
tokens        5 bytes a token of dialogue: an id and whether it is part of an answer
checkpoints   masters and optimizer states of the larger adapter, one more than are kept
export        each file by its bytes a weight; no temporary file beside them
"""

from __future__ import annotations

from collections.abc import Mapping

from zephyr_lite.plan.checkpoint import Checkpoint
from zephyr_lite.plan.lengths import Lengths
from zephyr_lite.recipe import Recipe

# Bytes a weight of a whole file. Of mixtures: the published sizes of Mistral-7B's files.
EXPORTED = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q6_k": 0.820, "q5_k_m": 0.709,
    "q5_k_s": 0.690, "q4_k_m": 0.603, "q4_k_s": 0.572, "q3_k_m": 0.486, "q4_0": 0.568,
}  # fmt: skip
W4A16 = 0.60  # 4 bits and a scale a group of linears; embedding and head in 16 bits
TOKEN_BYTES = 5
PAIR_BYTES = 64  # of stored log-probs and keys
STATES = {"adamw": 8, "paged_adamw_32bit": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2}


def disk_bytes(
    recipe: Recipe, checkpoint: Checkpoint, lengths: Mapping[str, Lengths]
) -> dict[str, int]:
    """What -> bytes, in the order of a run.

    Args: lengths: of the stages that are trained.
    """
    found: dict[str, int] = {}
    if recipe.base.build is None and "/" in recipe.base.model:
        found["base"] = 2 * checkpoint.parameters
    if recipe.base.quantization == "nf4":
        found["NF4 base"] = checkpoint.linear_bytes + checkpoint.other_bytes
    if "sft" in lengths:
        found["tokens"] = TOKEN_BYTES * lengths["sft"].total_tokens
    if "dpo" in lengths:
        found["log-probs"] = PAIR_BYTES * lengths["dpo"].n_examples
    adapters = {stage: _adapter_bytes(recipe, checkpoint, stage) for stage in lengths}
    found["checkpoints"] = max(_checkpoint_bytes(recipe, stage, n) for stage, n in adapters.items())
    twice = adapters.get("sft", 0) if "dpo" in adapters else 0  # dDPO's holds those ranks too
    found["adapters"] = sum(adapters.values()) + twice
    found["export"] = round(checkpoint.parameters * _exported(recipe))
    return found


def _adapter_bytes(recipe: Recipe, checkpoint: Checkpoint, stage: str) -> int:
    """fp32 weights of a stage's adapter."""
    lora = getattr(recipe, stage).lora
    return 4 * checkpoint.geometry.adapter_weights(lora.r, lora.targets)


def _checkpoint_bytes(recipe: Recipe, stage: str, adapter_bytes: int) -> int:
    """All checkpoints of a training at their most: a new one stands before an old one goes."""
    settings = getattr(recipe, stage)
    best = 4 if stage == "dpo" and settings.keep == "best" else 0
    each = adapter_bytes // 4 * (4 + STATES[settings.optimizer] + best)
    return (settings.checkpoint_keep + 1) * each


def _exported(recipe: Recipe) -> float:
    """Bytes a weight of all files that the export leaves."""
    export = recipe.export
    whole = sum(EXPORTED[quant] for quant in export.quants)
    return whole + (2.0 if export.merged else 0.0) + (W4A16 if export.w4a16 else 0.0)
