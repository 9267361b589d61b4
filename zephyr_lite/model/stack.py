"""A stack: all adapters of a group of linears as columns of one product.

The A of all adapters of all projections lie below each other, so that the input is read once for
all ranks; the B of a projection's lie side by side, the scale alpha / r folded in. An adapter that
is attached and not active has scale 0, so zeros for its B.

Shapes: I input width, O output width of a projection, R rank of all adapters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from zephyr_kernels.lora import Span

from zephyr_lite.model.frozen_weights import Gemm


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

    def stack(self) -> Stack:
        """The numbers as they are now: a forward makes them, and its backward once more.

        Held between the two they would take 2 bytes a weight of every layer's adapters at once,
        0.75 GB for ranks 16 + 128 on a 7B; made again they cost a read of the masters.
        """
        a_parts = [p.a.detach().to(self.dtype) for found in self.projections for p in found.pieces]
        loras = []
        for found in self.projections:
            parts = [(piece.b.detach() * piece.scale).to(self.dtype) for piece in found.pieces]
            loras.append(Lora(found.outputs, found.ranks, found.pieces, torch.cat(parts, 1)))
        a_RI = torch.cat(a_parts) if a_parts else torch.empty(0, 0)
        return Stack(a_RI, tuple(loras), self)


@dataclass(frozen=True)
class Stack:
    """All adapters of a group in the compute dtype; R may be 0."""

    a_RI: torch.Tensor
    loras: tuple[Lora, ...]
    outline: Outline

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
