"""What steps of a 7B would cost on cards that nobody has measured yet: projections by a formula.

    python benchmarks/projections.py             writes results/projections.jsonl, prints a table

No row of this file is a measurement, and each says so. The formula, and what it leaves out, are
those of zephyr_lite/plan/roofline.py; a card's rates, and where they are from, those of
zephyr_lite/plan/gpus.py. The model is Mistral-7B in NF4, adapters on all linears, bf16, no dropout,
at most 4096 tokens a micro-batch, examples of one length, so that none is cut badly, and their
share of the optimizer's step. `keep`: every layer keeps what its backward wants. `lean`: every
layer does all but down_proj again. Whether either fits is another question, which `zephyr-lite
plan` answers: `keep` wants 24 GB here.

The study that this project began with derived the same rates by hand (tests/benchmarks/
test_projections.py has its figures). SFT agrees within 0.5 %. DPO is up to 1 % lower: here 16 ranks
of the frozen adapter of dSFT and AdamW are counted too. The study's lean figures are for 8192
tokens a micro-batch, where dequantising weighs half as much, and without what adapters do again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import Gpu, gpu_named
from zephyr_lite.plan.roofline import micro_batch_seconds, step_seconds
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import Work, documents_work, pairs_work

RESULTS = Path(__file__).resolve().parent / "results" / "projections.jsonl"
FORMULA = "zephyr_lite/plan/roofline.py: micro_batch_seconds, step_seconds"
CARDS = ("4090", "3090", "5090", "A10G", "L4", "4060 Ti 16GB", "3060 12GB", "4060")
TOKENS = 4096  # at most, of a micro-batch
MISTRAL_7B = Geometry("mistral", 32, 4096, 14336, 32, 8, 128, 32000)


@dataclass(frozen=True)
class Task:
    """What is trained. lengths: of one document, or of prompt, chosen and rejected, tokens."""

    name: str
    unit: str
    lengths: tuple[int, ...]
    setting: Setting

    @property
    def examples(self) -> int:
        """Of a micro-batch."""
        return TOKENS // sum(self.lengths)

    @property
    def work(self) -> Work:
        """Of a micro-batch."""
        if len(self.lengths) == 1:
            return documents_work(self.lengths * self.examples)
        prompt, chosen, rejected = self.lengths
        return pairs_work([(prompt, chosen, rejected)] * self.examples)

    def per_second(self, gpu: Gpu, keep: int) -> float:
        """Units a second."""
        cut = Cut(TOKENS, keep)
        seconds = micro_batch_seconds(MISTRAL_7B, self.setting, cut, self.work, gpu) / self.examples
        seconds += step_seconds(MISTRAL_7B, self.setting, cut, gpu) / self.setting.batch
        return (sum(self.lengths) if self.unit == "tokens" else 1) / seconds


SFT = Setting("sft", trained=16, frozen=0, batch=8)
DPO = Setting("dpo", trained=128, frozen=16, batch=16)
TASKS = (
    Task("SFT, 2048", "tokens", (2048,), SFT),
    # Medians that papers use for UltraFeedback; means of 895 of its pairs in Mistral's tokens.
    Task("DPO, 150 + 330 + 330", "pairs", (150, 330, 330), DPO),
    Task("DPO, 170 + 282 + 260", "pairs", (170, 282, 260), DPO),
)


def rows() -> Iterator[dict[str, Any]]:
    """One row per card, task and policy."""
    for card in CARDS:
        gpu = gpu_named(card)
        for task in TASKS:
            for policy, keep in (("keep", MISTRAL_7B.layers), ("lean", 0)):
                yield {
                    "kind": "projection",
                    "formula": FORMULA,
                    "gpu": {**asdict(gpu), "usable_bytes": gpu.usable_bytes},
                    "geometry": asdict(MISTRAL_7B),
                    "task": task.name,
                    "setting": asdict(task.setting),
                    "lengths": task.lengths,
                    "tokens_per_micro_batch": task.work.tokens,
                    "policy": policy,
                    "unit": f"{task.unit}_per_second",
                    "value": float(f"{task.per_second(gpu, keep):.4g}"),
                }


def table(projected: list[dict[str, Any]]) -> str:
    """All rows as Markdown, a line per card."""
    columns = [f"{t.name}: {t.unit}/s {p}" for t in TASKS for p in ("keep", "lean")]
    lines = [
        "### PROJECTION, not measured: Mistral-7B QLoRA from the roofline "
        f"(r 16; DPO r 128 beside r 16; {TOKENS} tokens a micro-batch)",
        "",
        "| GPU | " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for start in range(0, len(projected), len(columns)):
        line = projected[start : start + len(columns)]
        values = [
            f"{r['value']:.0f}" if "tokens" in r["unit"] else f"{r['value']:.2f}" for r in line
        ]
        lines.append(f"| {line[0]['gpu']['name']} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the rows, print the table."""
    parser = argparse.ArgumentParser(description="Project steps of a 7B from the roofline.")
    parser.add_argument("--out", type=Path, default=RESULTS)
    out: Path = parser.parse_args().out
    projected = list(rows())
    out.write_text("".join(json.dumps(row) + "\n" for row in projected), encoding="utf-8")
    print(table(projected))


if __name__ == "__main__":
    main()
