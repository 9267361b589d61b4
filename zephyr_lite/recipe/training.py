"""`base`, `sft` and `dpo`: the model that is trained, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from zephyr_lite.recipe.section import Section, how

SMALL_BYTES = 2 << 30  # weights that a CPU can train in hours
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Lora(Section):
    """A LoRA adapter (arXiv 2106.09685)."""

    r: int = Field(default=16, ge=1, description="Rank.")
    alpha: float = Field(
        default=16, gt=0, description="Scale numerator: the update is alpha / r * B A."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, fraction."
    )
    targets: tuple[str, ...] = Field(
        default=ALL_LINEARS, description="Names of the linears that get one."
    )


# Of their own, so that `lora: {r: 8}` in a recipe keeps the stage's other defaults.
class SftLora(Lora):
    """The SFT adapter, as published."""

    dropout: float = Field(
        default=0.05, ge=0, lt=1, description="Dropout on the adapter's input, fraction."
    )


class DpoLora(Lora):
    """The DPO adapter, as published."""

    r: int = Field(default=128, ge=1, description="Rank.")
    alpha: float = Field(
        default=128, gt=0, description="Scale numerator: the update is alpha / r * B A."
    )


class Training(Section):
    """What every training stage has."""

    epochs: float = Field(1.0, gt=0, description="Passes over the training rows.")
    max_steps: int | None = Field(None, ge=1, description="Stop after this many optimizer steps.")
    batch_size: int = Field(8, ge=1, description="Examples of one optimizer step (rows or pairs).")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Decay of the learning rate to 0 after warm-up."
    )
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="Linear warm-up, fraction of steps.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, per step and lr.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this L2 norm.")
    optimizer: Literal["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "adamw"] = Field(
        "adamw_8bit", description="bitsandbytes AdamW (8-bit or paged) or torch's (`adamw`)."
    )
    log_every: int = how(1, "A line of metrics every this many optimizer steps.", ge=1)
    eval_every: int | None = how(None, "Evaluate every this many steps; always at the end.", ge=1)
    checkpoint_every: int | None = how(None, "Checkpoint every this many steps.", ge=1)
    checkpoint_minutes: float = how(10.0, "Checkpoint at least this often, minutes.", gt=0)
    checkpoint_keep: int = how(2, "Checkpoints kept on disk.", ge=1)


class Build(Training):
    """A small base model built here instead of downloaded: tokenizer, geometry, pre-training."""

    text: str = Field(description="JSONL file of {text} documents.")
    tokenizer: str = Field(description="tokenizer.json in Mistral's form.")
    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    intermediate_size: int = Field(512, ge=8, description="Width of the MLP.")
    layers: int = Field(2, ge=1, description="Decoder layers.")
    heads: int = Field(4, ge=1, description="Query heads.")
    kv_heads: int = Field(2, ge=1, description="Key/value heads.")
    max_length: int = Field(256, ge=8, description="Tokens of one packed row of text.")
    limit: int | None = Field(None, ge=1, description="Documents of text used.")


class Base(Section):
    """The base model. A plain string is short for `{model: STRING}`."""

    model: str = Field(description="Hub id, local folder, or the name of a model to `build`.")
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    quantization: Literal["nf4", "none"] = Field("nf4", description="Storage of frozen linears.")
    double_quant: bool = Field(
        True, description="Quantise NF4's scales too (saves 0.4 bit/weight)."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Compute dtype; `auto` is bfloat16 on a GPU, float32 on a CPU."
    )
    build: Build | None = Field(None, description="Build the model here instead of loading it.")


class Sft(Training):
    """dSFT: supervised fine-tuning on the teacher's dialogues."""

    start: str | None = Field(
        None,
        alias="from",
        description="A finished SFT adapter (PEFT folder) or SFT model (folder or hub id) taken in "
        "place of training.",
    )
    max_length: int = Field(2048, ge=8, description="Tokens of one packed row.")
    packing: Literal["masked", "wrapped"] = Field(
        "masked",
        description="`masked`: documents packed whole, each attending to itself only; `wrapped`: "
        "one stream cut every max_length tokens, as published.",
    )
    loss_on: Literal["all", "assistant"] = Field(
        "all", description="Tokens that carry loss: every token (as published) or answers only."
    )
    lora: SftLora = Field(SftLora(), description="The SFT adapter.")
    engine: Literal["native", "hf", "unsloth"] | None = Field(
        None, description="What runs the layers in dSFT; default: the recipe's `engine`."
    )


class Dpo(Training):
    """dDPO: direct preference optimisation (arXiv 2305.18290) against the SFT model."""

    adapter: Literal["stacked", "continue"] = Field(
        "stacked",
        description="`stacked`: a new adapter over the frozen SFT adapter; `continue`: train the "
        "SFT adapter on.",
    )
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "sft"] = Field(
        "sigmoid",
        description="Preference loss: DPO, IPO, hinge (SLiC) or robust DPO; `sft` is the paper's "
        "dSFT-2, the chosen answer's NLL per token and no preference.",
    )
    keep: Literal["last", "best"] = Field(
        "last",
        description="The adapter that is kept: the last step's, or the one with the best "
        "held-out accuracy of the evaluations every `eval_every` steps (a tie: lower loss, then "
        "earlier).",
    )
    beta: float = Field(0.01, gt=0, description="Strength of the tie to the reference, 1/nats.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Assumed fraction of flipped preferences (sigmoid, robust)."
    )
    sft_weight: float = Field(
        0.0, ge=0, description="Weight of the chosen answer's per-token NLL added to the loss."
    )
    max_length: int = Field(1024, ge=8, description="Tokens of prompt + longer answer.")
    max_prompt_length: int = Field(
        512, ge=4, description="Tokens of prompt kept (its end) where max_length is exceeded."
    )
    lora: DpoLora = Field(DpoLora(), description="The DPO adapter (`stacked` only).")

    @model_validator(mode="after")
    def _prompt_fits(self) -> Dpo:
        if self.max_prompt_length >= self.max_length:
            raise ValueError("max_prompt_length must be below max_length")
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError("loss: robust needs label_smoothing > 0")
        if self.keep == "best" and self.eval_every is None:
            raise ValueError("keep: best needs eval_every")
        if self.loss in ("ipo", "hinge", "sft") and self.label_smoothing > 0:
            raise ValueError(f"label_smoothing has no meaning under loss: {self.loss}")
        return self


def is_large(model: str) -> bool:
    """Whether a model is none for a CPU: on the hub, or a folder of large weights."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return sum(file.stat().st_size for file in folder.glob("*.safetensors")) > SMALL_BYTES
    return not model.startswith((".", "/", "~"))
