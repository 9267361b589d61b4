"""Projections: the linears of a layer that read the same input, as one matrix and one LoRA stack.

    Y_p = X W_p' + sum over adapters of s (drop(X) A') B'      p = q, k, v | o | gate, up | down

The W_p of a group lie below each other in one matrix, so that one product serves all; the A of all
adapters of all projections lie below each other too, so that X is read once for all ranks. The
scale is folded into B, never B A into W: in bf16 that would round most of a young adapter away.

An adapter that is attached and not active has zeros for its B: policy and reference then have
the same columns, and with B = 0 they are the same numbers bit for bit.

Shapes: T tokens, I input width, O output width of all projections of a group, R rank of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from zephyr_kernels.lora import Dropout, Span, a_backward, input_backward_, rank_backward, shrink

from zephyr_lite.model.frozen_weights import FrozenWeight, Slot


@dataclass(frozen=True)
class Piece:
    """One adapter of one projection: its masters (fp32), its place among the projection's ranks."""

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    columns: slice
    trains: bool


@dataclass(frozen=True)
class Lora:
    """All adapters of one projection.

    outputs: its features among the group's O. ranks: its rows of the stacked A. b_OR: its B's side
    by side, the scales folded in.
    """

    outputs: slice
    ranks: slice
    b_OR: torch.Tensor
    pieces: tuple[Piece, ...]

    @property
    def trains(self) -> bool:
        """Whether some adapter of it does."""
        return any(piece.trains for piece in self.pieces)


@dataclass(frozen=True)
class Stack:
    """All adapters of a group in the compute dtype; R may be 0. spans: which ranks see dropout."""

    a_RI: torch.Tensor
    loras: tuple[Lora, ...]
    spans: tuple[Span, ...]

    @property
    def trainable(self) -> tuple[torch.nn.Parameter, ...]:
        """A and B of each piece that trains, in the order of `backward`'s gradients."""
        pieces = (piece for lora in self.loras for piece in lora.pieces if piece.trains)
        return tuple(half for piece in pieces for half in (piece.a, piece.b))


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
        bases = [getattr(m, "base_layer", m) for m in modules]
        self.widths = tuple(int(b.out_features) for b in bases)
        self.frozen = FrozenWeight(bases, dtype, slot)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The group as one part."""
        return (Part(0, sum(self.widths)),)

    def stack(self, seed: int | None) -> Stack:
        """The adapters as they are now; `seed` draws the dropout masks (None: no dropout)."""
        a_parts: list[torch.Tensor] = []
        loras: list[Lora] = []
        spans: list[Span] = []
        rank = column = 0
        for module, width in zip(self.modules, self.widths, strict=True):
            first, b_parts, pieces = rank, [], []
            for name in getattr(module, "lora_A", ()):
                a_RI, b_OR = module.lora_A[name].weight, module.lora_B[name].weight
                is_active = name in module.active_adapters and not module.disable_adapters
                scale = float(module.scaling[name]) if is_active else 0.0
                stop = rank + a_RI.shape[0]
                if rate := _dropout_rate(module.lora_dropout[name], seed):
                    spans.append((rank, stop, Dropout(rate, (seed or 0) + len(spans))))
                a_parts.append(a_RI.detach().to(self.dtype))
                b_parts.append((b_OR.detach() * scale).to(self.dtype))
                trains = is_active and a_RI.requires_grad
                columns = slice(rank - first, stop - first)
                pieces.append(Piece(a_RI, b_OR, scale, columns, trains))
                rank = stop
            if pieces:
                outputs, ranks = slice(column, column + width), slice(first, rank)
                loras.append(Lora(outputs, ranks, torch.cat(b_parts, 1), tuple(pieces)))
            column += width
        a_RI = torch.cat(a_parts) if a_parts else torch.empty(0, 0)
        return Stack(a_RI, tuple(loras), tuple(spans))


def forward(
    x_TI: torch.Tensor, group: Group, stack: Stack, parts: Sequence[Part] = ()
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Y of every part (one, of everything, by default) and S = drop(X) A' [T, R] for the backward.

    S is None where nothing adapts the group.
    """
    weight_OI, bias_O = group.frozen.weight(), group.frozen.bias_O
    s_TR = shrink(x_TI, stack.a_RI, stack.spans) if stack.loras else None
    outputs = []
    for part in parts or group.parts:
        y_UO = torch.mm(part.of(x_TI), weight_OI[part.start : part.stop].T)
        if bias_O is not None:
            y_UO += bias_O[part.start : part.stop]
        if s_TR is not None:
            s_UR = part.of(s_TR)
            for lora, at in part.inside(stack):
                y_UO[:, at].addmm_(s_UR[:, lora.ranks], lora.b_OR.T)
        outputs.append(y_UO)
    return outputs, s_TR


@dataclass(frozen=True)
class Returned:
    """What came back to a group: dX [T, I] (None unless wanted), dS [T, R], and dB per LoRA."""

    wanted_dx_TI: torch.Tensor | None
    ds_TR: torch.Tensor | None
    db_OR: tuple[torch.Tensor | None, ...]

    @property
    def dx_TI(self) -> torch.Tensor:
        """dX. Raises: ValueError when it was not wanted."""
        if self.wanted_dx_TI is None:
            raise ValueError("dX was not asked for")
        return self.wanted_dx_TI


def backward(
    dys: Sequence[torch.Tensor],
    s_TR: torch.Tensor | None,
    group: Group,
    stack: Stack,
    parts: Sequence[Part] = (),
    *,
    wants_dx: bool = True,
) -> Returned:
    """dS = dY B;  dB = dY' S;  dX = dY W + mask (dS A). `adapter_gradients` is the rest."""
    parts = parts or group.parts
    dx_TI = _base_backward(dys, group, parts) if wants_dx else None
    if s_TR is None:
        return Returned(dx_TI, None, ())
    is_whole = all(part.rows_U is None for part in parts)
    ds_TR = torch.empty_like(s_TR) if is_whole else torch.zeros_like(s_TR)
    found: dict[int, torch.Tensor | None] = {}
    for dy_UO, part in zip(dys, parts, strict=True):
        s_UR = part.of(s_TR)
        for lora, at in part.inside(stack):
            ds_UR, db_OR = rank_backward(dy_UO[:, at], s_UR[:, lora.ranks], lora.b_OR, lora.trains)
            if part.rows_U is None:
                ds_TR[:, lora.ranks] = ds_UR
            else:
                ds_TR[part.rows_U, lora.ranks] = ds_UR
            found[lora.ranks.start] = db_OR
    if dx_TI is not None:
        input_backward_(dx_TI, ds_TR, stack.a_RI, stack.spans)
    return Returned(dx_TI, ds_TR, tuple(found[lora.ranks.start] for lora in stack.loras))


def adapter_gradients(returned: Returned, x_TI: torch.Tensor, stack: Stack) -> list[torch.Tensor]:
    """Gradients of `stack.trainable`, fp32: dA = dS' drop(X), and dB with the scale undone."""
    if returned.ds_TR is None or not stack.trainable:
        return []
    da_RI = a_backward(returned.ds_TR, x_TI, stack.spans)
    grads = []
    for lora, db_OR in zip(stack.loras, returned.db_OR, strict=True):
        for piece in lora.pieces:
            if piece.trains and db_OR is not None:
                grads.append(da_RI[lora.ranks][piece.columns])
                grads.append(db_OR[:, piece.columns] * piece.scale)
    return grads


def _base_backward(
    dys: Sequence[torch.Tensor], group: Group, parts: Sequence[Part]
) -> torch.Tensor:
    """dY W, the parts of all rows first, so that the others add into theirs."""
    weight_OI = group.frozen.weight()
    pairs = sorted(zip(dys, parts, strict=True), key=lambda pair: pair[1].rows_U is not None)
    dx_TI: torch.Tensor | None = None
    for dy_UO, part in pairs:
        weight = weight_OI[part.start : part.stop]
        if dx_TI is None and part.rows_U is None:
            dx_TI = torch.mm(dy_UO, weight)
        elif dx_TI is None:
            raise ValueError("no part of the group covers all rows")
        elif part.rows_U is None:
            dx_TI.addmm_(dy_UO, weight)
        else:
            dx_TI[part.rows_U] += torch.mm(dy_UO, weight)
    if dx_TI is None:
        raise ValueError(f"a group of {len(group.modules)} projections without a part")
    return dx_TI


def _dropout_rate(module: Any, seed: int | None) -> float:
    is_on = seed is not None and module.training
    return float(getattr(module, "p", 0.0)) if is_on else 0.0
