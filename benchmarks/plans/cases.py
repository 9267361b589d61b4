"""The trainings that plans/rig.py measures: small enough for a CPU, of every kind the plan knows.

Rows are lengths in tokens: of a row's documents (sft), or prompt, chosen and rejected of a pair
(dpo). Some segments are shorter than what a CPU's attention pads into batches, others longer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Case:
    """One training.

    rows: of one optimizer step. micro: rows of a micro-batch. keep: as in `Cut`; None for all.
    The other fields are `Cut`'s and `Setting`'s.
    """

    name: str
    size: str
    stage: Literal["sft", "dpo"]
    rows: Rows
    micro: int = 1
    keep: int | None = None
    rest: Literal["lean", "offload"] = "lean"
    rank: int = 16
    frozen: int = 0
    quantization: Literal["nf4", "none"] = "nf4"
    optimizer: str = "adamw"
    place: Literal["device", "host"] = "device"
    dropout: bool = False
    tied: bool = False
    head_rows: int = 1024

    @property
    def tokens(self) -> int:
        """Budget of a micro-batch: `micro` rows of the longest."""
        return self.micro * max(sum(row) for row in self.rows)


SHORT: Rows = ((40, 30, 60, 21), (80, 17, 33))
LONG: Rows = ((180, 60), (60, 150, 30))
ONE: Rows = ((260,),)
PAIRS: Rows = ((40, 60, 50), (10, 80, 70), (30, 20, 90), (60, 40, 30))
PROMPTS: Rows = ((150, 30, 40), (140, 60, 20))

CASES = (
    # The tiny recipe's base: 256 wide, 3 layers, 512 tokens of vocabulary.
    Case("keep", "tiny", "sft", LONG),
    Case("lean", "tiny", "sft", LONG, keep=0),
    Case("mixed", "tiny", "sft", LONG, keep=1),
    Case("offload", "tiny", "sft", LONG, keep=0, rest="offload"),
    Case("offload-mixed", "tiny", "sft", LONG, keep=1, rest="offload"),
    Case("short", "tiny", "sft", SHORT, micro=2, rank=8),
    Case("dropout-keep", "tiny", "sft", LONG, dropout=True),
    Case("dropout-lean", "tiny", "sft", LONG, dropout=True, keep=0, rank=32),
    Case("one-micro-batch", "tiny", "sft", ONE, rank=128),
    Case("plain-tied", "tiny", "sft", LONG, quantization="none", tied=True),
    Case("8-bit", "tiny", "sft", LONG, rank=64, optimizer="adamw_8bit", keep=2),
    Case("8-bit-small", "tiny", "sft", SHORT, rank=4, optimizer="paged_adamw_8bit"),
    Case("host", "tiny", "sft", LONG, rank=64, place="host", keep=1),
    Case("dpo-keep", "tiny", "dpo", PAIRS, micro=2),
    Case("dpo-lean", "tiny", "dpo", PAIRS, micro=2, keep=0, frozen=16, rank=64),
    Case("dpo-prompts", "tiny", "dpo", PROMPTS, keep=1, frozen=8, dropout=True),
    Case("dpo-host-offload", "tiny", "dpo", PAIRS, place="host", keep=1, rest="offload"),
    # 21 M weights: 384 wide, 9 layers, 8192 tokens of vocabulary.
    Case("21m-keep", "21m", "sft", LONG),
    Case("21m-lean", "21m", "sft", LONG, keep=0, rank=64, optimizer="paged_adamw_32bit"),
    Case("21m-offload", "21m", "sft", LONG, keep=3, rest="offload", quantization="none"),
    Case("21m-dpo", "21m", "dpo", PAIRS, micro=2, frozen=16, rank=128, optimizer="adamw_8bit"),
    Case("21m-dpo-mixed", "21m", "dpo", PROMPTS, keep=4, frozen=16, rank=32, tied=True),
    Case("21m-dpo-host", "21m", "dpo", PAIRS, micro=4, keep=2, rank=64, place="host"),
    Case("21m-dropout", "21m", "sft", SHORT, micro=2, dropout=True, keep=5),
    # Other families: biases of q, k and v; norms of heads.
    Case("qwen2", "qwen2", "sft", LONG, keep=1),
    Case("qwen3", "qwen3", "dpo", PROMPTS, keep=1),
)
