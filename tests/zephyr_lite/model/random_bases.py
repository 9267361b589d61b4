"""Random models of every family under random adapters, and layouts of random ids to try them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.model.adapters import activate, set_dropout
from zephyr_lite.model.frozen_weights import FrozenWeight
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Memory

CPU = torch.device("cpu")
VOCAB = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.12,
    "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
BASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "mistral": lambda: MistralConfig(**SHAPE),
    "llama3": lambda: LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
    "llama, biases": lambda: LlamaConfig(**SHAPE, attention_bias=True, rope_parameters=LINEAR),
    "qwen2": lambda: Qwen2Config(**SHAPE, rms_norm_eps=1e-3),
    "qwen3": lambda: Qwen3Config(**SHAPE, rms_norm_eps=1e-3),
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "sft": {"r": 4, "lora_alpha": 8},
    "dpo": {"r": 3, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
}
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Adapters = Mapping[str, Mapping[str, Any]]


def random_model(
    base: PreTrainedConfig | Path,
    adapters: Adapters,
    active: Sequence[str],
    trains: str | None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A frozen model whose biases and adapters are random too; the same numbers in every dtype.

    Args:
        base: what to draw, or a folder to load.
        adapters: name -> what its LoraConfig is given beside rank 3, scale 5 / 3, all linears.
        active, trains: as of `adapters.activate`.
    """
    torch.manual_seed(0)
    if isinstance(base, Path):
        model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(base).float()
    for name, changes in adapters.items():
        settings = {"r": 3, "lora_alpha": 5, "target_modules": list(LINEARS), **changes}
        lora = LoraConfig(task_type="CAUSAL_LM", **settings)
        if isinstance(model, PeftModel):
            model.add_adapter(name, lora)
        else:
            model = get_peft_model(model, lora, adapter_name=name)
    for name, parameter in model.named_parameters():
        if "norm" in name and not isinstance(base, Path):
            parameter.data.add_(torch.rand(parameter.shape) - 0.5)
        elif "lora_" in name or name.endswith(".bias"):
            noise = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
            # What was trained stays itself: adapters of that size would saturate its attention.
            parameter.data.copy_((0.1 if isinstance(base, Path) else 0.3) * noise)
    model.train().requires_grad_(False)
    if adapters:
        activate(model, active, trains)
        set_dropout(model, trains)
    return model.to(dtype)


def policy_on(
    engine: str, base: PreTrainedConfig | Path, saved: str = "none", **dpo: Any
) -> Policy:
    active, adapters = ("sft", "dpo"), {**ADAPTERS, "dpo": {**ADAPTERS["dpo"], **dpo}}
    model = random_model(base, adapters, active, "dpo")
    memory = Memory.model_validate({"head_rows": 16, "checkpointing": saved})
    policy = make_policy(model, torch.float32, CPU, memory, engine=engine, self_test=False)
    policy.use(active, "dpo")
    return policy


def documents(*lengths: int, seed: int = 0, loss_on: str = "all", text: Any = None) -> Layout:
    """Packed documents of those lengths: random ids, or beginnings of a text."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, VOCAB, n) if text is None else text[:n] for n in lengths]
    return document_layout([(x, np.arange(len(x)) >= len(x) // 2) for x in ids], loss_on)


def pairs(*sizes: tuple[int, int, int], seed: int = 0, text: Any = None) -> Layout:
    """Pairs of (prompt, chosen, rejected) tokens: random ids, or a text and a passage of it."""
    rng, found = np.random.default_rng(seed), []
    for prompt, chosen, rejected in sizes:
        row = rng.integers(3, VOCAB, prompt + chosen) if text is None else text
        other = rng.integers(3, VOCAB, rejected) if text is None else passage(rng, text, rejected)
        found.append(EncodedPair(row[:prompt], row[prompt : prompt + chosen], other))
    return pair_layout(found)


def passage(rng: np.random.Generator, text: np.ndarray, length: int) -> np.ndarray:
    """Some ids that follow each other."""
    start = rng.integers(0, len(text) - length + 1)
    return text[start : start + length]


def with_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay adapters in a border of the frozen weights, as around those that were dequantised."""
    monkeypatch.setattr(
        FrozenWeight,
        "bordered",
        lambda frozen, ranks: frozen.slot.fill(frozen, frozen.dtype, ranks),
    )
