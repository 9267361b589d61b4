"""Projections: the linears of a layer that read the same input, as one matrix and one LoRA stack.

    Y_p = X W_p' + sum over adapters of s (drop(X) A') B'      p = q, k, v | o | gate, up | down

The W_p of a group lie below each other in one matrix, so that one product serves all; the A of all
adapters of all projections lie below each other too, so that X is read once for all ranks. The
scale is folded into B, never B A into W: in bf16 that would round most of a young adapter away.

Only the products with W are computed otherwise under `gemm: fp16acc`; all that LoRA adds is not.

An adapter that is attached and not active has zeros for its B: policy and reference then have
the same columns, and with B = 0 they are the same numbers bit for bit.

Shapes: T tokens, I input width, O output width of all projections of a group, R rank of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from zephyr_kernels import fp16acc
from zephyr_kernels.lora import Dropout, Span, a_backward, input_backward_, rank_backward, shrink

from zephyr_lite.errors import MachineError
from zephyr_lite.model.frozen_weights import FrozenWeight, Gemm, Slot
from zephyr_lite.model.stack import Adapted, Lora, Outline, Piece, Stack


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

    def report(self) -> str:
        """What the group multiplies with, for a person: the frozen matrix and ranks by adapter."""
        ranks: dict[str, list[int]] = {}
        for module in self.modules:
            for name, half in getattr(module, "lora_A", {}).items():
                ranks.setdefault(name, []).append(half.weight.shape[0])
        found = [f"{name} r {'+'.join(map(str, r))}" for name, r in ranks.items()]
        return ", ".join([self.frozen.kind, *found])

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


def product(x_TK: torch.Tensor, weight_KN: torch.Tensor, gemm: Gemm) -> torch.Tensor:
    """x @ weight in x's dtype, for a weight that `FrozenWeight.weight` gave for this `gemm`."""
    return torch.mm(x_TK, weight_KN) if gemm == "exact" else fp16acc.product(x_TK, weight_KN)


def forward(
    x_TI: torch.Tensor, group: Group, stack: Stack, parts: Sequence[Part] = ()
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Y of every part (one, of everything, by default) and S = drop(X) A' [T, R] for the backward.

    S is None where nothing adapts the group.
    """
    weight_OI, bias_O = group.frozen.weight(stack.gemm), group.frozen.bias_O
    s_TR = shrink(x_TI, stack.a_RI, stack.spans) if stack.loras else None
    outputs = []
    for part in parts or group.parts:
        y_UO = product(part.of(x_TI), weight_OI[part.start : part.stop].T, stack.gemm)
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
    dx_TI = _base_backward(dys, group, parts, stack.gemm) if wants_dx else None
    if s_TR is None:
        return Returned(dx_TI, None, ())
    is_whole = all(part.rows_U is None for part in parts)
    ds_TR = torch.empty_like(s_TR) if is_whole else torch.zeros_like(s_TR)
    found: dict[int, torch.Tensor | None] = {}
    for dy_UO, part in zip(dys, parts, strict=True):
        s_UR = part.of(s_TR)
        for lora, at in part.inside(stack):
            columns = lora.trained
            s_trained = s_UR[:, lora.ranks] if columns is None else s_UR[:, lora.ranks][:, columns]
            ds_UR, db_OR = rank_backward(dy_UO[:, at], s_trained, lora.b_OR, columns is not None)
            if part.rows_U is None:
                ds_TR[:, lora.ranks] = ds_UR
            else:
                ds_TR[part.rows_U, lora.ranks] = ds_UR
            found[lora.ranks.start] = db_OR
    if dx_TI is not None:
        input_backward_(dx_TI, ds_TR, stack.a_RI, stack.spans)
    return Returned(dx_TI, ds_TR, tuple(found[lora.ranks.start] for lora in stack.loras))


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
    dys: Sequence[torch.Tensor], group: Group, parts: Sequence[Part], gemm: Gemm
) -> torch.Tensor:
    """dY W, the parts of all rows first, so that the others add into theirs."""
    weight_OI = group.frozen.weight(gemm)
    pairs = sorted(zip(dys, parts, strict=True), key=lambda pair: pair[1].rows_U is not None)
    dx_TI: torch.Tensor | None = None
    for dy_UO, part in pairs:
        dx_UI = product(dy_UO, weight_OI[part.start : part.stop], gemm)
        if dx_TI is None and part.rows_U is None:
            dx_TI = dx_UI
        elif dx_TI is None:
            raise ValueError("no part of the group covers all rows")
        elif part.rows_U is None:
            dx_TI += dx_UI
        else:
            dx_TI[part.rows_U] += dx_UI
    if dx_TI is None:
        raise ValueError(f"a group of {len(group.modules)} projections without a part")
    return dx_TI


def _bases(modules: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(getattr(m, "base_layer", m) for m in modules)


def _dropout_rate(module: Any, seed: int | None) -> float:
    is_on = seed is not None and module.training
    return float(getattr(module, "p", 0.0)) if is_on else 0.0
