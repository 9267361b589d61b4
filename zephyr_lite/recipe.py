"""The recipe: one YAML file that is the whole pipeline, typed, validated and overridable.

This file says what a recipe may hold; `recipe_file.load` reads one, applies `--set a.b=c` and names
file, line and nearest key where it is wrong. Every field's description carries its unit;
`json_schema()` hands them to editors.

A field marked `affects_result=False` changes how a stage runs and never what it means (how often it
logs, how many tokens fit a micro-batch), so a stage's fingerprint leaves it out: see `run.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

# Sections that a plain string is short for, and the key that it stands for.
SHORT_FORMS = {"base": "model", "train": "path", "eval": "path"}
ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    """A frozen part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # `sft.from` is a keyword of Python, not of recipes
    )


def _how(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes how a stage runs, never what it computes."""
    return Field(
        default, description=description, json_schema_extra={"affects_result": False}, **limits
    )


Quant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q4_0"
]


class Source(Section):
    """Where rows come from. A plain string is short for `{path: STRING}`."""

    path: str = Field(
        description="JSON, JSONL or parquet file, a folder of them, or a hub dataset id."
    )
    split: str | None = Field(
        default=None, description="Split name of a hub dataset; unused for files."
    )
    file: str | None = Field(
        default=None, description="One file of a hub dataset's repository, read instead of a split."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub dataset; unused for files."
    )
    limit: int | None = Field(default=None, ge=1, description="Read at most this many rows.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Share of its rows in the mixture: 0.5 takes a seeded half, 2 every row twice.",
    )


def _as_source(value: Any) -> Any:
    return {SHORT_FORMS["train"]: value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


def _as_base(value: Any) -> Any:
    return {SHORT_FORMS["base"]: value} if isinstance(value, str) else value


# The input types are what the JSON schema shows: editors accept the short forms too.
_Source = Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=str | Source)]
Sources = Annotated[
    tuple[_Source, ...],
    BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source]),
]


class Split(Section):
    """Rows to train on and rows held out."""

    train: Sources = Field(description="Sources of training rows, read in this order.")
    eval: Sources = Field((), description="Sources of held-out rows.")
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of training rows held out, by hash of prompt, when `eval` is empty.",
    )


class Dialogues(Split):
    """Dialogues for dSFT, and what is done to them before they are tokenised."""

    truecase: bool = Field(
        False, description="Repair user turns typed without capitals (ultrachat_200k's truecasing)."
    )
    drop_refusals: bool = Field(
        False,
        description="Leave out dialogues in which the assistant refuses as a machine (`I do not "
        "have personal opinions`), as ultrachat_200k does.",
    )


class Feedback(Split):
    """AI feedback and how it becomes preference pairs."""

    rule: Literal["mean", "overall", "worst"] = Field(
        "mean",
        description="chosen = highest mean aspect score (`mean`, the paper) or overall score "
        "(`overall`, the published dataset), rejected = a random other; `worst` = best and worst.",
    )
    ties: Literal["drop", "keep"] = Field(
        "drop",
        description="A pair whose two scores are equal is dropped or kept; both are counted.",
    )
    exclude_sources: tuple[str, ...] = Field(
        ("truthful_qa",),
        description="Rows whose own `source` is one of these are left out and counted: "
        "UltraFeedback draws on TruthfulQA, which is also a benchmark.",
    )


class Data(Section):
    """Everything read from outside."""

    dialogues: Dialogues | None = Field(default=None, description="Dialogues for dSFT.")
    feedback: Feedback | None = Field(default=None, description="AI feedback for dDPO.")
    decontaminate: Sources = Field(
        default=(),
        description="Benchmarks: a training row that shares more than half of the normalised "
        "8-grams of one of their prompts is left out and counted.",
    )
    on_fault: Literal["stop", "drop"] = Field(
        default="stop",
        description="A faulty row (empty answer, chosen == rejected, ...) stops the run with file "
        "and line, or is dropped and counted in the report.",
    )


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
    log_every: int = _how(1, "A line of metrics every this many optimizer steps.", ge=1)
    eval_every: int | None = _how(None, "Evaluate every this many steps; always at the end.", ge=1)
    checkpoint_every: int | None = _how(None, "Checkpoint every this many steps.", ge=1)
    checkpoint_minutes: float = _how(10.0, "Checkpoint at least this often, minutes.", gt=0)
    checkpoint_keep: int = _how(2, "Checkpoints kept on disk.", ge=1)


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


class Memory(Section):
    """How the work is cut to fit; never what is computed."""

    tokens_per_micro_batch: int = _how(2048, "Tokens of one forward and backward.", ge=8)
    checkpointing: Literal["none", "full", "offload"] = _how(
        "none",
        "`full` computes every layer again in the backward: less memory, nearly one more forward. "
        "`offload` (engine native) also keeps the layers' inputs in host memory.",
    )
    head_rows: int = _how(256, "Rows of logits alive at once in the head.", ge=1)
    optimizer: Literal["device", "host"] = _how(
        "device",
        "Where fp32 masters and optimizer states live; `host`: pinned host memory, one transfer "
        "each way a step.",
    )


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


def result_fields(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain value of every field that affects results."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result") is False:
            continue
        value, key = getattr(section, name), field.alias or name
        if isinstance(value, BaseModel):
            found |= result_fields(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = section.model_dump(mode="json", include={name})[key]
    return found
