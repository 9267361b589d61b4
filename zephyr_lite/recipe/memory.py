"""`memory`: how the work is cut to fit; never what is computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from zephyr_lite.recipe.section import Section, how

TOKENS = 2048  # of a micro-batch where `auto` was not planned: on a CPU


def _whole_or_auto(value: Any) -> Any:
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 8
    if value != "auto" and not is_whole:
        raise ValueError("must be auto, or a whole number of at least 8")
    return value


# One sentence for what would be two errors of a union.
_Tokens = Annotated[Literal["auto"] | Annotated[int, Field(ge=8)], BeforeValidator(_whole_or_auto)]


class Memory(Section):
    """How the work is cut to fit; never what is computed.

    `auto` is settled by the plan (`plan/schedule.py`) from the GPU's memory before a training
    starts. Without a GPU, and without a `budget`, nothing is planned: 2048 tokens, all kept.
    """

    tokens_per_micro_batch: _Tokens = how(
        "auto", "Tokens of one forward and backward; `auto`: what is fastest of what fits."
    )
    checkpointing: Literal["auto", "none", "full", "offload"] = how(
        "auto",
        "`none` keeps what the backward needs; `full` computes every layer again in it: less "
        "memory, nearly one more forward; `offload` (engine native) also keeps the layers' inputs "
        "in host memory; `auto`: as few layers are computed again as fit.",
    )
    keep_layers: int | None = how(
        None,
        "Under `full` and `offload`, how many layers, the last ones, keep everything all the same "
        "(engine native).",
        ge=0,
    )
    head_rows: int = how(1024, "Rows of logits alive at once in the head.", ge=1)
    optimizer: Literal["auto", "device", "host"] = how(
        "auto",
        "Where fp32 masters and optimizer states live; `host`: pinned host memory, one transfer "
        "each way a step; `auto`: there where nothing else fits, if the optimizer is adamw.",
    )
    budget: str | None = how(
        None, "GPU memory to plan for, such as 24GB; default: what is free on the GPU."
    )
    reserve: float = how(
        0.0, "Gigabytes of the GPU that are left alone, for a desktop on the same card.", ge=0
    )

    @model_validator(mode="after")
    def _kept_beside_what(self) -> Memory:
        if self.keep_layers is not None and self.checkpointing not in ("full", "offload"):
            raise ValueError("keep_layers needs checkpointing: full or offload")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, where nothing else was planned."""
        chosen = self.tokens_per_micro_batch
        return TOKENS if chosen == "auto" else chosen

    @property
    def place(self) -> Literal["device", "host"]:
        """Where optimizer states live, where nothing else was planned."""
        return "host" if self.optimizer == "host" else "device"
