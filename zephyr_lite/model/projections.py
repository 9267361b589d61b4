"""Projections: the linears of a layer that read the same input, as one matrix and one LoRA stack.

    Y_p = X W_p' + sum over adapters of s (drop(X) A') B'      p = q, k, v | o | gate, up | down

The W_p of a group lie below each other in one matrix, so that one product serves all; the A of all
adapters of all projections lie below each other too, so that X is read once for all ranks. The
scale is folded into B, never B A into W: in bf16 that would round most of a young adapter away.

Where W has a border (`frozen_weights.py`) and X room behind its rows, S is laid into the room and
one product does both, with no pass over Y; so with dY, dS and dX. Elsewhere, and where B side by
side would be zeros for the most part, the adapters' share is added to the product in place.

Only the products with W are computed otherwise under `gemm: fp16acc`; all that LoRA adds is not.

An adapter that is attached and not active has zeros for its B: policy and reference then have
the same columns, and with B = 0 they are the same numbers bit for bit.

Shapes: T tokens, I input width, O output width of all projections of a group, R rank of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from zephyr_kernels import fp16acc
from zephyr_kernels.lora import (
    Span,
    a_backward,
    input_backward_,
    linear,
    linear_backward,
    rank_backward,
    shrink,
)

from zephyr_lite.model.frozen_weights import Gemm, with_step
from zephyr_lite.model.group import Group, Part
from zephyr_lite.model.stack import Stack


def product(
    x_TK: torch.Tensor, weight_KN: torch.Tensor, gemm: Gemm, out_TN: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ weight in x's dtype, for a weight that `FrozenWeight.weight` gave for this `gemm`.

    Only an exact product goes to `out_TN`.
    """
    if gemm == "exact":
        return torch.mm(x_TK, weight_KN, out=out_TN)
    return fp16acc.product(x_TK, weight_KN)


@dataclass(frozen=True)
class Room:
    """Columns of a buffer [T, width], and those behind them in the same rows [T, R]."""

    front: torch.Tensor
    behind: torch.Tensor


def room_for(shape: Sequence[int], stack: Stack, like: torch.Tensor) -> Room | None:
    """Room for S or dS behind new rows of a shape [T, width], of a tensor's dtype and device.

    None where the stack has no border, and so no use for it.
    """
    if stack.border is None:
        return None
    (rows, width), ranks = shape, stack.a_RI.shape[0]
    whole = like.new_empty(rows, width + with_step(ranks))
    return Room(whole[:, :width], whole[:, width : width + ranks])


def forward(
    x_TI: torch.Tensor,
    group: Group,
    stack: Stack,
    parts: Sequence[Part] = (),
    *,
    room: Room | None = None,
    out: Room | None = None,
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Y of every part (one, of everything, by default) and S = drop(X) A' [T, R] for the backward.

    Args: room: x and what is behind it. out: where the one part's Y goes, and S behind it.
    S is None where nothing adapts the group.
    """
    s_TR = beside_TR = shrink(x_TI, stack.a_RI, stack.spans) if stack.loras else None
    if s_TR is not None and room is not None:
        beside_TR = room.behind.copy_(s_TR)
    outputs = []
    for part in parts or group.parts:
        y_UO = _part_forward(x_TI, beside_TR, group, stack, part, out)
        if group.frozen.bias_O is not None:
            y_UO += group.frozen.bias_O[part.start : part.stop]
        outputs.append(y_UO)
    if out is not None and s_TR is not None:
        s_TR = out.behind.copy_(s_TR)
    return outputs, s_TR


def _part_forward(
    x_TI: torch.Tensor,
    s_TR: torch.Tensor | None,
    group: Group,
    stack: Stack,
    part: Part,
    out: Room | None,
) -> torch.Tensor:
    rows = slice(part.start, part.stop)
    if stack.border is not None and s_TR is not None:
        border = stack.border
        place = None if out is None else out.front
        return linear(part.of(x_TI), border.w_OI[rows], part.of(s_TR), border.b_OR[rows], place)
    y_UO = product(part.of(x_TI), group.frozen.weight(stack.gemm)[rows].T, stack.gemm)
    if s_TR is not None:
        s_UR = part.of(s_TR)
        for lora, at in part.inside(stack):
            y_UO[:, at].addmm_(s_UR[:, lora.ranks], lora.b_OR.T)
    return y_UO


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
    behind_TR: torch.Tensor | None = None,
    out: Room | None = None,
) -> Returned:
    """dS = dY B;  dB = dY' S;  dX = dY W + mask (dS A). `adapter_gradients` is the rest.

    Args: behind_TR: where dS goes, the room behind dY if it has some; may be S itself. out: where
    dX goes, if in front of room.
    """
    parts = parts or group.parts
    ds_TR, db_OR = None, ()
    if s_TR is not None:
        ds_TR, db_OR = _rank_gradients(dys, s_TR, stack, parts, behind_TR)
    dx_TI = None
    if wants_dx:
        place = None if out is None else out.front
        dx_TI = _input_gradient(dys, ds_TR, group, stack, parts, place)
    return Returned(dx_TI, ds_TR, db_OR)


def _rank_gradients(
    dys: Sequence[torch.Tensor],
    s_TR: torch.Tensor,
    stack: Stack,
    parts: Sequence[Part],
    behind_TR: torch.Tensor | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """dS [T, R], and dB of every LoRA of the stack."""
    is_whole = all(part.rows_U is None for part in parts)
    if behind_TR is None or not is_whole:
        behind_TR = s_TR.new_empty(s_TR.shape) if is_whole else s_TR.new_zeros(s_TR.shape)
    found: dict[int, torch.Tensor | None] = {}
    for dy_UO, part in zip(dys, parts, strict=True):
        s_UR = part.of(s_TR)
        for lora, at in part.inside(stack):
            columns = lora.trained
            s_trained = s_UR[:, lora.ranks] if columns is None else s_UR[:, lora.ranks][:, columns]
            ds_UR, db_OR = rank_backward(dy_UO[:, at], s_trained, lora.b_OR, columns is not None)
            if part.rows_U is None:
                behind_TR[:, lora.ranks] = ds_UR
            else:
                behind_TR[part.rows_U, lora.ranks] = ds_UR
            found[lora.ranks.start] = db_OR
    return behind_TR, tuple(found[lora.ranks.start] for lora in stack.loras)


def _input_gradient(
    dys: Sequence[torch.Tensor],
    ds_TR: torch.Tensor | None,
    group: Group,
    stack: Stack,
    parts: Sequence[Part],
    place_TI: torch.Tensor | None,
) -> torch.Tensor:
    """dX [T, I]: one product, unless masks or parts are in the way."""
    border = stack.border
    is_one = len(parts) == 1 and not stack.spans
    if border is not None and ds_TR is not None and is_one:
        return linear_backward(dys[0], border.w_OI, ds_TR, border.a_RI, place_TI)
    weight_OI = group.frozen.weight(stack.gemm) if border is None else border.w_OI
    dx_TI = _base_backward(dys, weight_OI, parts, stack.gemm, place_TI)
    if ds_TR is not None:
        input_backward_(dx_TI, ds_TR, stack.a_RI, stack.spans)
    return dx_TI


def adapter_gradients(returned: Returned, x_TI: torch.Tensor, stack: Stack) -> list[torch.Tensor]:
    """Gradients of `stack.trainable`, fp32: dA = dS' drop(X), and dB with the scale undone.

    Of the ranks that train alone, of which `returned` has dB.
    """
    if returned.ds_TR is None or not stack.trainable:
        return []
    ds_TR, spans = _trained(returned.ds_TR, stack)
    da_RI = a_backward(ds_TR, x_TI, spans)
    grads, first = [], 0
    for lora, db_OR in zip(stack.loras, returned.db_OR, strict=True):
        if lora.trained is None or db_OR is None:
            continue
        for piece in lora.pieces:
            at = slice(*(n - lora.trained.start for n in (piece.columns.start, piece.columns.stop)))
            if piece.trains:
                grads += [da_RI[first:][at], db_OR[:, at] * piece.scale]
        first += db_OR.shape[1]
    return grads


def _trained(ds_TR: torch.Tensor, stack: Stack) -> tuple[torch.Tensor, tuple[Span, ...]]:
    """dS of the ranks that train, side by side, and their dropout by their new places."""
    parts, spans, done = [], [], 0
    for lora in stack.loras:
        if lora.trained is None:
            continue
        start, stop = (lora.ranks.start + n for n in (lora.trained.start, lora.trained.stop))
        inside = [s for s in stack.spans if start <= s[0] and s[1] <= stop]
        spans += [(a - start + done, b - start + done, dropout) for a, b, dropout in inside]
        parts.append(ds_TR[:, start:stop])
        done += stop - start
    return ds_TR if done == ds_TR.shape[1] else torch.cat(parts, 1), tuple(spans)


def _base_backward(
    dys: Sequence[torch.Tensor],
    weight_OI: torch.Tensor,
    parts: Sequence[Part],
    gemm: Gemm,
    place_TI: torch.Tensor | None,
) -> torch.Tensor:
    """dY W, the parts of all rows first, so that the others add into theirs."""
    pairs = sorted(zip(dys, parts, strict=True), key=lambda pair: pair[1].rows_U is not None)
    dx_TI: torch.Tensor | None = None
    for dy_UO, part in pairs:
        rows = weight_OI[part.start : part.stop]
        if dx_TI is None and part.rows_U is None:
            dx_TI = product(dy_UO, rows, gemm, place_TI)
            continue
        dx_UI = product(dy_UO, rows, gemm)
        if dx_TI is None:
            raise ValueError("no part of the group covers all rows")
        if part.rows_U is None:
            dx_TI += dx_UI
        else:
            dx_TI[part.rows_U] += dx_UI
    if dx_TI is None:
        raise ValueError("a group of projections without a part")
    return dx_TI
