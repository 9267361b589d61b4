"""A Mistral of random NF4 weights, quantised tensor by tensor where it will run.

No checkpoint, no host memory beyond a tensor: 7.2 billion weights in seconds on a GPU. The numbers
are noise, so losses mean nothing; shapes, bytes and kernels are those of the real model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from transformers import MistralConfig, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

from gpu.bench import Bench
from zephyr_lite.plan.geometry import Geometry

STD = 0.02
MISTRAL_7B = Geometry("mistral", 32, 4096, 14336, 32, 8, 128, 32000)
TOY = Geometry("mistral", 2, 64, 128, 4, 2, 16, 128)


def compute_dtype(bench: Bench) -> torch.dtype:
    """What the product computes in on this device."""
    return torch.bfloat16 if bench.on_gpu else torch.float32


def build_model(bench: Bench, geometry: Geometry) -> Any:
    """A frozen causal LM, in train mode as the product's. Raises: RuntimeError if incomplete."""
    config = MistralConfig(
        vocab_size=geometry.vocabulary,
        hidden_size=geometry.hidden,
        intermediate_size=geometry.feed_forward,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = MistralForCausalLM(config)
    dtype = compute_dtype(bench)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            _replace_linears(block, lambda linear: nf4_linear(bench, linear))
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = _frozen(torch.ones(geometry.hidden, device=bench.device, dtype=dtype))
    model.model.norm.weight = _frozen(torch.ones(geometry.hidden, device=bench.device, dtype=dtype))
    shape = (geometry.vocabulary, geometry.hidden)
    model.model.embed_tokens.weight = _frozen(bench.randn(*shape, dtype=dtype))
    model.lm_head.weight = _frozen(bench.randn(*shape, std=STD, dtype=dtype))
    with bench.device:
        model.model.rotary_emb = MistralRotaryEmbedding(config)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if left := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise RuntimeError(f"never filled: {left}")
    model.is_loaded_in_4bit = True  # what PEFT asks before it wraps a Linear4bit
    return model.requires_grad_(False).train()


def build_linears(
    bench: Bench, sizes: dict[str, tuple[int, int]], *, quantised: bool
) -> torch.nn.Module:
    """Linears of one input, in a module of their own: NF4, or plain in the compute dtype."""
    module = torch.nn.Module()
    for name, (outputs, inputs) in sizes.items():
        with torch.device("meta"):
            linear = torch.nn.Linear(inputs, outputs, bias=False)
        if quantised:
            linear = nf4_linear(bench, linear)
        else:
            weight = bench.randn(outputs, inputs, std=STD, dtype=compute_dtype(bench))
            linear.weight = _frozen(weight)
        module.add_module(name, linear)
    module.is_loaded_in_4bit = quantised  # type: ignore[assignment]  - as in `build_model`
    return module.requires_grad_(False).train()


def nf4_linear(bench: Bench, like: torch.nn.Linear) -> Linear4bit:
    """Random weights, double-quantised NF4, in the shape of a linear without bias."""
    dtype = compute_dtype(bench)
    with torch.device("meta"):
        linear = Linear4bit(
            like.in_features, like.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
        )
    weight = bench.randn(like.out_features, like.in_features, std=STD, dtype=dtype)
    packed: Any = Params4bit  # whose signature type checkers take for that of Parameter
    linear.weight = packed(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=linear
    ).to(bench.device)  # which is where it quantises
    linear.compute_type_is_set = True
    return linear


def _replace_linears(
    block: torch.nn.Module, make: Callable[[torch.nn.Linear], torch.nn.Module]
) -> None:
    for name, child in list(block.named_children()):
        if isinstance(child, torch.nn.Linear):
            block.add_module(name, make(child))


def _frozen(tensor: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor, requires_grad=False)
