"""A stack: all adapters of a group of linears as columns of one product.

The A of all adapters of all projections lie below each other, so that the input is read once for
all ranks; the B of a projection's lie side by side, the scale alpha / r folded in. An adapter that
is attached and not active has scale 0, so zeros for its B.

Where the group's dense weights have a border, the numbers are laid into it, B block by block, so
that one product adds the adapters too (`zephyr_kernels.lora.linear`).

Shapes: I input width, O output width of a projection or of all, R rank of all adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from zephyr_kernels.lora import Span

from zephyr_lite.model.frozen_weights import Bordered, Gemm


@dataclass(frozen=True)
class Piece:
    """One adapter of one projection: its masters (fp32), its place among the projection's ranks."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    columns: slice
    trains: bool


@dataclass(frozen=True)
class Adapted:
    """All adapters of one projection.

    outputs: its features among the group's O. ranks: its rows of the stacked A.
    """

    outputs: slice
    ranks: slice
    pieces: tuple[Piece, ...]

    @property
    def trained(self) -> slice | None:
        """Its columns from the first that trains to the last; None where none does."""
        columns = [piece.columns for piece in self.pieces if piece.trains]
        return slice(columns[0].start, columns[-1].stop) if columns else None


@dataclass(frozen=True)
class Lora(Adapted):
    """The same with its numbers. b_OR: the B's side by side, the scales folded in."""

    b_OR: torch.Tensor


@dataclass(frozen=True)
class Outline:
    """Which adapters a group has and where they stand, without a copy of their numbers.

    spans: which ranks see dropout. gemm: of the products with W, in a forward and its backward.
    dtype: what they compute in.
    """

    projections: tuple[Adapted, ...]
    spans: tuple[Span, ...]
    gemm: Gemm
    dtype: torch.dtype

    @property
    def trainable(self) -> tuple[torch.nn.Parameter, ...]:
        """A and B of each piece that trains, in the order of `backward`'s gradients."""
        pieces = (piece for found in self.projections for piece in found.pieces if piece.trains)
        return tuple(half for piece in pieces for half in (piece.a, piece.b))

    @property
    def ranks(self) -> int:
        """Of all adapters."""
        return self.projections[-1].ranks.stop if self.projections else 0

    def wasted(self, outputs: int) -> float:
        """Columns of all B side by side that are zeros, as the mean over so many outputs."""
        used = sum(_length(p.outputs) * _length(p.ranks) for p in self.projections)
        return self.ranks - used / outputs

    def stack(self, border: Bordered | None = None) -> Stack:
        """The numbers as they are now, in the border if there is one.

        A forward makes them, and its backward once more: held between the two they would take 2
        bytes a weight of every layer's adapters at once, 0.75 GB for ranks 16 + 128 on a 7B; made
        again they cost a read of the masters.
        """
        if not self.projections:
            return Stack(torch.empty(0, 0), (), self, None)
        first = next(piece.a for found in self.projections for piece in found.pieces)
        if border is None:
            a_RI = first.new_empty(self.ranks, first.shape[1], dtype=self.dtype)
        else:
            a_RI = border.a_RI
            if self.wasted(len(border.b_OR)):
                border.b_OR.zero_()
        loras = []
        for found in self.projections:
            if border is None:
                size = (_length(found.outputs), _length(found.ranks))
                b_OR = first.new_empty(size, dtype=self.dtype)
            else:
                b_OR = border.b_OR[found.outputs, found.ranks]
            for piece in found.pieces:
                a_RI[found.ranks][piece.columns] = piece.a.detach()
                b = piece.b.detach()
                b_OR[:, piece.columns] = b if piece.scale == 1.0 else b * piece.scale
            loras.append(Lora(found.outputs, found.ranks, found.pieces, b_OR))
        return Stack(a_RI, tuple(loras), self, border)


@dataclass(frozen=True)
class Stack:
    """All adapters of a group in the compute dtype; R may be 0. border: where they were laid."""

    a_RI: torch.Tensor
    loras: tuple[Lora, ...]
    outline: Outline
    border: Bordered | None

    @property
    def spans(self) -> tuple[Span, ...]:
        """Which ranks see dropout."""
        return self.outline.spans

    @property
    def gemm(self) -> Gemm:
        """Of the products with W."""
        return self.outline.gemm

    @property
    def trainable(self) -> tuple[torch.nn.Parameter, ...]:
        """See `Outline`."""
        return self.outline.trainable


def _length(span: slice) -> int:
    return span.stop - span.start
