"""Our side of cpu_vs_trl.py, as a user gets it: the project's own loop, objectives and policy.

Run by cpu_vs_trl.py, in a process of its own: CASE FOLDER OUT.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_work import Case, Work, digest, durations, now, read_work, serve

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.layout import Documents, document_layout, pair_layout
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.evaluate.preferences import pair_log_probs
from zephyr_lite.model.adapters import load_adapter
from zephyr_lite.model.base import BaseFiles, load_base
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Base, Dpo, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import LanguageModelling, Preference

CPU = torch.device("cpu")
NAME = "policy"


class StepClock:
    """A listener that notes when each step ended and its loss."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []
        self.losses: list[float] = []

    def start(self, label: str, total: int, done: int) -> None:
        """The first step begins."""
        self.times.append(now())

    def step(self, record: dict[str, Any]) -> None:
        """A step ended."""
        self.times.append(now())
        self.losses.append(record["loss"])

    def note(self, text: str) -> None:
        """Nothing is expected to be said."""
        print(text)

    def end(self) -> None:
        """The training is over."""


def load_policy(case: Case, folder: Path) -> Policy:
    """fp32 base and adapter, nothing quantised."""
    base = Base.model_validate(
        {"model": str(folder / "base"), "quantization": "none", "dtype": "float32"}
    )
    model = load_base(BaseFiles(folder / "base", {}), base, CPU)
    model = load_adapter(model, NAME, folder / "adapter")
    memory = Memory(tokens_per_micro_batch=case.setting)
    policy = make_policy(model, torch.float32, CPU, memory, engine=case.engine)
    policy.use([NAME], NAME)
    return policy


def preference(case: Case, folder: Path) -> dict[str, Any]:
    """Reference pass over all pairs, then DPO steps."""
    torch.set_num_threads(case.threads)
    work, policy = read_work(folder), load_policy(case, folder)
    pairs = [EncodedPair(p.prompt, p.chosen, p.rejected) for p in work.pairs]
    policy.use([])
    pair_log_probs(policy, pairs[: case.batch], case.setting)  # warm-up
    began = now()
    chosen_P, rejected_P = pair_log_probs(policy, pairs, case.setting)
    reference = durations([began, now()], "reference_")
    policy.use([NAME], NAME)
    lengths = np.array([(len(p.chosen), len(p.rejected)) for p in pairs], np.int32).T
    stored = ReferenceLogProbs(chosen_P, rejected_P, *lengths)
    settings = Dpo(beta=case.beta, max_length=1024, **_training(case))
    names = [str(i) for i in range(len(pairs))]
    objective = Preference(pairs, names, stored, settings, case.setting)
    result = _train(case, policy, objective, settings, work)
    seen = [
        digest(s for i in step for s in _branches(pairs[i]))
        for step in work.plan["dpo"][: case.warmup]
    ]
    return result | reference | {"digests": seen}


def language(case: Case, folder: Path) -> dict[str, Any]:
    """SFT steps over packed rows."""
    torch.set_num_threads(case.threads)
    work, policy = read_work(folder), load_policy(case, folder)
    answer = np.zeros(len(work.ids), bool)
    offsets = np.array([0, len(work.ids)])  # spans of the stream are all that is read
    objective = LanguageModelling(
        Documents(work.ids, answer, offsets), work.rows, "all", case.setting
    )
    settings = Sft(**_training(case))
    result = _train(case, policy, objective, settings, work)
    seen = []
    for step in work.plan["sft"][: case.warmup]:
        layout = document_layout([(d, answer[: len(d)]) for i in step for d in work.documents(i)])
        starts = np.flatnonzero(layout.positions_T == 0)[1:]
        seen.append(digest(np.split(layout.ids_T, starts)))
    return result | {"digests": seen}


def _training(case: Case) -> dict[str, Any]:
    return {
        "batch_size": case.batch,
        "max_steps": case.steps,
        "epochs": 1000,
        "learning_rate": case.learning_rate,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "optimizer": "adamw",
    }


def _train(
    case: Case, policy: Policy, objective: Any, settings: Sft | Dpo, work: Work
) -> dict[str, Any]:
    clock = StepClock()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(
            label=case.task,
            policy=policy,
            objective=objective,
            settings=settings,
            folder=Path(folder),
            seed=work.geometry["seed"],
            listener=clock,
            stop=Stop(),
            evaluate=dict,
        )
        job.run()
    return durations(clock.times) | {"losses": clock.losses}


def _branches(pair: EncodedPair) -> tuple[np.ndarray, np.ndarray]:
    """Both sequences of a pair, read back from the layout that the model is given."""
    ids, prompt = pair_layout([pair]).ids_T, len(pair.prompt)
    first = prompt + len(pair.chosen)
    return ids[:first], np.concatenate([ids[:prompt], ids[first:]])


if __name__ == "__main__":
    serve({"dpo": preference, "sft": language})
