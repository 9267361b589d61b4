"""Engine `hf`: transformers' modules and PEFT's adapters, unchanged, over a layout.

Our attention comes in through the public AttentionInterface, so every decoder with one causal
pattern runs. It is proven per model at start: two documents packed must equal each alone, and a
shared prompt must equal two sequences; a model that fails is refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import AttentionInterface
from zephyr_kernels.attention import attention

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import document_layout, pair_layout
from zephyr_lite.errors import MachineError
from zephyr_lite.model.attention import DeviceLayout, to_device
from zephyr_lite.model.frozen_weights import Gemm, is_misread

ATTENTION_NAME = "zephyr_layout"
# What some models pass to their attention that changes its result: a bound or a sink of the scores.
CHANGES_SCORES = ("softcap", "s_aux", "position_bias")
# Relative error allowed between packed and alone: rounding, not a leak (a leak is order 1).
SELF_TEST_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class HfEngine:
    """transformers' modules and PEFT's adapters as they are.

    Args:
        model: a causal LM of transformers, bare or inside a PeftModel.
        checkpointing: recompute every layer in the backward.
    """

    name = "hf"
    gemm: Gemm = "exact"

    def __init__(self, model: Any, *, checkpointing: bool = False) -> None:
        causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._causal_lm, self._checkpointing = causal_lm, checkpointing
        self._attention_before = causal_lm.config._attn_implementation
        AttentionInterface.register(ATTENTION_NAME, _attention_of_layout)
        causal_lm.set_attn_implementation(ATTENTION_NAME)
        if checkpointing:
            causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        self.decoder: Any = causal_lm.get_decoder()
        self.vocab_size = int(causal_lm.config.get_text_config().vocab_size)
        self._check_one_pattern(causal_lm.config)
        _check_4_bit_weights(causal_lm)

    def report(self) -> list[str]:
        """What runs where."""
        layers = "computed again in the backward" if self._checkpointing else "kept whole"
        return [f"transformers' and PEFT's modules as they are, {layers}"]

    def undo(self) -> None:
        """Give the model the attention back that it had."""
        self._causal_lm.set_attn_implementation(self._attention_before)
        if self._checkpointing:
            self._causal_lm.gradient_checkpointing_disable()

    def hidden(self, layout: DeviceLayout) -> torch.Tensor:
        """Final hidden states [T, D], normed."""
        return self.decoder(
            input_ids=layout.ids_T[None],
            position_ids=layout.positions_T[None],
            use_cache=False,
            layout=layout,
        ).last_hidden_state[0]

    def predicting(self, layout: DeviceLayout) -> torch.Tensor:
        """Those [N, D] of the rows that predict something."""
        return self.hidden(layout)[layout.rows_N]

    def self_test(self, device: torch.device) -> float:
        """Relative error of packed against alone and of shared against separate prompts.

        Raises: MachineError naming the model when the layout does not reach its attention.
        """
        rng = np.random.default_rng(0)
        ids = [rng.integers(0, self.vocab_size, n) for n in (5, 9, 7)]
        documents = [(i, np.zeros(len(i), bool)) for i in ids]
        pair = EncodedPair(ids[0], ids[1], ids[2])
        with torch.no_grad():
            packed = self.hidden(to_device(document_layout(documents), device))
            alone = [self.hidden(to_device(document_layout([d]), device)) for d in documents]
            shared = self.hidden(to_device(pair_layout([pair]), device))
            apart = self.hidden(to_device(pair_layout([pair], share_prompt=False), device))
        error = max(
            _relative(packed, torch.cat(alone)),
            _relative(shared, torch.cat([apart[:14], apart[19:]])),
        )
        if not error <= SELF_TEST_TOLERANCE[packed.dtype]:
            raise MachineError(
                f"{type(self.decoder).__name__} does not keep packed documents apart "
                f"(relative error {error:.2g})",
                hint="engine hf takes decoders with one causal attention pattern",
            )
        return error

    def _check_one_pattern(self, config: Any) -> None:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if len(kinds) > 1:
            raise MachineError(
                f"{config.model_type}: layers with different attention patterns {sorted(kinds)} "
                "are not supported by engine hf"
            )


def _check_4_bit_weights(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and is_misread(module):
            raise MachineError(
                f"{name}: bitsandbytes misreads 4-bit rows of {module.in_features} on a CPU",
                hint="set base.quantization=none, or run on a GPU",
            )


def _relative(x: torch.Tensor, truth: torch.Tensor) -> float:
    return ((x - truth).float().norm() / truth.float().norm()).item()


def _attention_of_layout(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: DeviceLayout | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature over our layout; tensors are [1, heads, T, D]."""
    if layout is None:
        raise MachineError(f"engine hf: {type(module).__name__} is not told about the layout")
    for name in CHANGES_SCORES:
        if others.get(name) is not None:
            raise MachineError(
                f"engine hf: {type(module).__name__} has attention scores with {name}, "
                "which are not supported"
            )
    if sliding_window is not None and layout.longest > sliding_window:
        raise MachineError(
            f"a sequence is longer than the model's attention window of {sliding_window} tokens",
            hint="lower max_length",
        )
    q_THD, k_TJD, v_TJD = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(q_THD, k_TJD, v_TJD, layout.plan, scale)[None], None
