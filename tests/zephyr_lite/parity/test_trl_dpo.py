"""DPO beside TRL's DPOTrainer: 20 steps from the same weights over the same tokens.

TRL lays out every branch with its own prompt and pads; we share the prompt and pad nothing. What
is trained must be the same all the same: loss, rewards, log-probs and gradient norm of each step,
and the adapter at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zephyr_lite.data.chat import render
from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.data.feedback import PreferencePair, load_pairs
from zephyr_lite.data.layout import Layout, Order, pair_layout
from zephyr_lite.data.reference_cache import ReferenceLogProbs
from zephyr_lite.evaluate.preferences import pair_log_probs
from zephyr_lite.model.adapters import add_adapter, load_adapter
from zephyr_lite.model.policy import make_policy
from zephyr_lite.recipe import Dpo, Lora, Memory, Source
from zephyr_lite.stopping import Stop
from zephyr_lite.train import objectives
from zephyr_lite.train.loop import Job
from zephyr_lite.train.objectives import Preference

PAIRS, SEED, LONGEST = 16, 11, 128
FIGURES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
# The adapter of rank 8 is clipped at most steps; the rates move a log-prob by several nats.
COMMON: dict[str, Any] = {
    "batch_size": 4,
    "epochs": 5,
    "optimizer": "adamw",
    "learning_rate": 4e-3,
    "weight_decay": 0.05,
    "max_grad_norm": 0.5,
    "warmup_ratio": 0.1,
    "beta": 0.1,
}


@dataclass(frozen=True)
class Case:
    """One training on both sides.

    batch: TRL's rows of a forward and forwards of a step. start: `fresh` over the base, `continue`
    the SFT adapter, `stacked` over the SFT adapter, which TRL's users merge into the base first.
    theirs: what TRL calls the loss. tokens: our budget of a micro-batch.
    """

    name: str
    batch: tuple[int, int] = (4, 1)
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    precompute: bool = False
    start: str = "fresh"
    ground: str = "tiny_ground"
    tokens: int = 4096

    @property
    def settings(self) -> Dpo:
        return Dpo.model_validate({**COMMON, **self.ours})


PLAIN = Case("sigmoid")
ROBUST = {"loss": "robust", "label_smoothing": 0.1, "beta": 0.05}
# TRL's head on a CPU makes a tile of logits for every position, prompts included: few steps.
MISTRAL = {"max_steps": 6, "batch_size": 2, "learning_rate": 2e-2}
CASES = [
    PLAIN,
    Case("sigmoid accumulated", (2, 2), precompute=True, tokens=64),
    Case("sigmoid one by one", (1, 4), {"schedule": "linear", "warmup_ratio": 0.25}),
    Case("sigmoid constant rate", (4, 1), {"schedule": "constant"}, precompute=True),
    Case("mistral", (2, 1), MISTRAL, precompute=True, ground="mistral_ground"),
    Case("continue", start="continue"),
    Case("continue precomputed", (2, 2), start="continue", precompute=True),
    Case("stacked", start="stacked", precompute=True),
    Case("ipo", (2, 2), {"loss": "ipo"}),
    Case("hinge", (4, 1), {"loss": "hinge", "beta": 0.2}, precompute=True),
    Case("robust", (4, 1), ROBUST, {"label_smoothing": 0.1}),
    # TRL means the NLL over the tokens of a forward, we over an answer and then over the step's
    # answers (each pair counts the same however it is cut): one pair a forward is both.
    Case("sft", (1, 4), {"loss": "sft"}),
    Case(
        "sigmoid + sft",
        (1, 4),
        {"sft_weight": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    ),
    # TRL's sigmoid has no label smoothing any more; its `aot` sorts the pairs of a forward and then
    # is cDPO, so with one pair a forward the two are the same formula.
    Case(
        "sigmoid, smoothed",
        (1, 4),
        {"label_smoothing": 0.2},
        {"loss_type": ["aot"], "label_smoothing": 0.2},
    ),
]


@dataclass(frozen=True)
class Pairs:
    """The rows of a test as text for TRL and as ids for us."""

    rows: list[PreferencePair]
    encoded: list[EncodedPair]


@pytest.fixture(scope="session")
def pairs_of(root: Path, request: pytest.FixtureRequest) -> Callable[[str], Pairs]:
    """`pairs_of("tiny_ground")`: the package's feedback; real feedback for Mistral's tokenizer."""

    def read(ground: str) -> Pairs:
        tokenizer = request.getfixturevalue(ground).tokenizer
        if ground == "tiny_ground":
            path = root / "zephyr_lite" / "tiny" / "data" / "feedback.train.jsonl"
        else:
            path = request.getfixturevalue("shared_data") / "aif" / "ultrafeedback_pairs.jsonl"
        found, _ = load_pairs((Source(path=str(path), limit=300),), seed=0, on_fault="drop")
        texts = [(p.prompt, p.chosen, p.rejected) for p in found]
        encoded = tokenizer.encode_pairs(texts, max_length=1 << 20, max_prompt_length=1 << 19)
        fits = [i for i, pair in enumerate(encoded) if _longest(pair) <= LONGEST][:PAIRS]
        assert len(fits) == PAIRS
        return Pairs([found[i] for i in fits], [encoded[i] for i in fits])

    return read


def _longest(pair: EncodedPair) -> int:
    return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))


@pytest.fixture(scope="session")
def our_dpo(
    pairs_of: Callable,
    trace: Any,
    adapter_weights: Callable,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Case], tuple[Any, dict[str, torch.Tensor]]]:
    """`our_dpo(case)`: (trace, the adapter's tensors before the first step)."""

    def run(case: Case) -> tuple[Any, dict[str, torch.Tensor]]:
        ground = request.getfixturevalue(case.ground)
        model, frozen, saved = _adapters(ground, case.start)
        policy = make_policy(model, torch.float32, torch.device("cpu"), Memory())
        initial = {n: p.detach().clone() for n, p in adapter_weights(model, "dpo").items()}
        pairs = pairs_of(case.ground).encoded
        policy.use(frozen)
        logps = pair_log_probs(policy, pairs, case.tokens)
        policy.use(saved, "dpo")
        lengths = torch.tensor([(len(p.chosen), len(p.rejected)) for p in pairs]).int().numpy()
        reference = ReferenceLogProbs(*logps, lengths[:, 0], lengths[:, 1])
        names = [f"pair-{i}" for i in range(len(pairs))]
        listener = trace()
        Job(
            label="dpo",
            policy=policy,
            objective=Preference(pairs, names, reference, case.settings, case.tokens),
            settings=case.settings,
            folder=tmp_path_factory.mktemp("ours"),
            seed=SEED,
            listener=listener,
            stop=Stop(),
            evaluate=lambda: {},
        ).run()
        weights = adapter_weights(model, "dpo")
        listener.weights = {n: p.detach().clone() for n, p in weights.items()}
        return listener, initial

    return run


def _adapters(ground: Any, start: str) -> tuple[Any, list[str], list[str]]:
    """Our model, the adapters of the reference, those of the policy."""
    lora = Lora(r=8, alpha=16)
    if start == "fresh":
        return add_adapter(ground.model(), "dpo", lora, seed=3), [], ["dpo"]
    model = load_adapter(ground.model(), "sft", ground.sft_adapter)
    if start == "continue":
        return load_adapter(model, "dpo", ground.sft_adapter), ["sft"], ["dpo"]
    return add_adapter(model, "dpo", lora, seed=3), ["sft"], ["sft", "dpo"]


@pytest.fixture(scope="session")
def their_dpo(
    trl: Any,
    pairs_of: Callable,
    rival_settings: Callable,
    start_alike: Callable,
    rival_trace: Callable,
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Case, dict[str, torch.Tensor]], Any]:
    """`their_dpo(case, initial)`: the trace of TRL's training of the same case, made once."""
    done: dict[str, Any] = {}

    def once(case: Case, initial: dict[str, torch.Tensor]) -> Any:
        if case.name not in done:
            done[case.name] = run(case, initial)
        return done[case.name]

    def run(case: Case, initial: dict[str, torch.Tensor]) -> Any:
        ground, ours = request.getfixturevalue(case.ground), case.settings
        folder = tmp_path_factory.mktemp("theirs")
        fields = {
            **rival_settings(ours, folder, case.batch),
            "beta": ours.beta,
            "loss_type": [ours.loss],
            "max_length": None,
            "precompute_ref_log_probs": case.precompute,
            **case.theirs,
        }
        model, peft_config = _rival_model(ground, case.start)
        trainer = trl.DPOTrainer(
            model=model,
            args=trl.DPOConfig(**fields),
            train_dataset=_rival_rows(pairs_of(case.ground), ours),
            processing_class=ground.rival_tokenizer(),
            peft_config=peft_config,
        )
        _same_ids(trainer, pairs_of(case.ground), ours)
        start_alike(trainer, initial)
        return rival_trace(trainer)

    return once


def _rival_model(ground: Any, start: str) -> tuple[Any, Any]:
    """The model and PEFT config that a user of TRL hands over."""
    from peft import LoraConfig, PeftModel

    model = ground.rival_model()
    targets = list(Lora().targets)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    if start == "fresh":
        return model, config
    model = PeftModel.from_pretrained(model, ground.sft_adapter, is_trainable=start == "continue")
    return (model, None) if start == "continue" else (model.merge_and_unload(), config)


def _rows_in_order(settings: Dpo) -> list[int]:
    order = Order(PAIRS, settings.batch_size, settings.epochs, SEED, settings.max_steps)
    return [row for step in range(order.total_steps) for row in order.step(step)]


def _rival_rows(pairs: Pairs, settings: Dpo) -> Any:
    """TRL's standard text columns; it adds `</s>` to the answers and tokenises itself."""
    from datasets import Dataset

    rows = [pairs.rows[i] for i in _rows_in_order(settings)]
    return Dataset.from_list(
        [
            {"prompt": render(r.prompt, True), "chosen": r.chosen, "rejected": r.rejected}
            for r in rows
        ]
    )


def _same_ids(trainer: Any, pairs: Pairs, settings: Dpo) -> None:
    """TRL found the ids that we have: else nothing below would be a comparison."""
    order = _rows_in_order(settings)
    assert len(trainer.train_dataset) == len(order)
    for row, index in zip(trainer.train_dataset, order, strict=True):
        ours = pairs.encoded[index]
        for column in ("prompt", "chosen", "rejected"):
            assert row[f"{column}_ids"] == getattr(ours, column).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_step_equals_trl(case, our_dpo, their_dpo, alike) -> None:
    ours, initial = our_dpo(case)
    theirs = their_dpo(case, initial)
    alike(ours, theirs, FIGURES)
    # Before the first update all rewards are 0 but for rounding, and who wins is chance.
    moved = next(i for i, r in enumerate(theirs.records) if r["learning_rate"] > 0) + 1
    for mine, his in zip(ours.records[moved:], theirs.records[moved:], strict=True):
        assert mine["rewards/accuracies"] == pytest.approx(his["rewards/accuracies"])
    norms = [r["grad_norm"] for r in theirs.records]
    assert max(norms) > case.settings.max_grad_norm, "clipping was not part of the comparison"
    margins = [r["rewards/margins"] for r in theirs.records]
    assert max(map(abs, margins)) > 0.02, "hardly anything was trained"


def positions_run_on(pairs: list[EncodedPair]) -> Layout:
    """The rejected answer stands behind the chosen one instead of behind the prompt.

    That whole pairs stand further back is no matter: rotary positions are relative.
    """
    layout = pair_layout(pairs)
    return replace(layout, positions_T=np.arange(layout.n_tokens))


def leaking_layout(pairs: list[EncodedPair]) -> Layout:
    """The rejected answer sees the first token of the chosen one and not the prompt's first."""
    layout = pair_layout(pairs)
    return replace(layout, c_start_S=layout.c_start_S + (layout.c_len_S > 0))


@pytest.mark.parametrize("mistake", ["beta", "weight decay", positions_run_on, leaking_layout])
def test_a_mistake_would_be_seen(mistake, our_dpo, their_dpo, alike, monkeypatch) -> None:
    """A beta that is 0.1 % off, no decay, and two ways to get the shared prompt wrong."""
    wrong = {"beta": {"beta": 0.1001}, "weight decay": {"weight_decay": 0.0}}
    theirs = their_dpo(PLAIN, our_dpo(PLAIN)[1])
    if callable(mistake):
        monkeypatch.setattr(objectives, "pair_layout", mistake)
        ours, _ = our_dpo(PLAIN)
    else:
        ours, _ = our_dpo(replace(PLAIN, ours=wrong[mistake]))
    with pytest.raises(AssertionError, match="further apart"):
        alike(ours, theirs, FIGURES)
