"""A policy: base, adapters, engine and head together. What `train` and `evaluate` talk to.

Products with frozen weights are exact wherever something is measured. Under `gemm: fp16acc` they
are not in training, nor in what training compares itself with: see `Policy.as_trained`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from zephyr_kernels.linear_logprob import log_probs
from zephyr_kernels.reference import linear_log_probs, logits_of

from zephyr_lite.data.layout import Layout, document_layout
from zephyr_lite.errors import MachineError
from zephyr_lite.model.adapters import activate, set_dropout, trainable_tensors
from zephyr_lite.model.attention import DeviceLayout, to_device
from zephyr_lite.model.engines import Engine, choose_attention, make_engine
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.recipe import Memory


@dataclass
class Policy:
    """A model that gives log-probs of a layout's scored tokens.

    model: a PeftModel, or a bare causal LM whose own weights train (pre-training).
    adapter: name of the adapter that trains; None when the base itself does or nothing does.
    gemm: how products with frozen weights are computed in training.
    attention: what computes it: `flash`, `xformers`, or `dense` where the GPU has no such kernel.
    """

    model: Any
    engine: Engine
    head_VD: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    adapter: str | None
    chunk_rows: int
    gemm: Gemm = "exact"
    attention: str = "flash"
    _is_as_trained: bool = field(default=False, init=False)

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return self.head_VD.shape[0]

    @property
    def max_positions(self) -> int:
        """Context length that the base was trained for, tokens."""
        return int(self.engine.decoder.config.max_position_embeddings)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Name -> parameter of everything that trains; all fp32."""
        return trainable_tensors(self.model)

    def use(self, adapters: Sequence[str], trainable: str | None = None) -> None:
        """Choose the adapters of the forward and the one that trains."""
        activate(self.model, adapters, trainable)
        self.adapter = trainable

    def log_probs(self, layout: Layout, *, training: bool = False) -> torch.Tensor:
        """logp_N of a layout's scored tokens, fp32 nats; with gradient when `training`.

        Exact unless `training`, or in a block of `as_trained`.
        """
        moved = to_device(layout, self.device)
        self.engine.gemm = self.gemm if training or self._is_as_trained else "exact"
        set_dropout(self.model, self.adapter if training else None)
        with torch.set_grad_enabled(training), self.autocast():
            return self._log_probs(moved)

    def sequence_log_probs(self, layout: Layout, *, training: bool = False) -> torch.Tensor:
        """Summed log-probs per sequence of the layout, fp32 nats."""
        logp_N = self.log_probs(layout, training=training)
        return sum_by_sequence(logp_N, layout)

    def next_token_log_probs(self, ids: Sequence[int]) -> torch.Tensor:
        """fp32 log-probs [len(ids), V] of the token after each position; an export equals them.

        Always exact.
        """
        self.engine.gemm = "exact"
        document = (np.array(ids, np.int64), np.zeros(len(ids), bool))
        layout = to_device(document_layout([document]), self.device)
        set_dropout(self.model, None)
        with torch.no_grad(), self.autocast():
            hidden_TD = self.engine.hidden(layout)
        with torch.no_grad():
            return logits_of(hidden_TD, self.head_VD).log_softmax(-1)

    @contextmanager
    def as_trained(self) -> Iterator[None]:
        """Log-probs in the block are by training's products though nothing trains: of the reference
        of the pairs that are trained on, and of the audits that compare with it.

        Only then are policy and reference the same bits before the first step, and later the part
        of an arithmetic's error that both share cancels.
        """
        before, self._is_as_trained = self._is_as_trained, True
        try:
            yield
        finally:
            self._is_as_trained = before

    def _log_probs(self, layout: DeviceLayout) -> torch.Tensor:
        hidden_ND = self.engine.predicting(layout)
        if self.head_VD.requires_grad:  # pre-training: the head learns too
            return linear_log_probs(hidden_ND, self.head_VD, layout.targets_N)
        with torch.autocast(self.device.type, enabled=False):
            return log_probs(hidden_ND, self.head_VD, layout.targets_N, chunk_rows=self.chunk_rows)

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 products over fp32 masters, as the recipe was trained."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def make_policy(
    model: Any,
    dtype: torch.dtype,
    device: torch.device,
    memory: Memory,
    *,
    engine: str = "native",
    gemm: Gemm = "exact",
    attention: Literal["auto", "xformers"] = "auto",
    self_test: bool = True,
) -> Policy:
    """Put an engine and a head on a model, and prove the engine on it.

    Args:
        engine: see `engines.choose`, which says beforehand what a model can run on.
        gemm: see `Policy`. attention: a GPU's; for the whole process.
    Raises: MachineError when the model's head cannot be taken as a plain matrix, when the engine or
        the attention does not run this model, or when it does not compute what it should.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal_lm.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise MachineError(f"{type(causal_lm).__name__}: the head is not a matrix without bias")
    config = causal_lm.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    computes = choose_attention(attention, device, dtype, width)
    keep = memory.keep_layers or 0
    made = make_engine(engine, model, dtype, memory.checkpointing, gemm, keep)
    policy = Policy(model, made, head.weight, device, dtype, None, memory.head_rows, gemm, computes)
    if self_test:
        set_dropout(model, None)  # noise is not a leak
        with policy.autocast():
            made.self_test(device)
    return policy


def sum_by_sequence(value_N: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Sum of per-token values in each sequence of the layout, added in fp64, in the values' dtype.

    A segment sum and not an index_add: the latter adds in any order on a GPU, and the audit before
    DPO's first step asks for two equal sums bit for bit.
    """
    lengths = torch.from_numpy(layout.scored_lengths).to(value_N.device)
    total_S = torch.segment_reduce(value_N.double(), "sum", lengths=lengths, unsafe=True)
    return total_S.to(value_N.dtype)
