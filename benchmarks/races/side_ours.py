"""Our side of a race, as a user gets it: the project's own loop, objectives and policy.

Run by race.py, in a process of its own: CASE FOLDER OUT. Options of its cases: the recipe's
`memory` section; what is `auto` in it is planned on a GPU, see plan.py.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from races.meter import Meter, serve
from races.model import put_adapter, set_dropout
from races.plan import settled
from races.work import SEED, Case, Work, digest, read_work
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import document_layout, join_documents, pair_layout
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.evaluate.preferences import pair_log_probs
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.base import BaseFiles, load_base
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Base, Dpo, Lora, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import LanguageModelling, Objective, Preference

NAME = "policy"


class Clock:
    """A listener that notes when each step ended and its loss."""

    def __init__(self, case: Case, meter: Meter, model: Any) -> None:
        self.case, self.meter, self.model = case, meter, model
        self.losses: list[float] = []

    def start(self, label: str, total: int, done: int) -> None:
        """The first step begins: without dropout, so that sides can be compared."""
        set_dropout(self.model, 0.0)
        self.meter.step()

    def step(self, record: dict[str, Any]) -> None:
        """A step ended."""
        self.meter.step()
        self.losses.append(record["loss"])
        set_dropout(self.model, self.case.dropout)

    def note(self, text: str) -> None:
        """Nothing is expected to be said."""
        print(text)

    def end(self) -> None:
        """The training is over."""


def preference(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """Reference pass over all pairs, then DPO steps."""
    torch.set_num_threads(case.threads)
    work = read_work(folder)
    pairs = [EncodedPair(p.prompt, p.chosen, p.rejected) for p in work.pairs]
    memory = settled(case, work, Memory.model_validate(case.options), pairs)
    policy = _policy(case, work, memory)
    policy.use([])
    pair_log_probs(policy, pairs[: case.batch], memory.tokens)  # warm-up
    meter.reference.append(meter.moment())
    chosen_P, rejected_P = pair_log_probs(policy, pairs, memory.tokens)
    meter.reference.append(meter.moment())
    policy.use([NAME], NAME)
    lengths = np.array([(len(p.chosen), len(p.rejected)) for p in pairs], np.int32).T
    stored = ReferenceLogProbs(chosen_P, rejected_P, *lengths)
    settings = Dpo(beta=case.beta, max_length=1024, **_training(case))
    names = [str(i) for i in range(len(pairs))]
    objective = Preference(pairs, names, stored, settings, memory.tokens)
    seen = [
        digest(s for i in step for s in _branches(pairs[i])) for step in work.plan[: case.warmup]
    ]
    return _train(case, policy, objective, settings, memory, meter) | {"digests": seen}


def language(case: Case, folder: Path, meter: Meter) -> dict[str, Any]:
    """SFT steps over packed rows, loss on every token but a document's first."""
    torch.set_num_threads(case.threads)
    work = read_work(folder)
    joined = join_documents([(ids, np.zeros(len(ids), bool)) for row in work.rows for ids in row])
    offsets = joined.offsets.tolist()
    spans = iter(pairwise(offsets))
    rows = [[next(spans) for _ in row] for row in work.rows]
    memory = settled(case, work, Memory.model_validate(case.options), rows)
    policy = _policy(case, work, memory)
    objective = LanguageModelling(joined, rows, "all", memory.tokens)
    seen = []
    for step in work.plan[: case.warmup]:
        layout = document_layout([joined.span(*s) for i in step for s in rows[i]])
        starts = np.flatnonzero(layout.positions_T == 0)[1:]
        seen.append(digest(np.split(layout.ids_T, starts)))
    settings = Sft(**_training(case))
    return _train(case, policy, objective, settings, memory, meter) | {"digests": seen}


def _policy(case: Case, work: Work, memory: Memory) -> Policy:
    """Base and adapter; fp32 and not quantised on a CPU, else as the checkpoint is."""
    device, base = torch.device(case.device), Path(case.base)
    settings = Base(model=case.base)  # pyright: ignore[reportCallIssue] - the rest has defaults
    model = load_base(BaseFiles(base, {}), settings, device)
    lora = Lora(r=work.sizes["rank"], alpha=work.sizes["alpha"], dropout=case.dropout)
    model = add_adapter(model, NAME, lora, work.sizes["seed"])
    put_adapter(model, work.folder / "adapter", NAME)
    dtype = torch.bfloat16 if case.device == "cuda" else torch.float32
    policy = make_policy(model, dtype, device, memory, engine=case.engine or "native")
    policy.use([NAME], NAME)
    return policy


def _training(case: Case) -> dict[str, Any]:
    return {
        "batch_size": case.batch,
        "max_steps": case.steps,
        "epochs": 1000,
        "learning_rate": case.learning_rate,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "checkpoint_minutes": 1e6,
        "optimizer": case.optimizer,
    }


def _train(
    case: Case, policy: Policy, objective: Objective, settings: Sft | Dpo, memory: Memory,
    meter: Meter,
) -> dict[str, Any]:  # fmt: skip
    meter.loaded()
    clock = Clock(case, meter, policy.model)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            case.task, policy, objective, settings, Path(folder), SEED, clock, Stop(), dict,
            masters=memory.place,
        )  # fmt: skip
        job.run()
    return {
        "losses": clock.losses,
        "attention": policy.attention,
        "planned": memory.model_dump(mode="json"),
        "notches": job.notches,
    }


def _branches(pair: EncodedPair) -> tuple[np.ndarray, np.ndarray]:
    """Both sequences of a pair, read back from the layout that the model is given."""
    ids, prompt = pair_layout([pair]).ids_T, len(pair.prompt)
    first = prompt + len(pair.chosen)
    return ids[:first], np.concatenate([ids[:prompt], ids[first:]])


if __name__ == "__main__":
    serve({"dpo": preference, "sft": language})
