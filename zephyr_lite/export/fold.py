"""The trained model as one list of fp32 tensors: dequantised base plus the adapter, rounded never.

    W_eff = dequant(NF4(W)) + s B A

This is what the forward pass of training computed. The sum is taken once, in fp32, and rounded once
by whoever writes it: an adapter folded into bf16 or NF4 storage rounds most of itself away, because
its entries are smaller than half a step of that grid.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.errors import DataError
from zephyr_lite.export.adapter import Adapter
from zephyr_lite.export.base_weights import BaseWeights

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Order inside a layer: the order in which the forward pass meets them.
_WITHIN = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class FoldedModel:
    """A base with one adapter folded in; tensors are made one at a time, on demand."""

    def __init__(self, base: Path, adapter: Path | None) -> None:
        """Open both and match them; no weight is read yet.

        Args:
            base: folder with config.json and safetensors, plain or bitsandbytes 4-bit.
            adapter: PEFT LoRA folder relative to that base, or None for the base itself.
        Raises: RecipeError, DataError or StorageError as BaseWeights and Adapter do.
        """
        self._base = BaseWeights(base)
        shapes = {name: self._base.shape(name) for name in self._base.names()}
        if EMBEDDING not in shapes:
            raise DataError(f"has no tensor {EMBEDDING}", file=base)
        tied = self._is_tied(base)
        if tied:
            shapes[HEAD] = shapes[EMBEDDING]
        self._adapter = None if adapter is None else Adapter(adapter, shapes)
        # An adapter on either end of a tied pair makes them two matrices.
        if tied and not any(self._touches(name) for name in (EMBEDDING, HEAD)):
            del shapes[HEAD]
        self._shapes = {name: shapes[name] for name in sorted(shapes, key=_position)}
        self.config: dict[str, Any] = {
            **{k: v for k, v in self._base.config.items() if k != "quantization_config"},
            "tie_word_embeddings": HEAD not in shapes,
        }

    def names(self) -> list[str]:
        """Embedding, layers from first to last, final norm, head (absent when tied)."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The trained weight, fp32, CPU, contiguous; the caller owns it.

        Raises: DataError naming the tensor when it is not finite.
        """
        source = EMBEDDING if name == HEAD and HEAD not in self._base.names() else name
        weight = self._base.tensor(source)
        if self._adapter is not None:
            weight = self._adapter.apply(name, weight)
        if not torch.isfinite(weight).all():
            raise DataError(
                f"tensor {name} holds NaN or infinite values",
                file=self._base.folder,
                hint="training diverged or the file is damaged; export an earlier checkpoint",
            )
        return weight.contiguous()

    def _touches(self, name: str) -> bool:
        return self._adapter is not None and self._adapter.touches(name)

    def _is_tied(self, folder: Path) -> bool:
        names = self._base.names()
        if not self._base.config.get("tie_word_embeddings", False):
            if HEAD not in names:
                raise DataError(f"has no tensor {HEAD} and does not tie it", file=folder)
            return False
        if HEAD in names:
            raise DataError(f"ties {HEAD} to the embedding and holds it too", file=folder)
        return True


def _position(name: str) -> tuple[int, int, int, str]:
    if layer := _LAYER.match(name):
        within = next((i for i, part in enumerate(_WITHIN) if part in layer[2]), len(_WITHIN))
        return 1, int(layer[1]), within, name
    section = {EMBEDDING: 0, HEAD: 3}.get(name, 2)
    return section, 0, 0, name
