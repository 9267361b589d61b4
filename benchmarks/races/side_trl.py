"""TRL's side of a race, with or without Liger's kernels: its trainers, unchanged but for what they
are given and watched by. Unsloth's side is these trainers too, patched: side_unsloth.py.

Run by race.py, in a process of its own: CASE FOLDER OUT. Options of its cases:

    batch           examples of one forward
    precompute      reference log-probs beforehand; else in every step
    sorted          pairs of one optimizer step ordered by length
    checkpointing   absent: the library's default; every_n_layers: which layers, None for all
    liger, kernels  use_liger_kernel=True; use_kernels=True
    flash           flash_attention_2 where flash-attn is installed
    config          more arguments of DPOConfig or SFTConfig; they have the last word
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.utils.data import Sampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging
from trl import (  # from here and no deeper: Unsloth puts its own in their place
    DPOConfig,  # pyright: ignore[reportPrivateImportUsage]
    DPOTrainer,  # pyright: ignore[reportPrivateImportUsage]
    SFTConfig,  # pyright: ignore[reportPrivateImportUsage]
    SFTTrainer,  # pyright: ignore[reportPrivateImportUsage]
)

from races.meter import Meter, serve
from races.model import put_adapter, set_dropout
from races.work import ADAPTER_TARGETS, Case, Work, digest, read_work

OPTIMIZERS = {"adamw": "adamw_torch_fused"}
# Model of a case and the adapter that the trainer is to attach, None where it is attached already.
Load = Callable[[Case, Work], tuple[Any, LoraConfig | None]]


class Planned(Sampler[int]):
    """The examples of all optimizer steps, one after the other."""

    def __init__(self, order: list[int]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Watch(TrainerCallback):
    """What is read from a trainer: when steps ended, losses of forwards, the ids it saw."""

    def __init__(self, case: Case, meter: Meter, order: list[int]) -> None:
        self.case, self.meter, self.order = case, meter, order
        self.losses: list[torch.Tensor] = []
        self.seen: list[np.ndarray] = []
        self.looking = case.warmup * forwards(case)  # forwards whose ids are still to be noted

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """A step begins where the last one ended; the first is without dropout."""
        if self.case.task == "sft":  # TRL's DPO has switched it off, as the recipe has
            set_dropout(others["model"], self.case.dropout if state.global_step else 0.0)
        if not self.meter.marks:
            self.meter.step()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """An optimizer step ended."""
        self.meter.step()

    def attach(self, trainer: Any) -> None:
        """Look on: order of the data, clock, and each forward's inputs and loss."""
        inner = trainer.compute_loss

        def compute_loss(model: Any, inputs: Any, *arguments: Any, **named: Any) -> Any:
            if self.looking > 0:
                self.looking -= 1
                self.seen += sequences_of(inputs)
            loss = inner(model, inputs, *arguments, **named)
            self.losses.append(loss.detach())
            return loss

        trainer.compute_loss = compute_loss
        trainer._get_train_sampler = lambda *_: Planned(self.order)
        trainer.add_callback(self)


def sequences_of(inputs: dict[str, Any]) -> list[np.ndarray]:
    """The unpadded sequences of a batch: of pairs, or of documents in a packed row."""
    ids = inputs["input_ids"].cpu().numpy().astype(np.int32)
    if "position_ids" in inputs:
        starts = np.flatnonzero(inputs["position_ids"][0].cpu().numpy() == 0)[1:]
        return np.split(ids[0], starts)
    mask = inputs["attention_mask"].cpu().numpy().astype(bool)
    return [row[kept] for row, kept in zip(ids, mask, strict=True)]


def preference(case: Case, folder: Path, meter: Meter, load: Load | None = None) -> dict[str, Any]:
    """DPO steps, and the reference pass over all pairs where it goes before them."""

    class Dpo(DPOTrainer):
        """DPOTrainer over ready token ids; its reference pass is timed behind a warm-up."""

        def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            first = self.data_collator([dataset[i] for i in range(batch_size)])
            self.compute_ref_log_probs(self.model, self._prepare_inputs(first))
            meter.reference.append(meter.moment())
            result = super()._precompute_ref_logps(dataset, name, batch_size)
            meter.reference.append(meter.moment())
            return result

    work, options = _begin(case, folder), case.options
    is_sorted = options.get("sorted", False)
    steps = range(case.steps)
    order = [i for s in steps for i in (work.by_length(s) if is_sorted else work.plan[s])]
    columns = ("prompt", "chosen", "rejected")
    dataset = {f"{c}_ids": [getattr(p, c).tolist() for p in work.pairs] for c in columns}
    with tempfile.TemporaryDirectory() as output:
        arguments = {"beta": case.beta, "max_length": 1024, **_arguments(case, output)}
        arguments |= {"precompute_ref_log_probs": options.get("precompute", False)}
        config = DPOConfig(**arguments | options.get("config", {}))
        return _train(Dpo, config, dataset, case, work, Watch(case, meter, order), load)


def language(case: Case, folder: Path, meter: Meter, load: Load | None = None) -> dict[str, Any]:
    """SFT steps over packed rows, flattened without padding as its packing asks."""
    work = _begin(case, folder)
    order = [i for step in work.plan[: case.steps] for i in step]
    dataset = {
        "input_ids": [np.concatenate(row).tolist() for row in work.rows],
        "labels": [np.concatenate(row).tolist() for row in work.rows],
        "seq_lengths": [[len(document) for document in row] for row in work.rows],
    }
    with tempfile.TemporaryDirectory() as output:
        arguments = {"packing": True, "packing_strategy": "bfd", **_arguments(case, output)}
        arguments |= {"max_length": work.sizes["row_length"]}
        arguments |= {"dataset_kwargs": {"skip_prepare_dataset": True}}
        config = SFTConfig(**arguments | case.options.get("config", {}))
        return _train(SFTTrainer, config, dataset, case, work, Watch(case, meter, order), load)


def forwards(case: Case) -> int:
    """Forwards of one optimizer step."""
    return case.batch // case.options["batch"]


def lora_of(case: Case, work: Work) -> LoraConfig:
    """The adapter that all sides train."""
    return LoraConfig(
        r=work.sizes["rank"],
        lora_alpha=work.sizes["alpha"],
        lora_dropout=case.dropout,
        target_modules=list(ADAPTER_TARGETS),
        task_type="CAUSAL_LM",
    )


def _begin(case: Case, folder: Path) -> Work:
    torch.set_num_threads(case.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return read_work(folder)


def _load(case: Case, work: Work) -> tuple[Any, LoraConfig]:
    has_flash = importlib.util.find_spec("flash_attn") is not None
    use_flash = case.options.get("flash", False) and has_flash and case.device == "cuda"
    more = {"use_kernels": True} if case.options.get("kernels") else {}
    model = AutoModelForCausalLM.from_pretrained(
        case.base,
        dtype=torch.bfloat16 if case.device == "cuda" else torch.float32,
        device_map={"": case.device},
        attn_implementation="flash_attention_2" if use_flash else "sdpa",
        **more,
    )
    return model, lora_of(case, work)


def _arguments(case: Case, output: str) -> dict[str, Any]:
    """What the race fixes, and what the options ask for; all else stays the library's default."""
    options = case.options
    arguments: dict[str, Any] = {
        "output_dir": output,
        "per_device_train_batch_size": options["batch"],
        "gradient_accumulation_steps": forwards(case),
        "num_train_epochs": 1,  # of the sampler, which holds all steps
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": OPTIMIZERS.get(case.optimizer, case.optimizer),
        "max_grad_norm": 1.0,
        "use_cpu": case.device == "cpu",
        "bf16": case.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": case.device == "cuda",
        "use_liger_kernel": options.get("liger", False),
    }
    if "checkpointing" in options:
        arguments["gradient_checkpointing"] = bool(options["checkpointing"])
    if every := options.get("every_n_layers"):
        arguments["gradient_checkpointing_kwargs"] = {"every_n_layers": every}
    return arguments


def _train(
    kind: Any, config: Any, dataset: dict[str, Any], case: Case, work: Work, watch: Watch,
    load: Load | None,
) -> dict[str, Any]:  # fmt: skip
    """Train with a trainer whose adapter holds the same numbers as ours."""
    model, lora = (load or _load)(case, work)
    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_dict(dataset),
        processing_class=_tokenizer(case.base),
        peft_config=lora,
    )
    put_adapter(trainer.model, work.folder / "adapter")
    watch.attach(trainer)
    watch.meter.loaded()
    trainer.train()
    # DPO's loss is a mean over a forward's pairs, SFT's a part of the step's.
    losses = torch.stack(watch.losses).float().view(-1, forwards(case))
    each = losses.mean(1) if case.task == "dpo" else losses.sum(1)
    return {
        "losses": each.tolist(),
        "digests": _digests(watch, work),
        "attention": getattr(trainer.model.config, "_attn_implementation", None),
        "fallbacks": getattr(trainer, "_unsloth_dpo_chunked_fallbacks", {}),
    }


def _digests(watch: Watch, work: Work) -> list[str]:
    """Digests of what the model saw in the warm-up steps, step by step."""
    sizes = [len(work.sequences(step)) for step in range(watch.case.warmup)]
    cuts = np.cumsum([0, *sizes]).tolist()
    return [digest(watch.seen[a:b]) for a, b in pairwise(cuts)]


def _tokenizer(folder: str) -> Any:
    """The checkpoint's; the trainers want to pad with it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


if __name__ == "__main__":
    serve({"dpo": preference, "sft": language})
