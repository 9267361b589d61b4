"""dSFT by Unsloth, in a process and an environment of its own; `unsloth_process` starts it.

    in    FOLDER/settings.json   ids.npy answer.npy spans.npy micro_batches.npy steps.npy rates.npy
    out   stdout, a JSON object a line: start, step, note, diverged, stopped, done
          FOLDER/step-0000012.safetensors, from which it goes on; FOLDER/adapter_model.safetensors

Nothing of zephyr-lite is installed where it runs, so it imports none of it: what it trains on, in
which micro-batches and at which learning rate was decided by who started it. It knows Unsloth by
one function, `load`; all else takes any PEFT model with transformers' signature.

Shapes: T tokens of a micro-batch, S spans of documents in it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

IGNORED = -100
GIB = 1 << 30
WEIGHTS = "adapter_model.safetensors"
# A later document's loss with another document before it: the same numbers, but for a leak.
LEAK = 1e-5
Emit = Callable[..., None]
Parameters = dict[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Rows:
    """Tokens, and which spans of them each micro-batch of each step holds."""

    ids: np.ndarray  # int32
    answer: np.ndarray  # bool, whether a token is part of an answer
    spans: np.ndarray  # int64 [n, 2]: start and stop
    micro_batches: np.ndarray  # int64: micro-batch i has spans [i] to [i + 1]
    steps: np.ndarray  # int64: step i has micro-batches [i] to [i + 1]
    rates: np.ndarray  # float64: learning rate of each step

    @classmethod
    def read(cls, folder: Path) -> Rows:
        """The arrays that lie in a folder, mapped."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names})

    def step(self, step: int) -> Iterator[np.ndarray]:
        """The spans of each micro-batch of an optimizer step."""
        for micro in range(self.steps[step], self.steps[step + 1]):
            yield self.spans[self.micro_batches[micro] : self.micro_batches[micro + 1]]


@dataclass(frozen=True)
class Batch:
    """One micro-batch as transformers takes it: a row of documents, positions restarting."""

    ids_T: np.ndarray
    positions_T: np.ndarray
    labels_T: np.ndarray
    lengths_S: np.ndarray

    @property
    def n_scored(self) -> int:
        """Tokens that carry loss."""
        return int((self.labels_T != IGNORED).sum())


def collate(rows: Rows, spans: np.ndarray, loss_on: str) -> Batch:
    """Lay spans of documents end to end; a document's first token is predicted by nothing."""
    ids_T = np.concatenate([rows.ids[a:b] for a, b in spans]).astype(np.int64)
    answer_T = np.concatenate([rows.answer[a:b] for a, b in spans])
    lengths_S = (spans[:, 1] - spans[:, 0]).astype(np.int32)
    labels_T = np.where(answer_T, ids_T, IGNORED) if loss_on == "assistant" else ids_T.copy()
    labels_T[np.cumsum(lengths_S) - lengths_S] = IGNORED
    return Batch(ids_T, np.concatenate([np.arange(n) for n in lengths_S]), labels_T, lengths_S)


def loss_of(model: Any, batch: Batch, divisor: int, settings: dict[str, Any]) -> torch.Tensor:
    """Sum of a micro-batch's loss over `divisor`."""
    device = next(p.device for p in model.parameters() if p.requires_grad)

    def row(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(device)[None]

    dtype = getattr(torch, settings["dtype"])
    autocast: AbstractContextManager[Any] = nullcontext()
    if dtype != torch.float32:
        autocast = torch.autocast(device.type, dtype=dtype)
    with autocast:
        return model(
            input_ids=row(batch.ids_T),
            position_ids=row(batch.positions_T),
            labels=row(batch.labels_T),
            packed_seq_lengths=torch.from_numpy(batch.lengths_S).to(device),
            num_items_in_batch=torch.tensor(divisor, device=device),
            use_cache=False,
        ).loss


def check_packing(model: Any, settings: dict[str, Any]) -> None:
    """Raise RuntimeError when a document sees the one before it in its row."""
    n = 24
    rng = np.random.default_rng(0)
    first, other, second = (rng.integers(3, settings["vocab_size"], n) for _ in range(3))
    labels_T = np.concatenate([np.full(n + 1, IGNORED), second[1:]])
    losses = []
    for before in (first, other):
        positions_T = np.tile(np.arange(n), 2)
        ids_T = np.concatenate([before, second])
        batch = Batch(ids_T, positions_T, labels_T, np.full(2, n, np.int32))
        torch.manual_seed(0)  # the same dropout in both
        losses.append(loss_of(model, batch, batch.n_scored, settings).item())
    if not abs(losses[0] - losses[1]) <= LEAK * abs(losses[0]):
        raise RuntimeError(f"packed documents are not kept apart: losses {losses}")


def trainable(model: Any) -> Parameters:
    """PEFT's file key -> parameter of all that trains. Raises: RuntimeError if not fp32 LoRA."""
    found = {n.replace(".default.", "."): p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        if ".lora_" not in name or parameter.dtype != torch.float32:
            raise RuntimeError(f"{name} trains, in {parameter.dtype}; expected LoRA in float32")
    return found


def make_optimizer(settings: dict[str, Any], parameters: Parameters) -> torch.optim.Optimizer:
    """AdamW in the recipe's format."""
    options: dict[str, Any] = {"lr": 0.0, "weight_decay": settings["weight_decay"]}
    values = list(parameters.values())
    if settings["optimizer"] == "adamw":
        return torch.optim.AdamW(values, fused=True, **options)
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

    kinds = {
        "adamw_8bit": AdamW8bit,
        "paged_adamw_8bit": PagedAdamW8bit,
        "paged_adamw_32bit": PagedAdamW32bit,
    }
    return kinds[settings["optimizer"]](values, **options)


@dataclass
class Checkpoints:
    """Weights and optimizer state after a step: one file each, put in its place by a rename.

    seconds: spent in steps, those before a resumption included.
    """

    folder: Path
    keep: int
    parameters: Parameters
    optimizer: torch.optim.Optimizer
    seconds: float = 0.0

    def save(self, step: int) -> None:
        """Write the state after `step` steps; remove the oldest."""
        tensors = {f"weight/{n}": p.detach().cpu() for n, p in self.parameters.items()}
        tensors |= self._state() | {"seconds": torch.tensor(self.seconds, dtype=torch.float64)}
        write_tensors(tensors, self.folder / f"step-{step:07d}.safetensors")
        for old in self._all()[: -self.keep]:
            old.unlink()

    def restore(self, emit: Emit) -> int:
        """Load the newest file that is whole; the steps that it has seen."""
        for path in reversed(self._all()):
            try:
                tensors = load_file(path)
            except SafetensorError as error:
                emit("note", text=f"unsloth: checkpoint {path.name} is damaged: {error}")
                path.unlink()
                continue
            self.seconds = tensors.pop("seconds").item()
            self._load(tensors)
            return int(path.stem.removeprefix("step-"))
        return 0

    def _state(self) -> dict[str, torch.Tensor]:
        return {
            f"{key}/{name}": torch.as_tensor(value).detach().cpu().contiguous().clone()
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _load(self, tensors: dict[str, torch.Tensor]) -> None:
        for index, (name, parameter) in enumerate(self.parameters.items()):
            found = {k.split("/", 1)[0]: t for k, t in tensors.items() if k.endswith("/" + name)}
            with torch.no_grad():
                parameter.copy_(found.pop("weight"))
            lay_out = getattr(self.optimizer, "init_state", None)
            if lay_out and found:  # bitsandbytes' buffers; paged ones are no plain tensors
                lay_out(self.optimizer.param_groups[0], parameter, 0, index)
            state = self.optimizer.state[parameter]
            for key, tensor in found.items():
                if torch.is_tensor(state.get(key)):
                    state[key].copy_(tensor)
                else:
                    is_number = lay_out and tensor.ndim == 0
                    state[key] = tensor.item() if is_number else tensor.to(parameter.device)

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Replace a safetensors file, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    with part.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(part, path)


class Signals:
    """Whether SIGTERM came; it then ends at the next step, whose state is saved."""

    def __init__(self) -> None:
        self.requested = False

    def install(self) -> None:
        """From here on SIGTERM no longer kills."""
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: object) -> None:
        self.requested = True


def train(
    model: Any, rows: Rows, settings: dict[str, Any], folder: Path, emit: Emit, signals: Signals
) -> bool:
    """Train from the newest checkpoint to the end; whether the end was reached."""
    parameters = trainable(model)
    optimizer = make_optimizer(settings, parameters)
    checkpoints = Checkpoints(folder, settings["checkpoint_keep"], parameters, optimizer)
    done, total = checkpoints.restore(emit), len(rows.rates)
    emit("start", step=done, seconds=checkpoints.seconds)
    last_save = time.monotonic()
    for step in range(done, total):
        record = train_step(model, rows, step, settings, parameters, optimizer)
        if not np.isfinite([record["loss"], record["grad_norm"]]).all():
            emit("diverged", step=step + 1, is_loss=not np.isfinite(record["loss"]))
            return False
        checkpoints.seconds += record["seconds"]
        # Said before it is saved: who is orphaned dies here, and leaves the folder to its heir.
        emit("step", **record)
        every = settings["checkpoint_every"]
        due = time.monotonic() - last_save > 60 * settings["checkpoint_minutes"]
        is_last = step + 1 == total
        if due or is_last or signals.requested or (every and (step + 1) % every == 0):
            checkpoints.save(step + 1)
            last_save = time.monotonic()
        if signals.requested and not is_last:
            emit("stopped", step=step + 1)
            return False
    write_tensors({n: p.detach().cpu() for n, p in parameters.items()}, folder / WEIGHTS)
    return True


def train_step(
    model: Any,
    rows: Rows,
    step: int,
    settings: dict[str, Any],
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
) -> dict[str, float]:
    """One optimizer step; no update is applied where loss or gradient is not finite."""
    began = time.monotonic()
    batches = [collate(rows, spans, settings["loss_on"]) for spans in rows.step(step)]
    divisor = max(1, sum(batch.n_scored for batch in batches))
    total = 0.0
    for micro, batch in enumerate(batches):
        torch.manual_seed(_mix(settings["seed"], step, micro))
        loss = loss_of(model, batch, divisor, settings)
        loss.backward()
        total += loss.item()
    for group in optimizer.param_groups:
        group["lr"] = float(rows.rates[step])
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings["max_grad_norm"]).item()
    if np.isfinite([total, norm]).all():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {
        "step": step + 1,
        "loss": total,
        "grad_norm": norm,
        "tokens": sum(len(batch.ids_T) for batch in batches),
        "seconds": time.monotonic() - began,
        "peak_memory_gib": _peak_gib(),
    }


def load(settings: dict[str, Any]) -> Any:
    """The base with a fresh adapter, by Unsloth. Raises: RuntimeError if it changed the base."""
    from unsloth import FastLanguageModel  # pyright: ignore[reportMissingImports]

    lora = settings["lora"]
    model, _ = FastLanguageModel.from_pretrained(
        model_name=settings["model"],
        max_seq_length=settings["max_length"],
        dtype=getattr(torch, settings["dtype"]),
        load_in_4bit=settings["load_in_4bit"],
        use_gradient_checkpointing=settings["checkpointing"],
        fix_tokenizer=False,
        use_exact_model_name=True,
    )
    if model.get_input_embeddings().num_embeddings != settings["vocab_size"]:
        raise RuntimeError(
            "Unsloth added tokens to the base, whose head would no longer be its own"
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        bias="none",
        use_gradient_checkpointing=settings["checkpointing"],
        random_state=settings["seed"],
        max_seq_length=settings["max_length"],
    )


def main(folder: Path) -> None:
    """Load, train, report."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Unsloth prints goes with the log

    def emit(event: str, **fields: Any) -> None:
        channel.write(json.dumps({"event": event, **fields}) + "\n")

    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    rows, signals = Rows.read(folder), Signals()
    model = load(settings)
    check_packing(model, settings)
    signals.install()
    if train(model, rows, settings, folder, emit, signals):
        emit("done")


def _mix(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed from a position, as the loop of zephyr-lite has it."""
    state = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def _peak_gib() -> float:
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / GIB, 3)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
