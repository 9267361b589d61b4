"""The trained model as one list of fp32 tensors: dequantised base plus adapters, rounded never.

    W_eff = dequant(NF4(W)) + sum_k s_k B_k A_k = W + [s_1 B_1 | s_2 B_2 | ...] [A_1 ; A_2 ; ...]

This is what the forward pass of training computed. The sum is taken once, in fp32, as one product
that is added to W in place, and is rounded once by whoever writes it: an adapter folded into bf16
or NF4 storage rounds most of itself away, because its entries are smaller than half a step of that
grid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.errors import DataError
from zephyr_lite.export.weights.adapter import EMBEDDING, HEAD, Adapter
from zephyr_lite.export.weights.base_weights import BaseWeights, is_finite, widened

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Order inside a layer: the order in which the forward pass meets them.
_WITHIN = (
    "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj",
    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip


class FoldedModel:
    """A base with adapters folded in; tensors are made one at a time, on demand.

    base: the opened base. adapters: the opened adapters, in the order given.
    config: config.json as the exported model has it.
    """

    def __init__(self, base: Path, adapters: Path | Sequence[Path] | None) -> None:
        """Open all and match them; no weight of the base is read yet.

        Args:
            base: folder with config.json and safetensors, plain or bitsandbytes 4-bit.
            adapters: PEFT LoRA folders, each relative to that base with those before it; one, or
                none for the base itself.
        Raises: RecipeError, DataError as BaseWeights and Adapter do; DataError for adapters that
            replace what another one changes, and for a head that does not fit its embedding.
        """
        self.base = BaseWeights(base)
        shapes = {name: self.base.shape(name) for name in self.base.names()}
        if EMBEDDING not in shapes:
            raise DataError(f"has no tensor {EMBEDDING}", file=base)
        is_tied = self._is_tied(base)
        if is_tied:
            shapes[HEAD] = shapes[EMBEDDING]
        folders = [adapters] if isinstance(adapters, Path) else adapters or []
        self.adapters = self._open(folders, shapes)
        if is_tied and self._stays_tied():
            del shapes[HEAD]
        elif shapes[HEAD] != shapes[EMBEDDING]:
            raise DataError(
                f"{HEAD} has {shapes[HEAD][0]} rows, {EMBEDDING} {shapes[EMBEDDING][0]}",
                file=(*folders, base)[0],
                hint="save both with the adapter when its vocabulary was resized",
            )
        self._shapes = {name: shapes[name] for name in sorted(shapes, key=_position)}
        self.config = self._read_config()

    def names(self) -> list[str]:
        """Embedding, layers from first to last, final norm, head (absent when tied)."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The trained weight, fp32, CPU, contiguous; the caller owns it.

        Raises: DataError naming the tensor when it is not finite.
        Memory: the result; beside it only factors, scales and a chunk.
        """
        source = EMBEDDING if name == HEAD and HEAD not in self.base.names() else name
        replacing = next((x for x in self.adapters if name in x.replaced), None)
        if replacing is None:
            weight = self.base.tensor(source)
        else:
            weight = widened(replacing.replacement(name))
        factors = [x.factors(name) for x in self.adapters if name in x.low_rank]
        if factors:
            a_RI = torch.cat([a for a, _, _ in factors])
            b_OR = torch.cat([b * scale for _, b, scale in factors], dim=1)
            weight.addmm_(b_OR, a_RI)
        if not is_finite(weight):
            raise DataError(
                f"tensor {name} holds NaN or infinite values",
                file=self.base.file(source) if replacing is None else replacing.file,
                hint="training diverged or the file is damaged; export an earlier checkpoint",
            )
        return weight

    def _open(
        self, folders: Sequence[Path], shapes: dict[str, tuple[int, ...]]
    ) -> tuple[Adapter, ...]:
        """Open adapters one on top of the other; `shapes` becomes that of their result."""
        opened: list[Adapter] = []
        for folder in folders:
            adapter = Adapter(folder, shapes)
            for name, earlier in ((n, e) for n in adapter.replaced for e in opened):
                if earlier.touches(name):
                    raise DataError(
                        f"replaces {name}, which the adapter {earlier.folder} changes too",
                        file=adapter.file,
                        hint="export one of them, or merge the first into the base of the second",
                    )
            shapes |= adapter.resized
            opened.append(adapter)
        return tuple(opened)

    def _stays_tied(self) -> bool:
        """An adapter on either end of a tied pair makes them two matrices.

        Trainers also save a tied pair because it was resized; then both are one.
        """
        if any(x.trains(name) for x in self.adapters for name in (EMBEDDING, HEAD)):
            return False
        for adapter in self.adapters:
            ends = [adapter.replacement(n) for n in (EMBEDDING, HEAD) if n in adapter.replaced]
            if HEAD in adapter.replaced and not (len(ends) == 2 and torch.equal(*ends)):
                raise DataError(
                    f"holds an {HEAD} other than its embedding, and the base ties them",
                    file=adapter.file,
                )
        return True

    def _read_config(self) -> dict[str, Any]:
        config = {k: v for k, v in self.base.config.items() if k != "quantization_config"}
        rows = self._shapes[EMBEDDING][0]
        if self.base.shape(EMBEDDING)[0] != rows:
            config["vocab_size"] = rows
        return config | {"tie_word_embeddings": HEAD not in self._shapes}

    def _is_tied(self, folder: Path) -> bool:
        names = self.base.names()
        if not self.base.config.get("tie_word_embeddings", False):
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
