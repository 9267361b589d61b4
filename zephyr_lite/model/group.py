"""A group: linears of a layer that read the same input, as one frozen matrix and their adapters.

The frozen matrices lie below each other, so that one product serves all. Adapters are read from
PEFT's modules as they stand, in every forward anew.

Shapes: O output width of all linears of a group, I input width, R rank of all adapters, U rows that
are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from zephyr_kernels.lora import Dropout, Span

from zephyr_lite.errors import MachineError
from zephyr_lite.model.frozen_weights import FrozenWeight, Gemm, Slot
from zephyr_lite.model.stack import Adapted, Lora, Outline, Piece, Stack

# Zero columns of B that cost a card as much as the pass over Y that they save: a product reaches
# 330 floating-point operations for a byte copied, on an H200 as on a 4090, and 2 b bytes of Y are
# read and written where a column takes 2 operations. Less, for what padding and tiles lose.
MOST_WASTED = 256


@dataclass(frozen=True)
class Part:
    """Outputs [start, stop) of a group, for some rows of its input (`rows_U`) or all (None)."""

    start: int
    stop: int
    rows_U: torch.Tensor | None = None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of x that this part is about."""
        return x if self.rows_U is None else x[self.rows_U]

    def inside(self, stack: Stack) -> Iterator[tuple[Lora, slice]]:
        """The part's adapters, and where their outputs stand among the part's own."""
        for lora in stack.loras:
            if self.start <= lora.outputs.start and lora.outputs.stop <= self.stop:
                at = slice(lora.outputs.start - self.start, lora.outputs.stop - self.start)
                yield lora, at


class Group:
    """Projections with one input.

    Args:
        modules: PEFT's LoRA layers, or plain linears.
        slot: see `FrozenWeight`.
    """

    def __init__(
        self, modules: Sequence[Any], dtype: torch.dtype, slot: Slot | None = None
    ) -> None:
        self.modules, self.dtype = tuple(modules), dtype
        self.bases = _bases(modules)
        self.widths = tuple(int(b.out_features) for b in self.bases)
        self.frozen = FrozenWeight(self.bases, dtype, slot)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The group as one part."""
        return (Part(0, sum(self.widths)),)

    def follow(self, modules: Sequence[Any]) -> None:
        """Read adapters from the modules that stand there now: a first adapter wraps its linear.

        Raises: MachineError when a linear itself was replaced, or an adapter merged into one.
        """
        if any(getattr(m, "merged", False) for m in modules):
            raise MachineError(
                "engine native: an adapter was merged into the frozen weights",
                hint="unmerge it: the engine adds it by itself",
            )
        if any(a is not b for a, b in zip(_bases(modules), self.bases, strict=True)):
            raise MachineError(
                "engine native: a linear of the model was replaced after the engine had read it",
                hint="make another engine",
            )
        self.modules = tuple(modules)

    def report(self, gemm: Gemm = "exact") -> str:
        """What the group multiplies with, for a person: the frozen matrix, ranks by adapter, and
        which of the two ways around a dequantised matrix they go."""
        ranks: dict[str, list[int]] = {}
        for module in self.modules:
            for name, half in getattr(module, "lora_A", {}).items():
                ranks.setdefault(name, []).append(half.weight.shape[0])
        found = [f"{name} r {'+'.join(map(str, r))}" for name, r in ranks.items()]
        if found and self.frozen.packed:
            pays = self._border_pays(self.outline(None, gemm))
            found.append("in its border" if pays else "added to its products")
        return ", ".join([self.frozen.kind, *found])

    def stack(self, outline: Outline) -> Stack:
        """The adapters' numbers, in W's border where one product with it pays."""
        pays = self._border_pays(outline)
        return outline.stack(self.frozen.bordered(outline.ranks) if pays else None)

    def _border_pays(self, outline: Outline) -> bool:
        is_possible = outline.ranks > 0 and outline.gemm == "exact"
        return is_possible and outline.wasted(sum(self.widths)) <= MOST_WASTED

    def outline(self, seed: int | None, gemm: Gemm = "exact") -> Outline:
        """The adapters as they stand now; `seed` draws the dropout masks (None: no dropout)."""
        found: list[Adapted] = []
        spans: list[Span] = []
        rank = column = 0
        for module, width in zip(self.modules, self.widths, strict=True):
            first, pieces = rank, []
            for name in getattr(module, "lora_A", ()):
                a_RI, b_OR = module.lora_A[name].weight, module.lora_B[name].weight
                is_active = name in module.active_adapters and not module.disable_adapters
                scale = float(module.scaling[name]) if is_active else 0.0
                stop = rank + a_RI.shape[0]
                if rate := _dropout_rate(module.lora_dropout[name], seed):
                    spans.append((rank, stop, Dropout(rate, (seed or 0) + len(spans))))
                trains = is_active and a_RI.requires_grad
                columns = slice(rank - first, stop - first)
                pieces.append(Piece(a_RI, b_OR, scale, columns, trains))
                rank = stop
            if pieces:
                outputs = slice(column, column + width)
                found.append(Adapted(outputs, slice(first, rank), tuple(pieces)))
            column += width
        return Outline(tuple(found), tuple(spans), gemm, self.dtype)


def _bases(modules: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(getattr(m, "base_layer", m) for m in modules)


def _dropout_rate(module: Any, seed: int | None) -> float:
    is_on = seed is not None and module.training
    return float(getattr(module, "p", 0.0)) if is_on else 0.0
