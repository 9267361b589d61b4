"""What GGUF calls a model: its architecture's name, its tensors' names, the facts in its header.

    config.json                      GGUF     q_proj, k_proj    biases
    MistralForCausalLM               llama    rows permuted     none
    LlamaForCausalLM                 llama    rows permuted     attention_bias, mlp_bias
    Qwen2ForCausalLM                 qwen2    as they are       q, k, v
    Qwen3ForCausalLM                 qwen3    as they are       none; q_norm, k_norm

`llama` rotates neighbouring rows (2i, 2i+1) of a head where transformers rotates (i, i + d/2), so
the rows of q_proj and k_proj, and their biases, are put in that order. What a file of these
architectures cannot say is refused by the field of config.json that says it. Truth: llama.cpp's
log-probabilities against transformers' in tests/zephyr_lite/export/gguf/test_architecture_facts.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import gguf
import torch

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.gguf.rope import Rope, read_rope

FAMILIES = {
    "MistralForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
    "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3,
}
REQUIRED = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "rms_norm_eps", "vocab_size",
}  # fmt: skip
# Where transformers fills a field in by itself, and not from the others, it must be written out.
ALSO_REQUIRED = {
    "MistralForCausalLM": {"num_key_value_heads"},
    "Qwen2ForCausalLM": {"num_key_value_heads"},
    "Qwen3ForCausalLM": {"num_key_value_heads", "head_dim"},
}


@dataclass(frozen=True)
class Architecture:
    """The facts of one model. Lengths are tokens; `notes` are for the person who exports."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    context_length: int
    notes: tuple[str, ...]
    hidden: int
    feed_forward: int
    vocab_size: int
    norm_eps: float
    rope: Rope

    def rename(self, hf_name: str) -> str:
        """The GGUF name of a tensor of transformers'. Raises: DataError when it has no place."""
        name = self._names.get_name(hf_name, (".weight", ".bias"))
        if name is None:
            raise DataError(f"tensor {hf_name} has no place in a GGUF of architecture {self.name}")
        return name

    def stored(self, hf_name: str, weight: torch.Tensor) -> torch.Tensor:
        """A tensor [rows, ...] with its rows in the order llama.cpp wants; any dtype."""
        if self.name != "llama":
            return weight
        if ".q_proj." in hf_name:
            return permute_rotary(weight, self.heads)
        return permute_rotary(weight, self.kv_heads) if ".k_proj." in hf_name else weight

    def extra(self) -> dict[str, torch.Tensor]:
        """Tensors the file has and the model has not, fp32, by GGUF name."""
        factors = self.rope.factors
        return {} if factors is None else {"rope_freqs.weight": factors}

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """Every key that begins with the architecture's name."""
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context_length)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.feed_forward)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_layer_norm_rms_eps(self.norm_eps)
        writer.add_vocab_size(self.vocab_size)
        self.rope.add_metadata(writer)

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
        return gguf.get_tensor_name_map(kinds[self.name], self.layers)


def read_architecture(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    context_length: int | None = None,
) -> Architecture:
    """The architecture of a model, from its config.json and the shapes of its tensors.

    Args:
        shapes: of all tensors, by transformers' names; no `lm_head.weight` when it is tied.
        context_length: what the file shall say, tokens; default: the model's positions, or its
            sliding window, which these architectures of GGUF do not have.
    Raises: RecipeError naming the field GGUF cannot express, or a context beyond the positions;
        DataError when config.json lacks a field, or the tensors are not what it describes.
    """
    check_architecture(config)
    head_dim = _head_dim(config)
    positions = config["max_position_embeddings"]
    rope = read_rope(config, head_dim)
    context, notes = _context(config, max(positions, rope.positions), context_length)
    _check_tensors(_expected(config), shapes)
    return Architecture(
        name=gguf.MODEL_ARCH_NAMES[_family(config)],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=_kv_heads(config),
        head_dim=head_dim,
        context_length=context,
        notes=notes,
        hidden=config["hidden_size"],
        feed_forward=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        rope=rope,
    )


def check_architecture(config: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp would compute otherwise, before a tensor is looked at.

    Raises: RecipeError naming the field; DataError for a config.json that lacks one.
    """
    family = _family(config)
    named = config["architectures"][0]
    if missing := sorted((REQUIRED | ALSO_REQUIRED.get(named, set())) - config.keys()):
        raise DataError(f"config.json lacks {', '.join(missing)}")
    if config.get("hidden_act", "silu") != "silu":
        raise RecipeError(f"hidden_act {config['hidden_act']!r} cannot be exported to GGUF")
    head_dim, width = _head_dim(config), config["hidden_size"]
    if head_dim % 2:
        raise RecipeError(f"head_dim {head_dim} is odd and cannot be exported to GGUF")
    if family == gguf.MODEL_ARCH.QWEN2 and head_dim * config["num_attention_heads"] != width:
        raise RecipeError(
            f"head_dim {head_dim} x {config['num_attention_heads']} heads is not hidden_size "
            f"{width}; a GGUF of architecture qwen2 cannot say so"
        )
    if family == gguf.MODEL_ARCH.QWEN3 and config.get("attention_bias"):
        raise RecipeError("attention_bias of a Qwen3 model cannot be exported to GGUF")
    rope = read_rope(config, head_dim)
    if rope.factors is not None and family != gguf.MODEL_ARCH.LLAMA:
        raise RecipeError(f"rope_type 'llama3' of a {named} cannot be exported to GGUF")


def permute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads x (half, d/2)] -> [heads x (d/2, half)]: rotate-half to neighbouring pairs."""
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def _family(config: Mapping[str, Any]) -> gguf.MODEL_ARCH:
    named = (config.get("architectures") or ["none"])[0]
    if named not in FAMILIES:
        raise RecipeError(
            f"architecture {named} cannot be exported to GGUF",
            hint=f"exported are {', '.join(FAMILIES)}; set export.merged=true for safetensors",
        )
    return FAMILIES[named]


def _head_dim(config: Mapping[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _kv_heads(config: Mapping[str, Any]) -> int:
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens a layer attends to at most, where there is one that does not attend to all."""
    if config["architectures"][0] == "MistralForCausalLM":
        return config.get("sliding_window", 4096)  # 4096 is what transformers takes for no entry
    if not config.get("use_sliding_window", False):  # a field of Qwen's; Llama has no window
        return None
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or ["sliding_attention"] * (
        layers - config.get("max_window_layers", 28)
    )
    return config.get("sliding_window", 4096) if "sliding_attention" in kinds else None


def _context(
    config: Mapping[str, Any], positions: int, wanted: int | None
) -> tuple[int, tuple[str, ...]]:
    if wanted is not None and wanted > positions:
        raise RecipeError(
            f"export.context_length {wanted} is beyond the model's {positions} positions"
        )
    window = _window(config)
    trained = config["max_position_embeddings"]
    if window is None or window >= (wanted or trained):
        return wanted or trained, ()
    if wanted is None:
        return window, (
            f"context_length is {window}, the model's sliding window, of {trained} positions: "
            "GGUF has no window for it; export.context_length asks for more",
        )
    return wanted, (
        f"GGUF has no sliding window for this model: past {window} tokens the file attends to all",
    )


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor config.json describes, in the order of the forward pass."""
    width, vocabulary = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    layer = _expected_layer(config)
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (width,)
    if not config.get("tie_word_embeddings", False):
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def _expected_layer(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    named, width, head_dim = config["architectures"][0], config["hidden_size"], _head_dim(config)
    inner, keys = config["intermediate_size"], _kv_heads(config) * head_dim
    queries = config["num_attention_heads"] * head_dim
    is_llama = named == "LlamaForCausalLM"
    bias = is_llama and bool(config.get("attention_bias"))
    mlp_bias = is_llama and bool(config.get("mlp_bias"))
    linears = {
        "self_attn.q_proj": (queries, width, bias or named == "Qwen2ForCausalLM"),
        "self_attn.k_proj": (keys, width, bias or named == "Qwen2ForCausalLM"),
        "self_attn.v_proj": (keys, width, bias or named == "Qwen2ForCausalLM"),
        "self_attn.o_proj": (width, queries, bias),
        "mlp.gate_proj": (inner, width, mlp_bias),
        "mlp.up_proj": (inner, width, mlp_bias),
        "mlp.down_proj": (width, inner, mlp_bias),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    if named == "Qwen3ForCausalLM":
        shapes |= {f"self_attn.{part}_norm.weight": (head_dim,) for part in ("q", "k")}
    for name, (rows, columns, has_bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        shapes |= {f"{name}.bias": (rows,)} if has_bias else {}
    return shapes


def _check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    if foreign := [name for name in found if name not in expected]:
        raise DataError(f"tensor {foreign[0]} has no place in the architecture of config.json")
    for name, shape in expected.items():
        if name not in found:
            raise DataError(f"there is no tensor {name}, which config.json describes")
        if tuple(found[name]) != shape:
            raise DataError(
                f"tensor {name} has shape {tuple(found[name])}, config.json says {shape}"
            )
