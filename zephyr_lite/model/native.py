"""Engine `native`: the decoder's layers by our own operations, for Mistral, Llama, Qwen2 and Qwen3.

It reads a transformers model with PEFT adapters and runs it. Nothing of the model is replaced, but
that the weights of linears with one input become views of one matrix, which `undo` takes back: what
is saved, exported or run by another engine is the same model. Adapters are read anew for every
forward, those too that are attached later. What it cannot run it refuses by name, and what it can
it proves at start against transformers' own forward.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from zephyr_kernels.norm import rms_norm, rms_norm_backward_

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import pair_layout
from zephyr_lite.errors import MachineError
from zephyr_lite.model.attention import DeviceLayout, to_device
from zephyr_lite.model.frozen_weights import Gemm, Slot
from zephyr_lite.model.group import Group
from zephyr_lite.model.head_norms import HeadNorms
from zephyr_lite.model.hf import HfEngine
from zephyr_lite.model.host_store import HostStore
from zephyr_lite.model.layer import Call, Layer, Saved, run

FAMILIES = ("mistral", "llama", "qwen2", "qwen3")
# Rotary embeddings that are a fixed function of the position.
STATIC_TURNS = ("default", "linear", "llama3")
# Relative error allowed against transformers' forward, which rounds where we do not.
SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
GROUPS = ("qkv", "o", "gate_up", "down")
SEED_STEP = 32  # a layer draws its dropout masks from this many consecutive seeds


class NativeEngine:
    """Runs a PeftModel over Mistral, Llama or Qwen with a frozen base.

    Args:
        model: as PEFT wraps it. dtype: compute dtype of every product and of the residual stream.
        saved: what a layer keeps for its backward.
        gemm: how products with frozen weights are computed.
        kept_layers: how many layers, the last ones, keep everything where the others do not. The
            last, because theirs is freed before an earlier layer computes its own again.
    `keep` (layers), `rest` and `gemm` may be set between calls.
    Raises: MachineError, naming what it is that the engine does not run.
    """

    name = "native"

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        *,
        saved: Saved = "keep",
        gemm: Gemm = "exact",
        kept_layers: int = 0,
    ) -> None:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.model, self.decoder = model, causal_lm.get_decoder()
        reason = refusal(causal_lm.config)
        own = (p for name, p in self.decoder.named_parameters() if ".lora_" not in name)
        if reason is None and any(p.requires_grad for p in own):
            reason = "its own weights train"
        if reason is not None:
            raise MachineError(f"engine native does not run this model: {reason}")
        self.dtype = dtype
        self.gemm: Gemm = gemm
        slots = {name: Slot() for name in GROUPS}
        self.layers = [_read(layer, dtype, slots) for layer in self.decoder.layers]
        self.rest: Saved = "lean" if saved == "keep" else saved
        self.keep = len(self.layers) if saved == "keep" else min(kept_layers, len(self.layers))
        if gemm == "fp16acc":
            for group in (group for layer in self.layers for group in layer.groups):
                group.frozen.check_fp16()
        self.gain_D = self.decoder.norm.weight.detach().to(dtype)
        self.eps = float(self.decoder.norm.variance_epsilon)
        self.window = getattr(self.decoder.config, "sliding_window", None)

    def hidden(self, layout: DeviceLayout) -> torch.Tensor:
        """Final hidden states [T, D] of every row, normed."""
        return self._run(layout, self.gemm, needed_only=False)

    def predicting(self, layout: DeviceLayout) -> torch.Tensor:
        """Final hidden states [N, D] of the rows that predict something, normed."""
        if layout.last is None:
            return self._run(layout, self.gemm, needed_only=False)[layout.rows_N]
        return self._run(layout, self.gemm, needed_only=True)[layout.last.scored_N]

    def report(self) -> list[str]:
        """What runs where: a line for each kind of layer and group."""
        normed = ", q and k normed" if any(layer.head_norms for layer in self.layers) else ""
        count, others = len(self.layers), len(self.layers) - self.keep
        saved = [(others, self.rest), (self.keep, "keep")]
        words = ", ".join(f"{n} {kind}" if n < count else kind for n, kind in saved if n)
        found = [f"{count} layers of model/layer.py, {words}{normed}"]
        for number, name in enumerate(GROUPS):
            kinds = Counter(layer.groups[number].report(self.gemm) for layer in self.layers)
            found += [f"{name} of {n} layers: {text}" for text, n in kinds.items()]
        return found

    def undo(self) -> None:
        """Give the model's linears memory of their own again; the engine runs nothing after."""
        for group in (group for layer in self.layers for group in layer.groups):
            group.frozen.give_back(group.bases)
        self.layers = []

    def self_test(self, device: torch.device) -> float:
        """Relative error of a packed row with a shared prompt against engine `hf`, always exact:
        what another arithmetic costs is measured by `gemm_probe`.

        Raises: MachineError when the two do not compute the same.
        """
        rng = np.random.default_rng(0)
        vocab_size = self.decoder.embed_tokens.num_embeddings
        prompt, chosen, rejected = (rng.integers(0, vocab_size, n) for n in (5, 4, 3))
        pairs = [EncodedPair(prompt, chosen, rejected)] * 2
        layout, hf = to_device(pair_layout(pairs), device), HfEngine(self.model)
        try:
            hf.self_test(device)  # both attend by one function, which is proven by itself
            with torch.no_grad():
                ours = self._run(layout, "exact", needed_only=False).float()
                truth = hf.hidden(layout).float()
        finally:
            hf.undo()
        error = ((ours - truth).norm() / truth.norm()).item()
        if not error <= SELF_TEST_TOLERANCE[self.dtype]:
            raise MachineError(
                f"engine native disagrees with transformers on this {type(self.decoder).__name__} "
                f"(relative error {error:.2g})",
                hint="set engine=hf",
            )
        return error

    def _run(self, layout: DeviceLayout, gemm: Gemm, *, needed_only: bool) -> torch.Tensor:
        last = layout.last if needed_only else None
        self._look_again()
        if self.window is not None and layout.longest > self.window:
            raise MachineError(
                f"a sequence is longer than the model's attention window of {self.window} tokens",
                hint="lower max_length",
            )
        with torch.autocast(layout.ids_T.device.type, enabled=False):
            x_TD = self.decoder.embed_tokens(layout.ids_T).to(self.dtype)
            cos_TP, sin_TP = self._turns(layout.positions_T)
            seed = int(torch.randint(2**30, ())) if self._has_dropout() else None
            # Without a backward nothing is kept, and nothing need leave.
            trains, first_kept = torch.is_grad_enabled(), len(self.layers) - self.keep
            host = HostStore()
            for number, layer in enumerate(self.layers):
                saved = "keep" if number >= first_kept else self.rest
                is_last = last is not None and number == len(self.layers) - 1
                call = Call(
                    plan=last.plan if last is not None and is_last else layout.plan,
                    cos_TP=cos_TP,
                    sin_TP=sin_TP,
                    scale=layer.head_width**-0.5,
                    saved=saved if trains else "lean",
                    rows_U=last.rows_U if last is not None and is_last else None,
                    seed=None if seed is None else seed + SEED_STEP * number,
                    gemm=gemm,
                    host=host,
                )
                x_TD = run(x_TD, layer, call)
            return _norm(x_TD, self.gain_D, self.eps)

    def _look_again(self) -> None:
        """Follow PEFT, which wraps linears and unwraps them behind our back."""
        if not self.layers:
            raise MachineError("engine native: undone, it runs nothing", hint="make another engine")
        for source, layer in zip(self.decoder.layers, self.layers, strict=True):
            for modules, group in zip(_linears(source), layer.groups, strict=True):
                group.follow(modules)

    def _turns(self, positions_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, P] of every token, by the model's own rotary embedding, in fp32."""
        like = torch.empty(0, dtype=torch.float32, device=positions_T.device)
        cos, sin = self.decoder.rotary_emb(like, positions_T[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    def _has_dropout(self) -> bool:
        modules = (m for layer in self.layers for g in layer.groups for m in g.modules)
        return any(
            d.training and getattr(d, "p", 0.0) > 0
            for module in modules
            for d in getattr(module, "lora_dropout", {}).values()
        )


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
        y_TD, rstd_T = rms_norm(x_TD, gain_D, eps)
        ctx.save_for_backward(x_TD, gain_D, rstd_T)
        return y_TD

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TD, gain_D, rstd_T = ctx.saved_tensors
        return rms_norm_backward_(grads[0].clone(), x_TD, gain_D, rstd_T), None, None


def _norm(x_TD: torch.Tensor, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
    result: Any = _Norm.apply(x_TD, gain_D, eps)
    return result


def _read(layer: Any, dtype: torch.dtype, slots: dict[str, Slot]) -> Layer:
    """One layer of the model in our terms."""
    attention = layer.self_attn
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if norms[0].variance_epsilon != norms[1].variance_epsilon:
        raise MachineError("engine native: a layer's two norms differ in epsilon")
    width = int(attention.head_dim)
    modules = zip(_linears(layer), slots.values(), strict=True)
    qkv, o, gate_up, down = (Group(linears, dtype, slot) for linears, slot in modules)
    return Layer(
        norm_attention=norms[0].weight.detach().to(dtype),
        norm_mlp=norms[1].weight.detach().to(dtype),
        eps=float(norms[0].variance_epsilon),
        qkv=qkv,
        o=o,
        gate_up=gate_up,
        down=down,
        heads=qkv.widths[0] // width,
        kv_heads=qkv.widths[1] // width,
        head_width=width,
        head_norms=_head_norms(attention, dtype),
    )


def _linears(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """Those of each group, in the order of `GROUPS`."""
    attention, mlp = layer.self_attn, layer.mlp
    return (
        (attention.q_proj, attention.k_proj, attention.v_proj),
        (attention.o_proj,),
        (mlp.gate_proj, mlp.up_proj),
        (mlp.down_proj,),
    )


def _head_norms(attention: Any, dtype: torch.dtype) -> HeadNorms | None:
    if not hasattr(attention, "q_norm"):
        return None
    q, k = attention.q_norm, attention.k_norm
    if q.variance_epsilon != k.variance_epsilon:
        raise MachineError("engine native: the norms of q and k differ in epsilon")
    gains = (norm.weight.detach().to(dtype) for norm in (q, k))
    return HeadNorms(*gains, eps=float(q.variance_epsilon))


def refusal(config: Any) -> str | None:
    """Why the layers of such a model are not those of model/layer.py; None if they are."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    turn = rope.get("rope_type", "default")
    if config.model_type not in FAMILIES:
        return f"{config.model_type} is not one of {', '.join(FAMILIES)}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
        return "its layers differ in their attention patterns"
    if getattr(config, "mlp_bias", False):
        return "its feed-forward block has biases"
    if turn not in STATIC_TURNS:
        return f"rotary embedding of type {turn}"
    return None
