"""`export`: what the user takes home."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from zephyr_lite.recipe.section import Section

Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q4_0"
]


class Export(Section):
    """What the user takes home."""

    quants: tuple[Quant, ...] = Field(
        default=("q4_k_m",), min_length=1, description="GGUF types to write."
    )
    base_weights: Literal["nf4", "original"] = Field(
        default="nf4",
        description="What the adapter is folded into: the quantised values it was trained on, or "
        "the base's own 16-bit weights.",
    )
    quantiser: Literal["auto", "torch", "ggml"] = Field(
        default="auto",
        description="Who quantises: our own code, or llama.cpp's in the `llama` extra; `auto` "
        "takes the latter for the types where it is faster.",
    )
    context_length: int | None = Field(
        default=None,
        ge=16,
        description="Context stated in the file, tokens; default: the model's attention window "
        "where it has one, else its positions.",
    )
    merged: bool = Field(default=False, description="Also write merged safetensors.")
    merged_dtype: Literal["float16", "bfloat16", "nf4"] = Field(
        default="float16",
        description="Type of the merged safetensors; nf4 is refused, for it would undo the DPO.",
    )
    w4a16: bool = Field(default=False, description="Also write 4-bit compressed-tensors, for vLLM.")
    lora_gguf: bool = Field(
        default=False, description="Also write the adapter alone as GGUF, for llama.cpp's --lora."
    )
    verify: bool = Field(
        default=True,
        description="Compare each GGUF with the trained model before it gets its name.",
    )
    verify_prompts: int = Field(
        default=20,
        ge=1,
        description="Held-out prompts over which each file is compared with the model.",
    )
    verify_tokens: int = Field(
        default=64, ge=1, description="Positions compared per prompt, tokens."
    )
    questions: str | None = Field(
        default=None,
        description="JSONL of {prompt, accept: regex} that the exported file must answer.",
    )
