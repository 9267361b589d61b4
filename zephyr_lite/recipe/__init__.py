"""The recipe: one YAML file that is the whole pipeline, typed, validated and overridable.

These files say what a recipe may hold; `recipe_file.load` reads one, applies `--set a.b=c` and
names file, line and nearest key where it is wrong. Every field's description carries its unit;
`recipe_schema.json_schema()` hands them to editors.

A field marked `affects_result=False` changes how a stage runs and never what it means (how often it
logs, how many tokens fit a micro-batch), so a stage's fingerprint leaves it out: see `run.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from zephyr_lite.recipe.data import Data, Dialogues, Feedback, Source, Sources, Split
from zephyr_lite.recipe.export import Export
from zephyr_lite.recipe.memory import Memory
from zephyr_lite.recipe.section import SHORT_FORMS, Section, result_fields
from zephyr_lite.recipe.training import ALL_LINEARS, Base, Build, Dpo, Lora, Sft, Training, is_large

__all__ = [
    "ALL_LINEARS", "SHORT_FORMS", "Base", "Build", "Data", "Dialogues", "Dpo", "Export", "Feedback",
    "Lora", "Memory", "Recipe", "Section", "Sft", "Source", "Sources", "Split", "Training",
    "is_large", "result_fields",
]  # fmt: skip


def _as_base(value: Any) -> Any:
    return {SHORT_FORMS["base"]: value} if isinstance(value, str) else value


class Recipe(Section):
    """One pipeline, from a base model to a file one can talk to."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$", description="Name of the recipe and its run."
    )
    description: str = Field("", description="One sentence shown by `zephyr-lite recipes`.")
    seed: int = Field(
        42, ge=0, lt=2**32, description="Seed of data order, adapters, dropout and draws."
    )
    base: Annotated[Base, BeforeValidator(_as_base, json_schema_input_type=str | Base)] = Field(
        description="The base model."
    )
    data: Data = Field(Data(), description="Dialogues and feedback.")
    sft: Sft | None = Field(None, description="dSFT.")
    dpo: Dpo | None = Field(None, description="dDPO.")
    engine: Literal["native", "hf", "unsloth"] = Field(
        "native",
        description="What runs the layers: our own (Mistral, Llama, Qwen; others run on `hf`); "
        "transformers + PEFT as they are; or Unsloth in an environment of its own, for dSFT only.",
    )
    attention: Literal["auto", "xformers"] = Field(
        "auto",
        description="Flash attention on a GPU: torch's own, or that of the `xformers` extra.",
    )
    gemm: Literal["exact", "fp16acc"] = Field(
        "exact",
        description="Products with frozen weights: in the compute dtype; or `fp16acc`, fp16 with "
        "fp16 sums, refused unless a probe of the GPU at start finds it at least 1.2 times as fast "
        "and within twice bfloat16's error. What is measured is always measured exactly.",
    )
    kernels: Literal["auto", "require", "off"] = Field(
        "auto",
        description="Triton kernels of engine native: where there is a GPU; an error where they "
        "cannot run; or plain PyTorch.",
    )
    memory: Memory = Field(Memory(), description="How the work is cut to fit.")
    export: Export = Field(Export(), description="What is written at the end.")
    expect: dict[str, tuple[float, float]] = Field(
        {}, description="Published bands, `stage.figure: [low, high]`; reports say in or out."
    )

    @model_validator(mode="after")
    def _parts_agree(self) -> Recipe:
        if self.sft and not self.sft.start and not self.data.dialogues:
            raise ValueError("sft needs data.dialogues, or sft.from")
        if self.dpo and not self.data.feedback:
            raise ValueError("dpo needs data.feedback")
        for name, (low, high) in self.expect.items():
            if low > high:
                raise ValueError(
                    f"expect.{name}: the band's low end {low} is above its high {high}"
                )
        return self
