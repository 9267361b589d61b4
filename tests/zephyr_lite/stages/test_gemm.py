"""`gemm: fp16acc` through the stages: what is computed by it, what is exact, and what is written.

There is no such unit on a CPU, so the two questions to the machine are answered for it here; what
then computes is the simulation.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.recipe import Recipe
from zephyr_lite.run import Run
from zephyr_lite.stages import aif, dpo, reference, sft
from zephyr_lite.stages import context as context_module
from zephyr_lite.stages.context import Context
from zephyr_lite.stopping import Stop

FIGURES = {"gain": 1.5, "products": []}


class Notes:
    """A listener that keeps what a person is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, label: str, total: int, done: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None:
        self.notes.append(text)

    def end(self) -> None: ...


def rows(count: int, first: int) -> list[dict[str, str]]:
    """Pairs of a few letters."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [
        {"prompt": f"Say {x}", "chosen": letters[i % 7 :], "rejected": letters[: i % 9 + 2]}
        for i, x in enumerate(letters[first : first + count])
    ]


@pytest.fixture
def context(
    tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Context]]:
    """`context(folder, gemm=, **fields)`: an entered run with its pairs made; a fresh cache."""
    monkeypatch.setenv("ZEPHYR_LITE_HOME", str(tmp_path / "home"))
    for side, found in (("train", rows(9, 0)), ("eval", rows(4, 20))):
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    opened: list[Run] = []

    def make(folder: str, gemm: str = "fp16acc", **fields: Any) -> Context:
        sides = {side: str(tmp_path / f"{side}.jsonl") for side in ("train", "eval")}
        settings = {"max_length": 128, "max_prompt_length": 60, "optimizer": "adamw"}
        recipe = {
            "name": "gemm",
            "gemm": gemm,
            "base": {"model": str(tiny_mistral)},
            "data": {"feedback": sides},
            "dpo": {**settings, "max_steps": 2, "batch_size": 4, "lora": {"r": 4}},
            "memory": {"tokens_per_micro_batch": 256},
            **fields,
        }
        run = Run(Recipe.model_validate(recipe), tmp_path / folder)
        opened.append(run.__enter__())
        ctx = Context(run, torch.device("cpu"), Notes(), Stop())
        aif.run(ctx)
        return ctx

    yield make
    for run in opened:
        run.__exit__()


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A machine that the mode is for; grows by the tokens of each probe."""
    probed: list[int] = []

    def probe(engine: Any, tokens: int) -> dict[str, Any]:
        probed.append(tokens)
        return FIGURES

    monkeypatch.setattr(context_module, "choose_gemm", lambda wanted, *_: wanted)
    monkeypatch.setattr(context_module, "probe", probe)
    return probed


def test_a_machine_without_a_gpu_trains_nothing_and_measures_all(context) -> None:
    ctx = context("run")
    for stage in (reference.run, dpo.run):
        with pytest.raises(MachineError, match="gemm: fp16acc: it needs a GPU"):
            stage(ctx)
    assert ctx.policy(ctx.load_model()).gemm == ctx.used["gemm"] == "exact"


def test_an_engine_that_does_not_compute_it_is_refused(context) -> None:
    with pytest.raises(MachineError, match="gemm: fp16acc: engine hf does not compute it"):
        dpo.run(context("run", engine="hf"))


def test_dsft_asks_the_machine_too(context, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    data = {"dialogues": {"train": str(tmp_path / "talks.jsonl")}}
    ctx = context("run", data=data, dpo=None, sft={"max_steps": 1, "max_length": 64})
    with pytest.raises(MachineError, match="gemm: fp16acc: it needs a GPU"):
        sft.run(ctx)


def test_what_training_compares_itself_with_is_computed_as_it_trains(context, card) -> None:
    """And what is measured is what an exact run measures, from the same cache."""
    found = {gemm: reference.run(context(gemm, gemm)) for gemm in ("exact", "fp16acc")}
    (exact_train, exact_eval), (train, held_out) = found["exact"], found["fp16acc"]
    for name in ("chosen_P", "rejected_P"):
        there, here = (getattr(side.reference, name) for side in (exact_train, train))
        assert 0 < np.abs(there - here).max() < 0.1, "nats of an answer"
        there, here = (getattr(side.reference, name) for side in (exact_eval, held_out))
        assert np.array_equal(there, here)


def test_the_reference_has_a_set_for_each_arithmetic(context, card) -> None:
    exact, ctx = context("exact", "exact"), context("run")
    reference.run(exact)
    reference.run(ctx)
    assert exact.run.output("reference", "sets") == [exact.run.output("reference", "set_key")]
    sets = ctx.run.output("reference", "sets")
    assert sets == [ctx.run.output("reference", "set_key"), *exact.run.output("reference", "sets")]
    assert ctx.run.output("reference", "computed") == 9, "the held-out pairs' were known"
    assert reference.set_key(ctx, "exact") == reference.set_key(exact)
    assert reference.set_key(ctx)["gemm"] == "fp16acc"


def test_ddpo_starts_at_ln_2_and_says_what_it_used(context, card) -> None:
    ctx = context("run")
    dpo.run(ctx)
    entry = ctx.run.manifest["stages"]["dpo"]
    assert entry["audit"]["wiring_nats"] == 0.0
    assert abs(entry["audit"]["loss"] - math.log(2)) < 1e-6
    lines = ctx.run.path("dpo", "metrics.jsonl").read_text().splitlines()
    assert abs(json.loads(lines[0])["loss"] - math.log(2)) < 1e-6
    assert entry["machine"]["gemm"] == "fp16acc"
    assert entry["machine"]["gemm_probe"] == FIGURES
    assert entry["inputs"]["recipe"]["gemm"] == "fp16acc"
    assert card == [256], "asked once of a command"
    assert "gemm: fp16acc: 1.50 times as fast as exact products" in ctx.listener.notes


def test_the_parent_s_figures_are_those_of_an_exact_run(context, card) -> None:
    figures = {}
    for gemm in ("exact", "fp16acc"):
        ctx = context(gemm, gemm)
        dpo.run(ctx)
        figures[gemm] = json.loads(ctx.run.path("dpo", "eval.json").read_text())
    assert figures["exact"]["sft"] == figures["fp16acc"]["sft"]
    loss = [figures[gemm]["dpo"]["eval_loss"] for gemm in figures]
    assert loss[0] != loss[1] and abs(loss[0] - loss[1]) < 1e-3


def test_a_training_does_not_go_on_in_another_arithmetic(context, card) -> None:
    ctx = context("run")
    dpo.run(ctx)
    ctx.run.__exit__()
    with pytest.raises(RecipeError, match='gemm: "fp16acc" -> "exact"'):
        dpo.run(context("run", "exact"))
