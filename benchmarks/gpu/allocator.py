"""A training run as the allocator sees it: 50 micro-batches of random size under a memory cap.

    python benchmarks/gpu/allocator.py '{"cap_bytes": 24159191040, "fill": 0.95, ...}'

A script of its own, because the allocator reads its settings (PYTORCH_ALLOC_CONF) once per process.
Tensors are allocated and freed in the order of a QLoRA step that keeps every layer's activations;
none is computed with. Prints one JSON object.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass

import torch

# Bytes per token of one Mistral-7B layer, bf16: input, q, k, v, attention out, log-sum-exp,
# mid-layer residual, gate, up. Their sum is what `keep` saves: 94,336 bytes.
SAVED = (8192, 8192, 2048, 2048, 8192, 128, 8192, 28672, 28672)
NORMED, HIDDEN = 8192, 28672  # transients: a normed input, silu(gate) * up
SCRATCH_BYTES = 28704 * 4160 * 2  # the widest dequantised linear
LOGIT_BYTES = 1024 * 32000 * 4  # one chunk of the head
WEIGHT_BYTES = 112_500_000  # NF4 codes and scales of one layer
OTHER_FIXED_BYTES = 950_000_000  # embedding, head, adapters, optimizer


@dataclass(frozen=True)
class Plan:
    """cap_bytes: limit of this process; fill: share of it that the largest micro-batch plans to
    use; layers, steps, scale: size of the run (scale divides every fixed tensor); device."""

    cap_bytes: int
    fill: float
    layers: int = 32
    steps: int = 50
    scale: int = 1
    device: str = "cuda"

    @property
    def fixed_bytes(self) -> int:
        """What stands for the whole run."""
        fixed = self.layers * WEIGHT_BYTES + OTHER_FIXED_BYTES + SCRATCH_BYTES
        return fixed // self.scale

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest micro-batch, by adding up bytes as a memory planner does."""
        per_token = self.layers * sum(SAVED) + NORMED + 2 * HIDDEN
        free = self.fill * self.cap_bytes - self.fixed_bytes - LOGIT_BYTES // self.scale
        return int(free // per_token)


class Run:
    """Allocates as the plan says. Tensors hold bytes, uninitialised."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.device = plan, torch.device(plan.device)
        weights = [self.take(WEIGHT_BYTES // plan.scale) for _ in range(plan.layers)]
        sizes = (OTHER_FIXED_BYTES, SCRATCH_BYTES)
        self.fixed = [*weights, *(self.take(size // plan.scale) for size in sizes)]

    def take(self, size: int) -> torch.Tensor:
        """A fresh block of `size` bytes."""
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)

    def step(self, tokens: int) -> None:
        """Forward, head in chunks, backward: one micro-batch."""
        saved = []
        for _ in range(self.plan.layers):
            normed = self.take(NORMED * tokens)
            saved.append([self.take(size * tokens) for size in SAVED])
            hidden = self.take(HIDDEN * tokens)
            del normed, hidden
        gradient = self.take(NORMED * tokens)
        for _ in range(0, tokens, 1024):
            self.take(LOGIT_BYTES // self.plan.scale)
        while saved:
            hidden, d_hidden = self.take(HIDDEN * tokens), self.take(HIDDEN * tokens)
            del hidden, d_hidden
            gradient = self.take(NORMED * tokens)
            saved.pop()
        del gradient


def simulate(plan: Plan) -> dict[str, float | bool]:
    """Run the plan; a micro-batch that finds no memory is counted and dropped."""
    if plan.max_tokens < 4:
        raise ValueError(f"cap of {plan.cap_bytes} bytes leaves {plan.max_tokens} tokens")
    run = Run(plan)
    order = random.Random(0)
    sizes = [order.randint(plan.max_tokens // 4, plan.max_tokens) for _ in range(plan.steps - 1)]
    out_of_memory = 0
    start = time.perf_counter()
    for tokens in [*sizes, plan.max_tokens]:
        try:
            run.step(tokens)
        except torch.OutOfMemoryError:
            out_of_memory += 1
    seconds = time.perf_counter() - start
    report: dict[str, float | bool] = {"seconds": seconds, "out_of_memory": out_of_memory}
    return {**report, "max_tokens": plan.max_tokens, **read_allocator(run.device)}


def read_allocator(device: torch.device) -> dict[str, float | bool]:
    """Peaks and retries of CUDA's caching allocator; {} on a CPU, which has no such allocator."""
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    segments = torch.cuda.memory_snapshot()
    return {
        "peak_allocated": statistics["allocated_bytes.all.peak"],
        "peak_reserved": statistics["reserved_bytes.all.peak"],
        "retries": statistics["num_alloc_retries"],
        "is_expandable": any(segment.get("is_expandable", False) for segment in segments),
    }


def main() -> None:
    """Read a plan from the first argument, cap this process, print the report."""
    plan = Plan(**json.loads(sys.argv[1]))
    if plan.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(plan.cap_bytes / total, 1.0))
    print(json.dumps(simulate(plan)))


if __name__ == "__main__":
    main()
