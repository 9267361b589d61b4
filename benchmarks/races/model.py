"""Checkpoints of random weights at real geometry, written once and loaded by every side.

fp32 where nothing is quantised; NF4 with double quantisation as bitsandbytes stores it, tensor by
tensor, so that a 7B takes 4 GB of disk and no more memory than one matrix. The numbers are noise:
losses mean nothing, shapes, bytes and kernels are the real ones.

Knows torch, transformers and bitsandbytes, and nothing of zephyr_lite. As a script it writes one:
GEOMETRY FOLDER QUANTIZATION SEED DEVICE.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BitsAndBytesConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# B of a fresh adapter is 0. Over sqrt(r), this makes its part of a layer's output a few tenths of
# the base's, whatever the rank: enough to move an answer's log-prob by nats.
B_SCALE = 0.4


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Mistral; heads of hidden / heads."""

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int


GEOMETRIES = {
    "mistral-7b": Geometry(32, 4096, 14336, 32, 8, 32000),
    "21m": Geometry(6, 256, 896, 8, 2, 32000),
    "toy": Geometry(2, 64, 128, 4, 2, 256),
}


def config_of(geometry: Geometry) -> MistralConfig:
    """Its config; weights scaled by width, so that layers do something."""
    return MistralConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.feed_forward,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        head_dim=geometry.hidden // geometry.heads,
        max_position_embeddings=32768,
        sliding_window=None,
        initializer_range=geometry.hidden**-0.5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def write_checkpoint(
    geometry: Geometry, folder: Path, *, quantization: str, seed: int, device: str = "cpu"
) -> int:
    """Write config.json and safetensors of one checkpoint; the number of its weights.

    Args: quantization: `nf4` (16-bit elsewhere) or `none` (fp32). device: what quantises.
    """
    config = config_of(geometry)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.bfloat16 if quantization == "nf4" else torch.float32
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in MistralForCausalLM(config).named_parameters()}
    config.dtype = dtype
    if quantization == "nf4":
        config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    tokenizer_of(geometry.vocabulary).save_pretrained(folder)
    generator = torch.Generator(device).manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        weight = _draw(name, shape, config.initializer_range, generator, dtype)
        is_packed = quantization == "nf4" and name.split(".")[-2] in LINEARS
        tensors |= dict(_pack(name, weight)) if is_packed else {name: weight.cpu()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(shape.numel() for shape in shapes.values())


def write_adapter(geometry: Geometry, folder: Path, *, rank: int, alpha: int, seed: int) -> None:
    """Write the weights of a LoRA on all linears, A and B random, under PEFT's names; fp32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    with torch.device("meta"):
        model = MistralForCausalLM(config_of(geometry))
    for name, module in model.named_modules():
        if name.split(".")[-1] in LINEARS and isinstance(module, torch.nn.Linear):
            a = torch.rand(rank, module.in_features, generator=generator) * 2 - 1
            b = torch.randn(module.out_features, rank, generator=generator)
            key = f"base_model.model.{name}.lora_"
            tensors[f"{key}A.weight"] = a * module.in_features**-0.5
            tensors[f"{key}B.weight"] = b * (B_SCALE * rank**-0.5 * rank / alpha)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Trainers ask for one; ids are ready, so only its end and padding tokens are used."""
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<{i}>": i for i in range(3, vocabulary)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(pieces, unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
    )


def count_weights(folder: Path) -> int:
    """Weights of a checkpoint by its config, quantised or not."""
    config: Any = MistralConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = MistralForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def put_adapter(model: Any, folder: Path, name: str = "default") -> None:
    """Give the adapter of a PeftModel the race's numbers, in whatever dtype it keeps them.

    Raises: ValueError when they do not fit.
    """
    from peft import set_peft_model_state_dict

    stored = load_file(folder / "adapter_model.safetensors")
    problems: Any = set_peft_model_state_dict(model, stored, adapter_name=name)
    missing = [key for key in problems.missing_keys if ".lora_" in key and f".{name}." in key]
    if problems.unexpected_keys or missing:
        raise ValueError(f"the adapter does not fit: {problems.unexpected_keys or missing}")


def set_dropout(model: torch.nn.Module, rate: float) -> None:
    """Set every dropout of the adapter: the modules read the number in each forward."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" in name:
            module.p = rate


def _draw(
    name: str, shape: torch.Size, std: float, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    device = generator.device
    if "norm" in name:
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)


def _pack(name: str, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A linear's weight as bitsandbytes stores it: codes and the parts of its quantisation."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    with torch.device("meta"):
        linear = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    packed: Any = Params4bit  # whose signature type checkers take for that of Parameter
    linear.weight = packed(
        weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    ).to(weight.device)  # which is where it quantises
    prefix = name.removesuffix("weight")
    for key, tensor in linear.state_dict().items():
        yield prefix + key, tensor.cpu().contiguous()


if __name__ == "__main__":
    name, folder_name, kind, number, where = sys.argv[1:]
    write_checkpoint(
        GEOMETRIES[name], Path(folder_name), quantization=kind, seed=int(number), device=where
    )
