"""Setting: all of a recipe that bytes and seconds of one training hang on.

What is fixed by the recipe (ranks, optimizer, quantisation) and what the schedule may choose
(`Cut`: tokens of a micro-batch, which layers keep what, where optimizer states live) stand apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zephyr_lite.data.layout import Order
from zephyr_lite.recipe import ALL_LINEARS, Dpo, Recipe

Rest = Literal["lean", "offload"]
Place = Literal["device", "host"]


@dataclass(frozen=True)
class Cut:
    """How a training's work is cut; never what is computed.

    tokens: budget of a micro-batch. keep: how many layers, the last ones, keep everything for their
    backward; the others keep what `rest` says. place: of fp32 masters and optimizer states.
    head_rows: rows of logits alive at once.
    """

    tokens: int
    keep: int
    rest: Rest = "lean"
    place: Place = "device"
    head_rows: int = 1024


@dataclass(frozen=True)
class Setting:
    """What one training is, beside its `Cut`.

    stage: `sft` or `dpo`. trained, frozen: ranks of the adapter that trains and of one beside it
    (0: none), both on `targets`. element: bytes of the compute dtype. batch: examples of an
    optimizer step. optimizer: as in the recipe.
    """

    stage: Literal["sft", "dpo"]
    trained: int
    frozen: int
    targets: tuple[str, ...] = ALL_LINEARS
    dropout: bool = False
    optimizer: str = "adamw_8bit"
    batch: int = 8
    quantization: Literal["nf4", "none"] = "nf4"
    double_quant: bool = True
    element: Literal[2, 4] = 2
    gemm: Literal["exact", "fp16acc"] = "exact"
    device: Literal["cpu", "cuda"] = "cuda"


def setting_of(
    recipe: Recipe,
    stage: Literal["sft", "dpo"],
    device: Literal["cpu", "cuda"],
    element: Literal[2, 4],
    sft_rank: int | None = None,
) -> Setting:
    """What the recipe says of a stage.

    Args: sft_rank: of the SFT adapter beside dDPO's, 0 for none; default: the recipe's.
    Raises: ValueError where the recipe has no such stage.
    """
    settings = getattr(recipe, stage)
    if settings is None:
        raise ValueError(f"recipe {recipe.name} has no section {stage}")
    if sft_rank is None:
        sft_rank = recipe.sft.lora.r if recipe.sft else 0
    lora, trained = settings.lora, settings.lora.r
    frozen = sft_rank if stage == "dpo" else 0
    if recipe.sft and isinstance(settings, Dpo) and settings.adapter == "continue":
        lora, trained = recipe.sft.lora, sft_rank  # a copy trains on, itself is the reference
    return Setting(
        stage=stage,
        trained=trained,
        frozen=frozen,
        targets=lora.targets,
        dropout=lora.dropout > 0,
        optimizer=settings.optimizer,
        batch=settings.batch_size,
        quantization=recipe.base.quantization,
        double_quant=recipe.base.double_quant,
        element=element,
        gemm=recipe.gemm,
        device=device,
    )


def order_of(recipe: Recipe, stage: Literal["sft", "dpo"], n_examples: int) -> Order:
    """The order of a stage's examples, as the training loop makes it.

    Raises: ValueError where the recipe has no such stage.
    """
    s = getattr(recipe, stage)
    if s is None:
        raise ValueError(f"recipe {recipe.name} has no section {stage}")
    return Order(n_examples, s.batch_size, s.epochs, recipe.seed, s.max_steps)
