"""SFT beside TRL's SFTTrainer: 20 steps from the same weights over the same tokens.

Documents one by one, where TRL pads and we do not, and packed rows, where both keep documents
apart; loss on every token and on answers only. TRL packs with its own packer and we train on the
rows it made, so that a step is the same step; that our packer does as well is a test of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zephyr_lite.data.dialogues import load_dialogues
from zephyr_lite.data.encoded import EncodedDialogue
from zephyr_lite.data.layout import (
    Documents,
    Layout,
    Order,
    Row,
    document_layout,
    join_documents,
    pack_masked,
    pack_wrapped,
)
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.policy import make_policy
from zephyr_lite.recipe import Lora, Memory, Sft, Source
from zephyr_lite.stopping import Stop
from zephyr_lite.train import objectives
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import LanguageModelling

STEPS, DIALOGUES, SEED, LONGEST, LORA = 20, 60, 7, 128, Lora(r=8, alpha=16)
FIGURES = ("loss", "learning_rate", "grad_norm")
COMMON: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 20,
    "max_steps": STEPS,
    "optimizer": "adamw",
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "warmup_ratio": 0.1,
}


@dataclass(frozen=True)
class Case:
    """One training on both sides; `batch`: TRL's rows of a forward and forwards of a step."""

    name: str
    batch: tuple[int, int] = (4, 1)
    packing: str | None = None  # in TRL's words: bfd or wrapped
    ours: dict[str, Any] = field(default_factory=dict)
    tokens: int = 4096

    @property
    def settings(self) -> Sft:
        return Sft.model_validate({**COMMON, "max_length": LONGEST, **self.ours})


ANSWERS = {"loss_on": "assistant"}
PACKED = Case("packed", packing="bfd")
CASES = [
    Case("one by one", tokens=64),
    Case("one by one, answers, accumulated", (2, 2), ours=ANSWERS),
    PACKED,
    Case("packed, accumulated, linear", (1, 4), "bfd", {"schedule": "linear"}, tokens=200),
    Case("packed, answers", (2, 2), "bfd", ANSWERS),
    Case("wrapped", (2, 2), "wrapped"),
]


@pytest.fixture(scope="session")
def dialogues(root: Path, tiny_ground: Any) -> list[EncodedDialogue]:
    """Ids and answer masks of the package's dialogues; as many as make a few packed rows."""
    path = root / "zephyr_lite" / "tiny" / "data" / "dialogues.train.jsonl"
    found, _ = load_dialogues((Source(path=str(path), limit=DIALOGUES),))
    encoded = tiny_ground.tokenizer.encode_dialogues([d.messages for d in found])
    assert len(encoded) == DIALOGUES and all(len(e.ids) <= LONGEST for e in encoded)
    return encoded


@pytest.fixture(scope="session")
def their_trainer(
    trl: Any,
    tiny_ground: Any,
    dialogues: list[EncodedDialogue],
    rival_settings: Callable,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Case], Any]:
    """`their_trainer(case)`: an SFTTrainer that has prepared its rows, in its own order."""

    def make(case: Case) -> Any:
        from datasets import Dataset
        from peft import LoraConfig

        folder = tmp_path_factory.mktemp("theirs")
        answers = case.settings.loss_on == "assistant"
        columns = {"input_ids": [e.ids.tolist() for e in dialogues]}
        if answers:
            columns["assistant_masks"] = [e.assistant.astype(int).tolist() for e in dialogues]
        args = trl.SFTConfig(
            **rival_settings(case.settings, folder, case.batch),
            max_length=LONGEST,
            packing=case.packing is not None,
            packing_strategy=case.packing or "bfd",
            max_steps=STEPS,
        )
        targets = list(LORA.targets)
        return trl.SFTTrainer(
            model=tiny_ground.rival_model(),
            args=args,
            train_dataset=Dataset.from_dict(columns),
            processing_class=tiny_ground.rival_tokenizer(),
            peft_config=LoraConfig(
                r=LORA.r, lora_alpha=int(LORA.alpha), target_modules=targets, task_type="CAUSAL_LM"
            ),
        )

    return make


def rows_of(trainer: Any, documents: Documents) -> list[Row]:
    """TRL's rows as spans of our stream. Equal documents are the same wherever they stand."""
    if trainer.args.packing and trainer.args.packing_strategy == "wrapped":
        rows = pack_wrapped(documents, LONGEST)[: len(trainer.train_dataset)]
        for theirs, ((start, stop),) in zip(trainer.train_dataset, rows, strict=True):
            assert theirs["input_ids"] == documents.ids[start:stop].tolist()
        return rows
    starts: dict[bytes, int] = {}
    for first, last in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        starts.setdefault(documents.ids[first:last].tobytes(), int(first))
    rows = []
    for packed in trainer.train_dataset:
        ids = np.array(packed["input_ids"], np.int32)
        ends = np.cumsum(packed.get("seq_lengths") or [len(ids)])
        pieces = np.split(ids, ends[:-1])
        rows.append([(starts[p.tobytes()], starts[p.tobytes()] + len(p)) for p in pieces])
    return rows


@pytest.fixture(scope="session")
def our_sft(
    tiny_ground: Any, trace: Any, adapter_weights: Callable, tmp_path_factory: Any
) -> Callable[..., tuple[Any, dict[str, torch.Tensor]]]:
    """`our_sft(case, documents, rows)`: (trace, the adapter before the first step)."""

    def run(
        case: Case, documents: Documents, rows: list[Row]
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        model = add_adapter(tiny_ground.model(), "sft", LORA, seed=3)
        policy = make_policy(model, torch.float32, torch.device("cpu"), Memory())
        policy.use(["sft"], "sft")
        weights = adapter_weights(model, "sft")
        initial = {n: p.detach().clone() for n, p in weights.items()}
        listener = trace()
        Job(
            label="sft",
            policy=policy,
            objective=LanguageModelling(documents, rows, case.settings.loss_on, case.tokens),
            settings=case.settings,
            folder=tmp_path_factory.mktemp("ours"),
            seed=SEED,
            listener=listener,
            stop=Stop(),
            evaluate=lambda: {},
        ).run()
        listener.weights = {n: p.detach().clone() for n, p in weights.items()}
        return listener, initial

    return run


def in_our_order(trainer: Any, settings: Sft) -> None:
    """Hand TRL the rows of all steps in the order that our loop takes them in."""
    order = Order(len(trainer.train_dataset), settings.batch_size, settings.epochs, SEED, STEPS)
    taken = [order.step(step) for step in range(STEPS)]
    assert all(len(rows) == settings.batch_size for rows in taken)
    trainer.train_dataset = trainer.train_dataset.select([i for rows in taken for i in rows])


def drop_what_is_left_over(trainer: Any, batch_size: int) -> None:
    """The last step of an epoch would hold fewer rows, which TRL cannot be told."""
    whole = len(trainer.train_dataset) // batch_size * batch_size
    trainer.train_dataset = trainer.train_dataset.select(range(whole))


@pytest.fixture
def both(
    their_trainer: Callable,
    our_sft: Callable,
    dialogues: list[EncodedDialogue],
    start_alike: Callable,
    rival_trace: Callable,
) -> Callable[..., tuple[Any, Any]]:
    """`both(case, mistaken)`: our trace and TRL's; `mistaken` is what we train on instead."""

    def run(case: Case, mistaken: Case | None = None) -> tuple[Any, Any]:
        documents = join_documents(dialogues)
        trainer = their_trainer(case)
        drop_what_is_left_over(trainer, case.settings.batch_size)
        rows = rows_of(trainer, documents)
        assert (max(map(len, rows)) > 1) == (case.packing == "bfd")
        ours, initial = our_sft(mistaken or case, documents, rows)
        start_alike(trainer, initial)
        in_our_order(trainer, case.settings)
        return ours, rival_trace(trainer)

    return run


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_step_equals_trl(case, both, alike) -> None:
    ours, theirs = both(case)
    alike(ours, theirs, FIGURES)
    losses = [r["loss"] for r in theirs.records]
    assert losses[-1] < 0.9 * losses[0], "hardly anything was trained"
    norms = [r["grad_norm"] for r in theirs.records]
    assert max(norms) > case.settings.max_grad_norm, "clipping was not part of the comparison"


def leaking_layout(documents: Any, loss_on: str) -> Layout:
    """Each packed document after the first sees the last token of the one before it."""
    layout = document_layout(documents, loss_on)
    behind = layout.q_start_S > 0
    return replace(layout, c_start_S=layout.q_start_S - behind, c_len_S=behind.astype(np.int64))


@pytest.mark.parametrize("mistake", ["weight decay", "leak"])
def test_a_mistake_would_be_seen(mistake, both, alike, monkeypatch) -> None:
    """No decay; one token of the neighbour in sight, which the engine's self-test cannot know."""
    wrong = replace(PACKED, ours={"weight_decay": 0.0}) if mistake == "weight decay" else None
    if mistake == "leak":
        monkeypatch.setattr(objectives, "document_layout", leaking_layout)
    ours, theirs = both(PACKED, wrong)
    with pytest.raises(AssertionError, match="further apart"):
        alike(ours, theirs, FIGURES)


def test_our_packer_needs_no_more_rows_than_trl_s(their_trainer, dialogues) -> None:
    """Both are best-fit decreasing; equal lengths may go to other rows."""
    documents = join_documents(dialogues)
    ours, theirs = pack_masked(documents, LONGEST), rows_of(their_trainer(PACKED), documents)
    filled = [sorted(sum(b - a for a, b in row) for row in rows) for rows in (ours, theirs)]
    assert filled[0] == filled[1]
