"""One decoder layer as one autograd function, its backward written by hand.

    n1 = norm(x);  q, k, v = proj(n1);  [norm and] turn q, k;  o = attention(q, k, v)
    mid = x + proj_o(o);  n2 = norm(mid);  g, u = proj(n2);  h = silu(g) u
    y = mid + proj_down(h)

Every proj is `projections.forward`: a frozen matrix and a stack of LoRA. What the backward can have
for one pass over memory (n1, n2, h, normed heads) is computed again; what would cost a product is
kept, or not:

    keep       all that a product made, but down's output, which no gradient wants
    lean       the layer's input; everything but down is computed again
    offload    as lean, and the input waits in pinned host memory, from which it is back in time

The three are the same numbers bit for bit, for the same function computes both times; on a GPU but
for flash attention's dQ, which it adds by atomics.

The last layer may be told which rows are needed (`rows_U`): keys and values are of all rows, the
rest is computed for those alone.

Shapes: T tokens, U rows that are needed (T, but in the last layer), D hidden width, F feed-forward
width, H query heads, J key/value heads, P half of a head's width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from zephyr_kernels import attention
from zephyr_kernels.lora import shrink
from zephyr_kernels.norm import add_rms_norm_, rms_norm, rms_norm_backward_
from zephyr_kernels.rope import rotate_
from zephyr_kernels.swiglu import swiglu, swiglu_backward_

from zephyr_lite.model import projections
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.group import Group, Part
from zephyr_lite.model.head_norms import HeadNorms, Pair
from zephyr_lite.model.host_store import HostStore
from zephyr_lite.model.projections import room_for
from zephyr_lite.model.stack import Outline, Stack

Saved = Literal["keep", "lean", "offload"]
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A decoder layer's frozen parts and adapters, as found in the model."""

    norm_attention: torch.Tensor
    norm_mlp: torch.Tensor
    eps: float
    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    heads: int
    kv_heads: int
    head_width: int
    head_norms: HeadNorms | None = None

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward."""
        return self.qkv, self.o, self.gate_up, self.down

    def qkv_parts(self, rows_U: torch.Tensor | None) -> tuple[Part, ...]:
        """q, k and v as one product; or q for some rows, then k and v for all."""
        if rows_U is None:
            return self.qkv.parts
        edge, stop = self.heads * self.head_width, sum(self.qkv.widths)
        return Part(0, edge, rows_U), Part(edge, stop)

    def split_heads(self, outputs: list[torch.Tensor]) -> Heads:
        """q [U, H, 2P], k and v [T, J, 2P]: views of what `qkv_parts` gave."""
        heads = [y.view(len(y), -1, self.head_width) for y in outputs]
        if len(heads) == 1:
            q, k, v = heads[0].split([self.heads, self.kv_heads, self.kv_heads], 1)
        else:
            q, (k, v) = heads[0], heads[1].split(self.kv_heads, 1)
        return q, k, v


@dataclass(frozen=True)
class Call:
    """What a forward knows beside its input.

    cos_TP, sin_TP: the turn of every token, fp32. rows_U: see the module; None for all.
    seed: of the dropout masks; None for none. gemm: of the products with frozen matrices.
    host: where all layers of a forward put their inputs under `offload`.
    """

    plan: attention.Plan
    cos_TP: torch.Tensor
    sin_TP: torch.Tensor
    scale: float
    saved: Saved
    rows_U: torch.Tensor | None
    seed: int | None
    gemm: Gemm = "exact"
    host: HostStore = field(default_factory=HostStore)


@dataclass
class _Stacks:
    qkv: Stack
    o: Stack
    gate_up: Stack
    down: Stack

    @classmethod
    def of(cls, layer: Layer, outlines: tuple[Outline, ...]) -> _Stacks:
        """The adapters of the layer's groups as they are now."""
        pairs = zip(layer.groups, outlines, strict=True)
        return cls(*(group.stack(outline) for group, outline in pairs))


@dataclass
class _Kept:
    """What `keep` saves of a layer; the names are the module's. s_*: the stacks' S = drop(X) A'.

    qkv: with q and k turned; as the product gave them where heads are normed.
    """

    rstd1_T: torch.Tensor
    qkv: list[torch.Tensor]
    out_UHD: torch.Tensor
    lse_UH: torch.Tensor
    mid_UD: torch.Tensor
    rstd2_U: torch.Tensor
    gate_up_U2F: torch.Tensor
    s_qkv_TR: torch.Tensor | None
    s_o_UR: torch.Tensor | None
    s_gate_up_UR: torch.Tensor | None


def run(x_TD: torch.Tensor, layer: Layer, call: Call) -> torch.Tensor:
    """The layer's output [U, D]; differentiable in x and in every adapter that trains."""
    seeds = [None if call.seed is None else call.seed + 8 * i for i in range(4)]
    groups = zip(layer.groups, seeds, strict=True)
    outlines = tuple(group.outline(seed, call.gemm) for group, seed in groups)
    trainable = (parameter for outline in outlines for parameter in outline.trainable)
    result: Any = _Layer.apply(x_TD, layer, call, outlines, *trainable)
    return result


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        layer: Layer,
        call: Call,
        outlines: tuple[Outline, ...],
        *trainable: torch.Tensor,
    ) -> torch.Tensor:
        stacks = _Stacks.of(layer, outlines)
        ctx.held = call.host.put(x_TD) if call.saved == "offload" else None
        kept = _attend_and_project(x_TD, layer, call, stacks)
        gate_UF, up_UF = kept.gate_up_U2F.chunk(2, 1)
        room = room_for(gate_UF.shape, stacks.down, gate_UF)
        h_UF = swiglu(gate_UF, up_UF, room and room.front)
        (y_UD,), s_down_UR = projections.forward(h_UF, layer.down, stacks.down, room=room)
        y_UD += kept.mid_UD
        ctx.layer, ctx.call, ctx.outlines = layer, call, outlines
        ctx.kept = (kept, s_down_UR) if call.saved == "keep" else None
        ctx.save_for_backward(*([] if ctx.held is not None else [x_TD]))
        return y_UD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy_UD = grads[0].contiguous()
        layer, call = ctx.layer, ctx.call
        stacks = _Stacks.of(layer, ctx.outlines)
        x_TD = ctx.saved_tensors[0] if ctx.held is None else ctx.held.get()
        if ctx.kept is None:
            kept, s_down_UR = _attend_and_project(x_TD, layer, call, stacks), None
        else:
            kept, s_down_UR = ctx.kept
            ctx.kept = None  # what the backward is done with need not wait for the graph's end
        dmid_UD, behind_UR, mlp = _mlp_backward(dy_UD, kept, s_down_UR, layer, stacks)
        # The largest, with S behind it; attention's backward has need of the memory.
        del kept.gate_up_U2F, kept.s_gate_up_UR
        dx_TD, attention_grads = _attention_backward(
            dmid_UD, behind_UR, x_TD, kept, layer, call, stacks, wants_dx=ctx.needs_input_grad[0]
        )
        return dx_TD, None, None, None, *attention_grads, *mlp


def _attend_and_project(x_TD: torch.Tensor, layer: Layer, call: Call, stacks: _Stacks) -> _Kept:
    """Everything up to gate and up."""
    room = room_for(x_TD.shape, stacks.qkv, x_TD)
    n1_TD, rstd1_T = rms_norm(x_TD, layer.norm_attention, layer.eps, room and room.front)
    parts = layer.qkv_parts(call.rows_U)
    outputs, s_qkv_TR = projections.forward(n1_TD, layer.qkv, stacks.qkv, parts, room=room)
    if layer.head_norms is None:
        _turn_(outputs, layer, call, inverse=False)
    heads, _ = _heads(outputs, layer, call)
    out_UHD, lse_UH = attention.forward(*heads, call.plan, call.scale)
    (mid_UD,), s_o_UR = projections.forward(out_UHD.flatten(1), layer.o, stacks.o)
    residual_UD = x_TD if call.rows_U is None else x_TD[call.rows_U]
    room = room_for(mid_UD.shape, stacks.gate_up, x_TD)
    n2_UD, rstd2_U = add_rms_norm_(
        mid_UD, residual_UD, layer.norm_mlp, layer.eps, room and room.front
    )
    # With room too, for its gradient will be written over it, and S becomes dS.
    shape = (len(mid_UD), sum(layer.gate_up.widths))
    out = room_for(shape, stacks.gate_up, x_TD)
    (gate_up_U2F,), s_gate_up_UR = projections.forward(
        n2_UD, layer.gate_up, stacks.gate_up, room=room, out=out
    )
    return _Kept(
        rstd1_T, outputs, out_UHD, lse_UH, mid_UD, rstd2_U, gate_up_U2F,
        s_qkv_TR, s_o_UR, s_gate_up_UR,
    )  # fmt: skip


def _mlp_backward(
    dy_UD: torch.Tensor,
    kept: _Kept,
    s_down_UR: torch.Tensor | None,
    layer: Layer,
    stacks: _Stacks,
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """d mid, the room behind it, and the gradients of gate's, up's and down's adapters.

    Writes over gate and up, and over S behind them.
    """
    gate_UF, up_UF = kept.gate_up_U2F.chunk(2, 1)
    if s_down_UR is None and stacks.down.loras:  # not kept: h a first time, for S alone
        s_down_UR = shrink(swiglu(gate_UF, up_UF), stacks.down.a_RI, stacks.down.spans)
    down = projections.backward([dy_UD], s_down_UR, layer.down, stacks.down)
    h_UF = down.dx_TI  # once the next line has read dh and written h over it
    swiglu_backward_(h_UF, gate_UF, up_UF)
    grads = projections.adapter_gradients(down, h_UF, stacks.down)
    del down, h_UF
    room = room_for(dy_UD.shape, stacks.o, dy_UD)
    behind_UR = None if stacks.gate_up.border is None else kept.s_gate_up_UR
    gate_up = projections.backward(
        [kept.gate_up_U2F], kept.s_gate_up_UR, layer.gate_up, stacks.gate_up,
        behind_TR=behind_UR, out=room,
    )  # fmt: skip
    n2_UD, _ = rms_norm(kept.mid_UD, layer.norm_mlp, layer.eps)
    grads = projections.adapter_gradients(gate_up, n2_UD, stacks.gate_up) + grads
    dmid_UD = rms_norm_backward_(
        gate_up.dx_TI, kept.mid_UD, layer.norm_mlp, kept.rstd2_U, residual_TD=dy_UD
    )
    return dmid_UD, room and room.behind, grads


def _attention_backward(
    dmid_UD: torch.Tensor,
    behind_UR: torch.Tensor | None,
    x_TD: torch.Tensor,
    kept: _Kept,
    layer: Layer,
    call: Call,
    stacks: _Stacks,
    *,
    wants_dx: bool,
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """dx (None unless wanted), and the gradients of q's, k's, v's and o's adapters."""
    o = projections.backward([dmid_UD], kept.s_o_UR, layer.o, stacks.o, behind_TR=behind_UR)
    grads = projections.adapter_gradients(o, kept.out_UHD.flatten(1), stacks.o)
    room = None if len(kept.qkv) > 1 else room_for(kept.qkv[0].shape, stacks.qkv, x_TD)
    doutputs = [torch.empty_like(y) for y in kept.qkv] if room is None else [room.front]
    heads, rstds = _heads(kept.qkv, layer, call)
    dheads = layer.split_heads(doutputs)
    saved = (*heads, kept.out_UHD, kept.lse_UH)
    attention.backward_(o.dx_TI.view_as(kept.out_UHD), *saved, call.plan, call.scale, dheads)
    _turn_(doutputs, layer, call, inverse=True)
    if layer.head_norms is not None and rstds is not None:
        layer.head_norms.backward_(dheads[:2], layer.split_heads(kept.qkv)[:2], rstds)
    parts = layer.qkv_parts(call.rows_U)
    qkv = projections.backward(
        doutputs, kept.s_qkv_TR, layer.qkv, stacks.qkv, parts,
        wants_dx=wants_dx, behind_TR=room and room.behind,
    )  # fmt: skip
    n1_TD, _ = rms_norm(x_TD, layer.norm_attention, layer.eps)
    grads = projections.adapter_gradients(qkv, n1_TD, stacks.qkv) + grads
    if not wants_dx:
        return None, grads
    residual_TD = dmid_UD if call.rows_U is None else None
    dx_TD = rms_norm_backward_(
        qkv.dx_TI, x_TD, layer.norm_attention, kept.rstd1_T, residual_TD=residual_TD
    )
    if call.rows_U is not None:
        dx_TD[call.rows_U] += dmid_UD
    return dx_TD, grads


def _heads(outputs: list[torch.Tensor], layer: Layer, call: Call) -> tuple[Heads, Pair | None]:
    """q, k and v as attention reads them; of normed heads copies, and their rstd."""
    q_UHD, k_TJD, v_TJD = layer.split_heads(outputs)
    if layer.head_norms is None:
        return (q_UHD, k_TJD, v_TJD), None
    (q_UHD, k_TJD), rstds = layer.head_norms.forward(q_UHD, k_TJD)
    at = slice(None) if call.rows_U is None else call.rows_U
    rotate_(q_UHD, call.cos_TP[at], call.sin_TP[at], inverse=False)
    rotate_(k_TJD, call.cos_TP, call.sin_TP, inverse=False)
    return (q_UHD, k_TJD, v_TJD), rstds


def _turn_(outputs: list[torch.Tensor], layer: Layer, call: Call, *, inverse: bool) -> None:
    """Rotate q and k where they stand, each row by its own position."""
    width = layer.head_width
    if call.rows_U is None:
        (qkv_TO,) = outputs
        heads = qkv_TO.view(len(qkv_TO), -1, width)[:, : layer.heads + layer.kv_heads]
        rotate_(heads, call.cos_TP, call.sin_TP, inverse=inverse)
        return
    q_UO, kv_TO = outputs
    turn_U = (call.cos_TP[call.rows_U], call.sin_TP[call.rows_U])
    rotate_(q_UO.view(len(q_UO), -1, width), *turn_U, inverse=inverse)
    k_TJD = kv_TO.view(len(kv_TO), -1, width)[:, : layer.kv_heads]
    rotate_(k_TJD, call.cos_TP, call.sin_TP, inverse=inverse)
