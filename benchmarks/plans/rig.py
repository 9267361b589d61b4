"""Trainings whose memory is both planned and measured: what tests and plan_memory.py run.

A case is a small base, adapters on it, and rows of chosen lengths. The project's own loop takes two
steps of it under `LiveBytes`; what is compared is the peak of the second, when optimizer states
exist, with the largest plan of its micro-batches. gpu/plan.py does the same with a 7B on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plans.cases import Case
from plans.live_bytes import LiveBytes, tensors_in
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Documents, Order
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.base import BaseFiles, load_base, prepare, quiet_libraries
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.plan.geometry import Geometry, geometry_of
from zephyr_lite.plan.ledger import HostParts, Parts
from zephyr_lite.plan.memory import host, peak
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import Work, work_of
from zephyr_lite.recipe import Base, Dpo, Lora, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job, Listener
from zephyr_lite.train.objectives import LanguageModelling, Objective, Preference

CPU = torch.device("cpu")
STEPS, SEED = 2, 1
# What config.json states: the tiny recipe's base, one with 21 M weights, and two of other kinds.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "mistral", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "sliding_window": None,
    },
    "21m": {
        "model_type": "mistral", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
        "num_hidden_layers": 9, "num_attention_heads": 6, "num_key_value_heads": 2,
        "sliding_window": None,
    },
    "qwen3": {
        "model_type": "qwen3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
    "qwen2": {
        "model_type": "qwen2", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """Bytes, planned and measured. What waits in host memory is the CPU's too: it is in both."""

    parts: Parts
    host: HostParts
    live: int

    @property
    def planned(self) -> int:
        """What the plan says of all tensors together."""
        return self.parts.live + self.host.total

    @property
    def error(self) -> float:
        """Relative; above 0 where the plan says too much."""
        return self.planned / self.live - 1


class Enough(Exception):
    """Raised by a listener that has seen what it came for; what would follow is a checkpoint."""


@dataclass
class _Watcher:
    """A listener that counts each of two steps on its own."""

    tracker: LiveBytes
    peaks: list[int] = field(default_factory=list)

    def start(self, label: str, total: int, done: int) -> None:
        """The first step begins."""
        self.tracker.reset()

    def step(self, record: dict[str, Any]) -> None:
        """A step ended. Raises: Enough, after the second."""
        self.peaks.append(self.tracker.peak)
        if len(self.peaks) == STEPS:
            raise Enough
        self.tracker.reset()

    def note(self, text: str) -> None:
        """What a training says is of no interest here."""

    def end(self) -> None:
        """The training is over."""


def run(case: Case, folder: Path) -> Outcome:
    """Train two steps and compare. Args: folder: where bases are kept for later cases."""
    sizes, model = geometry(case), _model(case, folder)
    memory = Memory.model_validate(memory_of(case, sizes))
    policy = make_policy(model, torch.float32, CPU, memory, self_test=False)
    names = ["frozen"] * bool(case.frozen) + ["trained"]
    policy.use(names, "trained")
    tracker = LiveBytes(tensors_in(policy))
    watcher = _Watcher(tracker)
    with tracker:
        works = trained(case, policy, watcher)
    parts, there = planned(case, sizes, setting_of(case), works)
    return Outcome(parts, there, watcher.peaks[1])


def trained(case: Case, policy: Policy, listener: Listener) -> list[Work]:
    """Train two steps, which the listener ends; micro-batches of the second.

    Raises: RuntimeError where the listener let the training go on.
    """
    objective, settings = _objective(case, policy.vocab_size)
    with TemporaryDirectory() as runs:
        job = Job(
            label=case.stage,
            policy=policy,
            objective=objective,
            settings=settings,
            folder=Path(runs),
            seed=SEED,
            listener=listener,
            stop=Stop(),
            evaluate=dict,
            masters=case.place,
        )
        try:
            job.run()
        except Enough:
            order = Order(objective.n_examples, settings.batch_size, settings.epochs, SEED)
            micros, _ = objective.step(order.step(STEPS - 1))
            return [work_of(micro.layout) for micro in micros]
    raise RuntimeError("nobody ended the training")


def planned(
    case: Case, geometry: Geometry, setting: Setting, works: list[Work]
) -> tuple[Parts, HostParts]:
    """The plan of the micro-batch of a step that takes the most, on the device and on the host."""
    cut = cut_of(case, geometry)
    plans = [(peak(geometry, setting, cut, w, first=i == 0), w) for i, w in enumerate(works)]
    parts, work = max(plans, key=lambda plan: plan[0].total)
    return parts, host(geometry, setting, cut, work)


def setting_of(case: Case, device: Literal["cpu", "cuda"] = "cpu") -> Setting:
    """The case as the plan knows it; a GPU computes in bf16."""
    return Setting(
        stage=case.stage,
        trained=case.rank,
        frozen=case.frozen,
        dropout=case.dropout,
        optimizer=case.optimizer,
        batch=len(case.rows),
        quantization=case.quantization,
        element=2 if device == "cuda" else 4,
        device=device,
    )


def cut_of(case: Case, geometry: Geometry) -> Cut:
    """How the case's work is cut."""
    keep = geometry.layers if case.keep is None else case.keep
    return Cut(case.tokens, keep, case.rest, case.place, case.head_rows)


def geometry(case: Case) -> Geometry:
    """Of the case's base."""
    return geometry_of(_config(case).to_dict(), case.size)


def _config(case: Case) -> Any:
    return AutoConfig.for_model(**SIZES[case.size], tie_word_embeddings=case.tied)


def memory_of(case: Case, geometry: Geometry) -> dict[str, Any]:
    """The recipe's `memory` fields that ask for the case's cut."""
    is_kept = case.keep is None
    return {
        "tokens_per_micro_batch": case.tokens,
        "checkpointing": "none" if is_kept else {"lean": "full", "offload": "offload"}[case.rest],
        "keep_layers": None if is_kept else case.keep,
        "head_rows": case.head_rows,
        "optimizer": case.place,
    }


def build(case: Case, folder: Path) -> tuple[Base, BaseFiles]:
    """The case's base on disk, made where it is not there yet: with random weights, quantised."""
    quiet_libraries()
    source = folder / f"{case.size}{'-tied' * case.tied}"
    if not source.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(_config(case)).save_pretrained(source)
        (source / "tokenizer.json").write_text("{}")  # asked for, never read
    base = Base.model_validate({"model": str(source), "quantization": case.quantization})
    is_plain = case.quantization == "none"
    return base, BaseFiles(source, {}) if is_plain else prepare(base, CPU)


def _model(case: Case, folder: Path) -> Any:
    """The base with its adapters."""
    base, files = build(case, folder)
    model: Any = load_base(files, base, CPU)
    rate = 0.05 if case.dropout else 0.0
    for name, rank in (("frozen", case.frozen), ("trained", case.rank)):
        if rank:
            model = add_adapter(model, name, Lora(r=rank, alpha=rank, dropout=rate), seed=1)
    return model


def _objective(case: Case, vocab: int) -> tuple[Objective, Sft | Dpo]:
    """Random rows of the case's lengths, twice over: a step is half of them, an epoch two steps."""
    rng, rows = np.random.default_rng(0), case.rows * 2
    fields = {"batch_size": len(case.rows), "optimizer": case.optimizer, "epochs": 2}
    if case.stage == "dpo":
        pairs = [
            EncodedPair(*(rng.integers(0, vocab, n).astype(np.int32) for n in row)) for row in rows
        ]
        lengths = np.array([row[1:] for row in rows], np.int32).T
        nothing = np.zeros(len(rows), np.float32)
        reference = ReferenceLogProbs(nothing, nothing, *lengths)
        dpo = Dpo.model_validate(fields)
        ids = [str(i) for i in range(len(rows))]
        return Preference(pairs, ids, reference, dpo, case.tokens), dpo
    total = sum(sum(row) for row in rows)
    ids = rng.integers(0, vocab, total).astype(np.int32)
    documents = Documents(ids, np.ones(total, bool), np.array([0, total]))
    spans = _spans(rows)
    return LanguageModelling(documents, spans, "all", case.tokens), Sft.model_validate(fields)


def _spans(rows: tuple[tuple[int, ...], ...]) -> list[list[tuple[int, int]]]:
    """Rows as the stream's spans, one document after the other."""
    found, at = [], 0
    for row in rows:
        edges = [at, *(at + int(n) for n in np.cumsum(row))]
        found.append(list(pairwise(edges)))
        at = edges[-1]
    return found
