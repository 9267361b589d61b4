"""TRL's side of cpu_vs_trl.py: its trainers, unchanged but for what they are given and watched by.

Its best settings on a CPU: fp32, SDPA, fused AdamW, reference log-probs computed beforehand,
gradient checkpointing off, logging, saving and bars off, the pairs of one optimizer step ordered by
length so that a batch of two pads least.

Run by cpu_vs_trl.py, in a process of its own: CASE FOLDER OUT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_work import ADAPTER_TARGETS, Case, Work, digest, durations, now, read_work, serve
from datasets import Dataset
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.utils import logging
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


class Planned(Sampler[int]):
    """The examples of all optimizer steps, one after the other."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class StepClock(TrainerCallback):
    """Notes when each optimizer step ended."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The first step begins; every other begins where the last one ended."""
        if not self.times:
            self.times.append(now())

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """An optimizer step ended."""
        self.times.append(now())


class Watch:
    """What is read from a trainer: losses of forwards, the ids it saw, time of the reference."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self.losses: list[torch.Tensor] = []
        self.seen: list[np.ndarray] = []
        self.looking = 0  # forwards whose ids are still to be noted
        self.reference: list[tuple[float, float]] = []  # after the warm-up and after each batch

    def note_pairs(self, inputs: dict[str, torch.Tensor]) -> None:
        """Keep the unpadded sequences of a batch of pairs."""
        if self.looking > 0:
            self.looking -= 1
            for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
                self.seen.append(ids[mask.bool()].numpy().astype(np.int32))

    def note_rows(self, inputs: dict[str, torch.Tensor]) -> None:
        """Keep the documents of a batch of packed rows."""
        if self.looking > 0:
            self.looking -= 1
            starts = np.flatnonzero(inputs["position_ids"][0].numpy() == 0)[1:]
            self.seen += np.split(inputs["input_ids"][0].numpy().astype(np.int32), starts)


class Dpo(DPOTrainer):
    """DPOTrainer over ready token ids, in a given order."""

    watch: Watch

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return Planned(self.watch.order)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        first = self.data_collator([dataset[i] for i in range(batch_size)])
        self.compute_ref_log_probs(self.model, first)  # warm-up
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        result = super().compute_ref_log_probs(model, inputs)
        self.watch.reference.append(now())
        return result

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        self.watch.note_pairs(inputs)
        loss = super().compute_loss(model, inputs, *arguments, **named)
        self.watch.losses.append(loss.detach())
        return loss


class Sft(SFTTrainer):
    """SFTTrainer over ready packed rows, in a given order."""

    watch: Watch

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return Planned(self.watch.order)

    def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
        self.watch.note_rows(inputs)
        loss = super().compute_loss(model, inputs, *arguments, **named)
        self.watch.losses.append(loss.detach())
        return loss


def preference(case: Case, folder: Path) -> dict[str, Any]:
    """Reference pass over all pairs, then DPO steps."""
    work, watch = read_work(folder), _watch(case)
    size = [max(map(len, pair.sequences)) for pair in work.pairs]
    for step in work.plan["dpo"][: case.steps]:
        watch.order += sorted(step, key=lambda i: size[i])
    columns = ("prompt", "chosen", "rejected")
    dataset = {f"{c}_ids": [getattr(p, c).tolist() for p in work.pairs] for c in columns}
    with tempfile.TemporaryDirectory() as output:
        arguments = {"beta": case.beta, "max_length": work.geometry["max_length"]}
        arguments |= {"precompute_ref_log_probs": True, **_arguments(case, output)}
        trainer = _trainer(Dpo, DPOConfig(**arguments), dataset, case, work, watch)
        result = _train(trainer, watch, case)
    forwards = case.batch // case.setting
    losses = torch.stack(watch.losses).view(-1, forwards).mean(1).tolist()
    extra = {"losses": losses, "digests": _digests(watch, work, "dpo", case)}
    ends = [watch.reference[0], watch.reference[-1]]
    return result | extra | durations(ends, "reference_")


def language(case: Case, folder: Path) -> dict[str, Any]:
    """SFT steps over packed rows, flattened without padding as its packing asks."""
    work, watch = read_work(folder), _watch(case)
    watch.order = [i for step in work.plan["sft"][: case.steps] for i in step]
    rows = [work.documents(i) for i in range(len(work.rows))]
    ids = [np.concatenate(row).tolist() for row in rows]
    lengths = [[len(document) for document in row] for row in rows]
    dataset = {"input_ids": ids, "labels": ids, "seq_lengths": lengths}
    with tempfile.TemporaryDirectory() as output:
        arguments = {"packing": True, "packing_strategy": "bfd", **_arguments(case, output)}
        arguments |= {"max_length": work.geometry["row_length"]}
        arguments |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = _trainer(Sft, SFTConfig(**arguments), dataset, case, work, watch)
        result = _train(trainer, watch, case)
    forwards = case.batch // case.setting
    losses = torch.stack(watch.losses).view(-1, forwards).sum(1).tolist()
    return result | {"losses": losses, "digests": _digests(watch, work, "sft", case)}


def _watch(case: Case) -> Watch:
    torch.set_num_threads(case.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    watch = Watch()
    watch.looking = case.warmup * (case.batch // case.setting)
    return watch


def _arguments(case: Case, output: str) -> dict[str, Any]:
    """Its settings; `case.options` has the last word."""
    return {
        "output_dir": output,
        "per_device_train_batch_size": case.setting,
        "gradient_accumulation_steps": case.batch // case.setting,
        "num_train_epochs": 1,  # of the sampler, which holds all steps
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **case.options,
    }


def _trainer(
    kind: Any, config: Any, dataset: dict[str, Any], case: Case, work: Work, watch: Watch
) -> Any:
    """A trainer whose adapter holds the same numbers as ours."""
    model = AutoModelForCausalLM.from_pretrained(
        work.folder / "base", dtype=torch.float32, attn_implementation="sdpa"
    )
    geometry = work.geometry
    lora = LoraConfig(
        r=geometry["r"],
        lora_alpha=geometry["alpha"],
        lora_dropout=0.0,
        target_modules=list(ADAPTER_TARGETS),
        task_type="CAUSAL_LM",
    )
    kind.watch = watch
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(dataset),
        processing_class=_tokenizer(geometry["vocab_size"]),
        peft_config=lora,
    )
    stored = load_file(work.folder / "adapter" / "adapter_model.safetensors")
    problems = set_peft_model_state_dict(trainer.model, stored)
    if problems.unexpected_keys or any("lora" in key for key in problems.missing_keys):
        raise ValueError(f"the adapter does not fit: {problems}")
    return trainer


def _train(trainer: Any, watch: Watch, case: Case) -> dict[str, Any]:
    clock = StepClock()
    trainer.add_callback(clock)
    trainer.train()
    return durations(clock.times)


def _digests(watch: Watch, work: Work, task: str, case: Case) -> list[str]:
    """Digests of what the model saw in the warm-up steps, step by step."""
    sizes = [len(work.sequences(task, step)) for step in range(case.warmup)]
    cuts = np.cumsum([0, *sizes]).tolist()
    return [digest(watch.seen[a:b]) for a, b in pairwise(cuts)]


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """The trainers ask for one; ids are ready, so only its end and padding tokens are used."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


if __name__ == "__main__":
    serve({"dpo": preference, "sft": language})
