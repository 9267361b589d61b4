"""What the worker asks of Unsloth, on transformers and PEFT: for machines without a GPU.

A test puts it on the worker's path under the name `unsloth`. The keywords are those of
`FastLanguageModel` in the wheels 2026.10.7 and 2026.10.9; another one is a TypeError here too.
STAND_IN in the environment makes it fail in one of the ways in which the real one does.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

FAULT = os.environ.get("STAND_IN", "")
print("Unsloth: Will patch your computer to enable faster finetuning.")
print("on stderr too", file=sys.stderr)


class FastLanguageModel:
    """Two of its functions."""

    @staticmethod
    def from_pretrained(
        model_name: str,
        max_seq_length: int,
        dtype: torch.dtype,
        load_in_4bit: bool,
        use_gradient_checkpointing: Any,
        fix_tokenizer: bool,
        use_exact_model_name: bool,
    ) -> tuple[Any, None]:
        if FAULT == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 224.00 MiB")
        if FAULT == "loads for ever":
            time.sleep(600)
        if FAULT in ("diverges", "orphaned"):
            return Bigrams(), None
        from transformers import AutoModelForCausalLM  # seconds, which those above do without

        model: Any = AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype)
        assert load_in_4bit == hasattr(model.config, "quantization_config")
        if FAULT == "tokens":
            model.resize_token_embeddings(model.config.vocab_size + 1)
        return model.train(), None

    @staticmethod
    def get_peft_model(
        model: Any,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        target_modules: list[str],
        bias: str,
        use_gradient_checkpointing: Any,
        random_state: int,
        max_seq_length: int,
    ) -> Any:
        if isinstance(model, Bigrams):
            model.forward = _slowly(model.forward) if FAULT == "orphaned" else _diverging(model)
            return model
        from peft import LoraConfig
        from peft import get_peft_model as with_adapter

        torch.manual_seed(random_state)
        targets = target_modules[1:] if FAULT == "fewer targets" else target_modules
        config = LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            target_modules=targets,
            bias=bias,
            task_type="CAUSAL_LM",
        )
        peft_model = with_adapter(model, config)
        if FAULT == "slow":
            peft_model.forward = _slowly(peft_model.forward)
        return peft_model


class Bigrams(torch.nn.Module):
    """A model without transformers and PEFT, where only what becomes of the worker matters."""

    def __init__(self, vocab_size: int = 384) -> None:
        super().__init__()
        self.head = torch.nn.ModuleDict({"lora_A": torch.nn.Embedding(vocab_size, vocab_size)})

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.head["lora_A"]

    def forward(
        self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch: Any, **_: Any
    ) -> Any:
        logits_TV = self.head["lora_A"](input_ids[0, :-1])
        total = torch.nn.functional.cross_entropy(logits_TV, labels[0, 1:], reduction="sum")
        return SimpleNamespace(loss=total / num_items_in_batch)


def _slowly(forward: Any) -> Any:
    def slow(**arguments: Any) -> Any:
        time.sleep(0.1)
        return forward(**arguments)

    return slow


def _diverging(model: Bigrams) -> Any:
    """Two calls are the check of packing, the third is the first step."""
    calls, forward = itertools.count(), model.forward

    def diverging(**arguments: Any) -> Any:
        output = forward(**arguments)
        if next(calls) == 3:
            output.loss = output.loss * torch.nan
        return output

    return diverging
