"""Small trainings of the tiny model, and someone who watches and interrupts them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from zephyr_lite.data.layout import join_documents, pack_masked
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.evaluate.perplexity import evaluate_documents
from zephyr_lite.evaluate.preferences import pair_log_probs, preference_figures
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.policy import make_policy
from zephyr_lite.recipe import Dpo, Lora, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import LanguageModelling, Preference

DOCUMENTS = [40, 12, 33, 7, 55, 21, 18, 30]
PAIRS = [(5, 8, 6), (12, 3, 9), (1, 7, 7), (20, 10, 4), (8, 8, 8), (3, 15, 2), (9, 1, 5)]


@dataclass
class Watcher:
    """A listener that remembers, and that can send a signal or crash after a step."""

    signal_at: tuple[int, int] | None = None  # (step, signal)
    crash_at: int | None = None
    notes: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    done: int = 0

    def start(self, label: str, total: int, done: int) -> None:
        self.done = done

    def step(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.signal_at and record["step"] == self.signal_at[0]:
            os.kill(os.getpid(), self.signal_at[1])
        if record["step"] == self.crash_at:
            raise RuntimeError("the machine went away")

    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None: ...


@pytest.fixture
def sft_job(load_tiny: Callable, random_documents: Callable) -> Callable[..., Job]:
    """`sft_job(folder, watcher, dropout=, r=, tokens=, **settings)`: 7 rows, batches of 4."""

    def make(
        folder: Path,
        watcher: Watcher | None = None,
        *,
        dropout: float = 0.0,
        r: int = 4,
        tokens: int = 4096,
        loss_on: str = "all",
        **settings: Any,
    ) -> Job:
        model = add_adapter(load_tiny("none"), "sft", Lora(r=r, alpha=8, dropout=dropout), seed=3)
        policy = make_policy(model, torch.float32, torch.device("cpu"), Memory(head_rows=64))
        policy.use(["sft"], "sft")
        documents = join_documents(random_documents(DOCUMENTS))
        rows = pack_masked(documents, 40)
        held_out = join_documents(random_documents([9, 20], seed=5))
        fields = {"batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-2, **settings}
        return Job(
            label="sft",
            policy=policy,
            objective=LanguageModelling(documents, rows, loss_on, tokens),
            settings=Sft.model_validate(fields),
            folder=folder,
            seed=11,
            listener=watcher or Watcher(),
            stop=Stop(),
            evaluate=lambda: evaluate_documents(policy, held_out, 40, 4096),
        )

    return make


@pytest.fixture
def dpo_job(load_tiny: Callable, random_pairs: Callable) -> Callable[..., Job]:
    """`dpo_job(folder, watcher, dropout=, tokens=, **settings)`: 7 pairs, batches of 3."""

    def make(
        folder: Path,
        watcher: Watcher | None = None,
        *,
        dropout: float = 0.0,
        tokens: int = 4096,
        **settings: Any,
    ) -> Job:
        model = add_adapter(load_tiny("none"), "dpo", Lora(r=4, alpha=8, dropout=dropout), seed=3)
        policy = make_policy(model, torch.float32, torch.device("cpu"), Memory(head_rows=64))
        pairs = random_pairs(PAIRS)
        policy.use([])
        logps = pair_log_probs(policy, pairs, 4096)
        policy.use(["dpo"], "dpo")
        lengths = torch.tensor([(c, r) for _, c, r in PAIRS], dtype=torch.int32).numpy()
        reference = ReferenceLogProbs(*logps, lengths[:, 0], lengths[:, 1])
        fields = {"batch_size": 3, "optimizer": "adamw", "learning_rate": 1e-2, "beta": 0.1}
        chosen = Dpo.model_validate({**fields, **settings})
        names = [f"pair-{i}" for i in range(len(pairs))]

        def evaluate() -> dict[str, float]:
            return preference_figures(chosen, *pair_log_probs(policy, pairs, 4096), reference)

        return Job(
            label="dpo",
            policy=policy,
            objective=Preference(pairs, names, reference, chosen, tokens),
            settings=chosen,
            folder=folder,
            seed=11,
            listener=watcher or Watcher(),
            stop=Stop(),
            evaluate=evaluate,
        )

    return make


@pytest.fixture
def watcher() -> Callable[..., Watcher]:
    """The class of listeners."""
    return Watcher
