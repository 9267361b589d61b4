"""What a training left behind, as tests compare it: weights, checkpoint, metrics."""

from __future__ import annotations

import json
from typing import Any

from zephyr_lite.train.loop import Job

TIMING = {"tokens_per_second", "pairs_per_second", "peak_memory_gib"}


def weights(job: Job) -> dict[str, bytes]:
    """The trained tensors, byte for byte."""
    return {n: p.detach().numpy().tobytes() for n, p in job.policy.trainable().items()}


def newest(job: Job) -> dict[str, bytes]:
    """Name and tensors of the newest checkpoint, byte for byte."""
    folder = sorted((job.folder / "checkpoints").glob("step-*"))[-1]
    return {f"{folder.name}/{f.name}": f.read_bytes() for f in folder.glob("*.safetensors")}


def lines(job: Job) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measures."""
    text = (job.folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in found]
