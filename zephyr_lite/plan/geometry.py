"""Geometry: the sizes of a decoder, as its config.json gives them.

Shapes: L layers, D hidden width, F feed-forward width, H query heads, J key and value heads, W a
head's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from zephyr_lite.errors import RecipeError
from zephyr_lite.recipe import ALL_LINEARS, Build

# The linears that read one input, as the engine groups them.
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Mistral, Llama or Qwen.

    tied: the head is the embedding. qkv_bias: q, k and v have biases (Qwen2). head_norms: q and k
    are normed by head (Qwen3). window: attention window, tokens; None for none.
    """

    family: str
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    head_norms: bool = False
    window: int | None = None

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(outputs, inputs) of the seven linears of a layer."""
        d, f = self.hidden, self.feed_forward
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        return {
            "q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q),
            "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f),
        }  # fmt: skip

    @property
    def weights(self) -> int:
        """Weights of all linears of all layers: no embedding, head, norm or bias."""
        return self.layers * sum(n * k for n, k in self.linears.values())

    def group(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a group's stacked matrix."""
        shapes = [self.linears[linear] for linear in GROUPS[name]]
        return sum(n for n, _ in shapes), shapes[0][1]

    def adapter_weights(self, rank: int, targets: tuple[str, ...] = ALL_LINEARS) -> int:
        """Weights of a LoRA of one rank on `targets` of all layers."""
        shapes = [self.linears[name] for name in targets if name in self.linears]
        return self.layers * sum(rank * (n + k) for n, k in shapes)


def geometry_of(config: Mapping[str, Any], where: str) -> Geometry:
    """The geometry that a config.json states.

    Args: where: what errors begin with. Raises: RecipeError when a size is missing.
    """
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    if missing := [n for n in (*names, "vocab_size") if not isinstance(config.get(n), int)]:
        raise RecipeError(f"{where}: config.json has no {missing[0]}")
    layers, hidden, feed_forward, heads = (config[n] for n in names)
    family = str(config.get("model_type", ""))
    uses_window = config.get("use_sliding_window", family == "mistral")
    return Geometry(
        family=family,
        layers=layers,
        hidden=hidden,
        feed_forward=feed_forward,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_width=config.get("head_dim") or hidden // heads,
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
        head_norms=family == "qwen3",
        window=config.get("sliding_window") if uses_window else None,
    )


def geometry_to_build(build: Build, vocabulary: int) -> Geometry:
    """The geometry of a base that the recipe builds."""
    return Geometry(
        family="mistral",
        layers=build.layers,
        hidden=build.hidden_size,
        feed_forward=build.intermediate_size,
        heads=build.heads,
        kv_heads=build.kv_heads,
        head_width=build.hidden_size // build.heads,
        vocabulary=vocabulary,
    )
