"""Small trainings of the tiny model, someone who interrupts them, and memory that ends."""

from __future__ import annotations

import itertools
import os
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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

# Tests say `from job_files import weights`; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

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


class Budget(TorchDispatchMode):
    """Counts the bytes of tensors made in the block, and allows `cap` of them.

    live, peak: bytes now, and at most so far. refusals: how often there was no room.
    """

    def __init__(self, cap: float = float("inf")) -> None:
        super().__init__()
        self.cap, self.live, self.peak, self.refusals = cap, 0, 0, 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_iter((args, kwargs or {})):
            self._see(given, is_new=False)
        output = func(*args, **(kwargs or {}))
        for made in tree_iter(output):
            self._see(made, is_new=True)
        if self.live > self.cap:
            self.refusals += 1
            raise torch.OutOfMemoryError(f"{self.live} bytes of {self.cap:.0f}\nsecond line")
        self.peak = max(self.peak, self.live)
        return output

    def _see(self, value: Any, *, is_new: bool) -> None:
        if not isinstance(value, torch.Tensor):
            return
        storage = value.untyped_storage()
        key, size = id(storage), storage.nbytes() if is_new else 0
        if key in self._known:
            return

        def gone(_: object) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size


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


@pytest.fixture
def allowed() -> type[Budget]:
    """`with allowed(cap) as budget:` for a block that may not have more than `cap` bytes."""
    return Budget


@pytest.fixture
def before_micro_batch() -> Callable[[Job, int, Callable[[], None]], None]:
    """`before_micro_batch(job, number, act)`: act before that one's forward, counted from 1."""

    def arrange(job: Job, number: int, act: Callable[[], None]) -> None:
        log_probs, calls = job.policy.log_probs, itertools.count(1)

        def watched(layout: Any, *, training: bool = False) -> torch.Tensor:
            if training and next(calls) == number:
                act()
            return log_probs(layout, training=training)

        job.policy.log_probs = watched

    return arrange
