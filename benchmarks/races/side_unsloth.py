"""Unsloth's side of a race: TRL's trainers as it patches them, over its own model.

Run by race.py, in a process of its own: CASE FOLDER OUT. Options as in side_trl.py, and

    checkpointing   False, True or "unsloth"; skip_layers: checkpoint_skip_layers ("auto", a number)
    fused           refuse a DPO that left its fused path: no word is said where that happens

Its statistics are switched off by the environment that race.py gives it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import unsloth  # isort: skip  # first of all: it patches what is imported after it  # noqa: F401  # pyright: ignore[reportMissingImports]
import torch
from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

from races.meter import Meter, serve
from races.side_trl import language, preference
from races.work import ADAPTER_TARGETS, Case, Work


def load(case: Case, work: Work) -> tuple[Any, None]:
    """The base with a fresh adapter, by Unsloth. Raises: RuntimeError if it changed the base."""
    checkpointing = case.options.get("checkpointing", "unsloth")
    length = work.sizes["row_length"] if work.rows else 1024
    on_gpu = case.device == "cuda"
    model, _ = FastLanguageModel.from_pretrained(
        model_name=case.base,
        max_seq_length=length,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        load_in_4bit=on_gpu,
        use_gradient_checkpointing=checkpointing,
        fix_tokenizer=False,
        use_exact_model_name=True,
    )
    if model.get_input_embeddings().num_embeddings != work.sizes["vocabulary"]:
        raise RuntimeError("Unsloth added tokens to the base")
    more = {}
    if "skip_layers" in case.options:
        more["checkpoint_skip_layers"] = case.options["skip_layers"]
    adapted = FastLanguageModel.get_peft_model(
        model,
        r=work.sizes["rank"],
        lora_alpha=work.sizes["alpha"],
        lora_dropout=case.dropout,
        target_modules=list(ADAPTER_TARGETS),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=work.sizes["seed"],
        max_seq_length=length,
        **more,
    )
    return adapted, None


def preferred(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """DPO steps. Raises: RuntimeError where the fused log-probs were asked for and not used."""
    before = sum(_calls().values())
    result = preference(case, folder, meter, load)
    if case.options.get("fused"):
        if result["fallbacks"]:
            raise RuntimeError(f"Unsloth left its fused path: {result['fallbacks']}")
        if sum(_calls().values()) == before:
            raise RuntimeError("Unsloth left its fused path: its kernel was never called")
    return result


def spoken(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """SFT steps."""
    return language(case, folder, meter, load)


def _calls() -> dict[str, int]:
    """How often its fused head ran, by kind; none where this version does not count."""
    try:
        from unsloth_zoo.fused_losses import (  # pyright: ignore[reportMissingImports]
            fused_linear,
        )
    except ImportError:
        return {}
    return dict(getattr(fused_linear, "CALLS", {}))


if __name__ == "__main__":
    serve({"dpo": preferred, "sft": spoken})
