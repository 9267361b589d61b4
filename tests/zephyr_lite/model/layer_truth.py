"""A decoder layer as plain composition under autograd, in any dtype: the truth of `model/layer.py`.

    n1 = norm(x);  q, k, v = proj(n1);  [norm and] turn q, k
    mid = x + proj_o(softmax(q k' / sqrt D) v)
    y = mid + proj_down(silu(gate) up)      gate, up = proj(norm(mid))

It reads transformers' layer and PEFT's adapters, computes every row under one dense mask, and uses
nothing of zephyr_kernels or zephyr_lite but the arrays of a layout.

Shapes: T tokens, D hidden width, O outputs, H query heads, P half of a head's width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel

from zephyr_lite.data.layout import Layout

# What an adapter sees its input multiplied with, by its matrix A: mask * scale [T, D].
Factors = Mapping[torch.nn.Parameter, torch.Tensor]


Turns = tuple[torch.Tensor, torch.Tensor]


def log_probs(model: Any, layout: Layout) -> torch.Tensor:
    """logp [N] of the layout's scored tokens by a whole model, in the dtype of its parameters."""
    causal_lm = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, head_VD = causal_lm.model, causal_lm.lm_head.weight
    x_TD = decoder.embed_tokens(torch.from_numpy(layout.ids_T))
    # The model's own table, which it holds in fp32 whatever it computes in.
    tables = decoder.rotary_emb(torch.empty(0), torch.from_numpy(layout.positions_T)[None])
    cos_TP, sin_TP = (x[0].chunk(2, -1)[0].to(x_TD.dtype) for x in tables)
    for layer in decoder.layers:
        x_TD = layer_output(layer, x_TD, layout, turned=(cos_TP, sin_TP))
    logits_NV = norm(x_TD, decoder.norm)[layout.rows_N] @ head_VD.T
    return logits_NV.log_softmax(-1)[torch.arange(len(layout.rows_N)), layout.targets_N]


def layer_output(
    layer: Any,
    x_TD: torch.Tensor,
    layout: Layout,
    factors: Factors | None = None,
    turned: Turns | None = None,
) -> torch.Tensor:
    """y [T, D] of one of transformers' layers; differentiable in x and all its parameters.

    factors: dropout, none by default. turned: cos and sin [T, P], those of `turns` by default.
    """
    attention, mlp, factors = layer.self_attn, layer.mlp, factors or {}
    n1_TD = norm(x_TD, layer.input_layernorm)
    q_THD, k_TJD, v_TJD = (
        project(n1_TD, module, factors).unflatten(1, (-1, attention.head_dim))
        for module in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    if hasattr(attention, "q_norm"):
        q_THD, k_TJD = norm(q_THD, attention.q_norm), norm(k_TJD, attention.k_norm)
    cos_TP, sin_TP = turned or turns(layout, attention.head_dim, x_TD.dtype)
    q_THD, k_TJD = turn(q_THD, cos_TP, sin_TP), turn(k_TJD, cos_TP, sin_TP)
    out_TO = attend(q_THD, k_TJD, v_TJD, who_sees_whom(layout)).flatten(1)
    mid_TD = x_TD + project(out_TO, attention.o_proj, factors)
    n2_TD = norm(mid_TD, layer.post_attention_layernorm)
    gate_TF = project(n2_TD, mlp.gate_proj, factors)
    h_TF = gate_TF * torch.sigmoid(gate_TF) * project(n2_TD, mlp.up_proj, factors)
    return mid_TD + project(h_TF, mlp.down_proj, factors)


def norm(x_TD: torch.Tensor, module: Any) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * gain."""
    return (
        x_TD
        * (x_TD.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt()
        * (module.weight)
    )


def project(x_TD: torch.Tensor, module: Any, factors: Factors) -> torch.Tensor:
    """x W' + bias + sum over active adapters of scale * (factor x) A' B'."""
    base = getattr(module, "base_layer", module)
    y_TO = x_TD @ base.weight.T
    if base.bias is not None:
        y_TO = y_TO + base.bias
    if base is module or module.disable_adapters:
        return y_TO
    for name in module.active_adapters:
        if name in module.lora_A:
            a_RD, b_OR = module.lora_A[name].weight, module.lora_B[name].weight
            seen_TD = x_TD * factors[a_RD] if a_RD in factors else x_TD
            y_TO = y_TO + module.scaling[name] * (seen_TD @ a_RD.T @ b_OR.T)
    return y_TO


def turns(layout: Layout, width: int, dtype: torch.dtype, theta: float = 10000.0) -> Turns:
    """cos and sin [T, P] of position * theta^(-2i / width), rounded to fp32 as models hold them."""
    frequency_P = theta ** -(torch.arange(0, width, 2).float() / width)
    angle_TP = torch.from_numpy(layout.positions_T)[:, None].float() * frequency_P
    return angle_TP.cos().to(dtype), angle_TP.sin().to(dtype)


def turn(x_THD: torch.Tensor, cos_TP: torch.Tensor, sin_TP: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + P) of every head by its token's angles."""
    a_THP, b_THP = x_THD.chunk(2, -1)
    cos_T1P, sin_T1P = cos_TP[:, None], sin_TP[:, None]
    turned = (a_THP * cos_T1P - b_THP * sin_T1P, b_THP * cos_T1P + a_THP * sin_T1P)
    return torch.cat(turned, -1)


def attend(
    q_THD: torch.Tensor, k_TJD: torch.Tensor, v_TJD: torch.Tensor, seen_TT: torch.Tensor
) -> torch.Tensor:
    """Softmax attention under a mask; query head h reads key head h // (H / J)."""
    head_of = torch.arange(q_THD.shape[1]) // (q_THD.shape[1] // k_TJD.shape[1])
    scores_HTT = torch.einsum("thd,shd->hts", q_THD, k_TJD[:, head_of]) * q_THD.shape[2] ** -0.5
    weights_HTT = scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1)
    return torch.einsum("hts,shd->thd", weights_HTT, v_TJD[:, head_of])


def who_sees_whom(layout: Layout) -> torch.Tensor:
    """The layout's rule, row by row: bool [T, T]."""
    seen_TT = torch.zeros(layout.n_tokens, layout.n_tokens, dtype=torch.bool)
    columns = (layout.q_start_S, layout.q_len_S, layout.c_start_S, layout.c_len_S)
    for q_start, q_len, c_start, c_len in zip(*columns, strict=True):
        for row in range(q_start, q_start + q_len):
            seen_TT[row, c_start : c_start + c_len] = True
            seen_TT[row, q_start : row + 1] = True
    return seen_TT


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, in fp64."""
    truth = truth.double()
    return ((found.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()
