"""The plain side of a race: transformers, PEFT and bitsandbytes in a loop of one's own, no trainer.

What a careful person writes in an afternoon: padded pairs or packed rows, the model's own logits,
torch's cross entropy. No kernels, no fused head.

Run by race.py, in a process of its own: CASE FOLDER OUT. Options of its cases:

    batch           examples of one forward
    precompute      reference log-probs beforehand; else in every step
    sorted          pairs of one optimizer step ordered by length
    checkpointing   of every layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from races.meter import Meter, serve
from races.model import put_adapter, set_dropout
from races.work import ADAPTER_TARGETS, Case, Work, cut, digest, read_work

IGNORED, PADDING = -100, 2
Loss = Callable[[Sequence[int], Sequence[int]], torch.Tensor]  # examples of a forward, of its step


class Sequences:
    """Both sequences of each pair, padded on the right; log-probs of answers are summed in fp32."""

    def __init__(self, case: Case, work: Work, model: Any) -> None:
        self.case, self.work, self.model = case, work, model
        self.seen: list[np.ndarray] = []

    def log_probs(self, examples: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chosen and of the rejected answers."""
        pairs = [self.work.pairs[i] for i in examples]
        sequences = [pair.sequences[side] for side in (0, 1) for pair in pairs]
        prompts = [len(pair.prompt) for pair in pairs] * 2
        self.seen += sequences
        longest = max(map(len, sequences))
        ids, labels = np.full((2, len(sequences), longest), PADDING, np.int64)
        labels[:] = IGNORED
        for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            ids[row, : len(sequence)] = sequence
            labels[row, prompt : len(sequence)] = sequence[prompt:]
        ids_BT, labels_BT = (torch.from_numpy(x).to(self.case.device) for x in (ids, labels))
        lengths_B = torch.tensor([len(s) for s in sequences], device=self.case.device)
        mask_BT = torch.arange(longest, device=self.case.device) < lengths_B[:, None]
        logits_BTV = self.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        loss_BT = _loss_of(logits_BTV, labels_BT)
        chosen_P, rejected_P = loss_BT.sum(1).neg().chunk(2)
        return chosen_P, rejected_P


def preference(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """Reference log-probs, beforehand or in every step, and DPO steps."""
    work, model = _begin(case, folder)
    sequences = Sequences(case, work, model)
    size, count = case.options["batch"], len(work.pairs)

    def reference(examples: Sequence[int]) -> torch.Tensor:
        with torch.no_grad(), model.disable_adapter(), _autocast(case):
            return torch.stack(sequences.log_probs(examples))

    stored = None
    if case.options.get("precompute"):
        reference(range(size))  # warm-up
        meter.reference.append(meter.moment())
        stored = torch.cat([reference(examples) for examples in cut(range(count), size)], 1)
        meter.reference.append(meter.moment())

    def loss(examples: Sequence[int], step: Sequence[int]) -> torch.Tensor:
        chosen_P, rejected_P = sequences.log_probs(examples)
        before = reference(examples) if stored is None else stored[:, list(examples)]
        margin_P = (chosen_P - before[0]) - (rejected_P - before[1])
        return -logsigmoid(case.beta * margin_P).sum() / len(step)

    is_sorted = case.options.get("sorted", False)
    steps = [work.by_length(s) if is_sorted else work.plan[s] for s in range(case.steps)]
    sequences.seen.clear()
    return _train(case, model, steps, loss, sequences, meter)


def language(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """SFT steps over packed rows: positions restart, so documents are kept apart."""
    work, model = _begin(case, folder)
    rows = Rows(case, work, model)
    return _train(case, model, work.plan[: case.steps], rows.loss, rows, meter)


class Rows:
    """Packed rows laid end to end; a document's first token is predicted by nothing."""

    def __init__(self, case: Case, work: Work, model: Any) -> None:
        self.case, self.work, self.model = case, work, model
        self.seen: list[np.ndarray] = []

    def loss(self, examples: Sequence[int], step: Sequence[int]) -> torch.Tensor:
        """A part of the mean over all scored tokens of the step."""
        documents = [d for i in examples for d in self.work.rows[i]]
        self.seen += documents
        ids = np.concatenate(documents).astype(np.int64)
        positions = np.concatenate([np.arange(len(d)) for d in documents])
        labels = np.where(positions == 0, IGNORED, ids)
        ids_T, positions_T, labels_T = (
            torch.from_numpy(x)[None].to(self.case.device) for x in (ids, positions, labels)
        )
        divisor = sum(len(d) - 1 for i in step for d in self.work.rows[i])
        logits = self.model(input_ids=ids_T, position_ids=positions_T, use_cache=False).logits
        return _loss_of(logits, labels_T).sum() / divisor


def _begin(case: Case, folder: Path) -> tuple[Work, Any]:
    """The rows, and the base with the race's adapter."""
    torch.set_num_threads(case.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    work = read_work(folder)
    model = AutoModelForCausalLM.from_pretrained(
        case.base,
        dtype=torch.bfloat16 if case.device == "cuda" else torch.float32,
        device_map={"": case.device},
        attn_implementation="sdpa",
    )
    if case.options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    lora = LoraConfig(
        r=work.sizes["rank"],
        lora_alpha=work.sizes["alpha"],
        lora_dropout=case.dropout,
        target_modules=list(ADAPTER_TARGETS),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora).train()
    put_adapter(adapted, folder / "adapter")
    return work, adapted


def _train(
    case: Case, model: Any, steps: list[list[int]], loss: Loss, source: Any, meter: Meter
) -> dict[str, Any]:
    """Optimizer steps of micro-batches; losses, and digests of what the model saw in warm-up."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(case, parameters)
    losses, digests = [], []
    meter.loaded()
    meter.step()
    for number, step in enumerate(steps):
        set_dropout(model, case.dropout if number else 0.0)
        source.seen.clear()
        parts = []
        for examples in cut(step, case.options["batch"]):
            with _autocast(case):
                part = loss(examples, step)
            part.backward()
            parts.append(part.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(torch.stack(parts).sum().item())
        meter.step()
        if number < case.warmup:
            # Where the reference is computed in the step, it sees every sequence once more.
            once = {array.tobytes(): array for array in source.seen}
            digests.append(digest(once.values()))
    return {"losses": losses, "digests": digests, "attention": "sdpa"}


def _loss_of(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-probs [B, T - 1] of the labels, fp32, 0 where there is none."""
    shifted = logits_BTV[:, :-1].float().transpose(1, 2)
    return cross_entropy(shifted, labels_BT[:, 1:], ignore_index=IGNORED, reduction="none")


def _autocast(case: Case) -> AbstractContextManager[Any]:
    if case.device == "cpu":
        return nullcontext()
    return torch.autocast(case.device, dtype=torch.bfloat16)


def _optimizer(case: Case, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    if case.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=case.learning_rate, weight_decay=0.0, fused=True)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW32bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw_32bit": PagedAdamW32bit}
    return kinds[case.optimizer](parameters, lr=case.learning_rate, weight_decay=0.0)


if __name__ == "__main__":
    serve({"dpo": preference, "sft": language})
