"""A plan of dDPO is made by the reference pass too, and said once, whichever of the two runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.plan.lengths import pairs_of
from zephyr_lite.recipe import Recipe
from zephyr_lite.run import Run
from zephyr_lite.stages import aif, dpo, fit, reference
from zephyr_lite.stages.context import Context
from zephyr_lite.stopping import Stop


class Notes:
    """A listener that keeps what a person is told of a plan."""

    def __init__(self) -> None:
        self.plans: list[str] = []

    def start(self, label: str, total: int, done: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def note(self, text: str) -> None:
        if "plans with" in text:
            self.plans.append(text)

    def end(self) -> None: ...


@pytest.fixture
def context(
    tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Context]]:
    """`context(folder, **memory)`: an entered run with its pairs made; one cache for all."""
    monkeypatch.setenv("ZEPHYR_LITE_HOME", str(tmp_path / "home"))
    for side, first in (("train", 0), ("eval", 20)):
        rows = [{"prompt": f"{i}", "chosen": "yes" * i, "rejected": "no"} for i in range(1, 7)]
        rows = [row | {"prompt": row["prompt"] + "?" * first} for row in rows]
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    opened: list[Run] = []

    def make(folder: str, **memory: Any) -> Context:
        settings = {"max_length": 128, "max_prompt_length": 60, "optimizer": "adamw"}
        recipe = {
            "name": "fit",
            "base": {"model": str(tiny_mistral)},
            "data": {"feedback": {s: str(tmp_path / f"{s}.jsonl") for s in ("train", "eval")}},
            "dpo": {**settings, "max_steps": 1, "batch_size": 4, "lora": {"r": 4}},
            "memory": {"budget": "1GB", **memory},
        }
        run = Run(Recipe.model_validate(recipe), tmp_path / folder)
        opened.append(run.__enter__())
        ctx = Context(run, torch.device("cpu"), Notes(), Stop())
        aif.run(ctx)
        return ctx

    yield make
    for run in opened:
        run.__exit__()


def plans(ctx: Context) -> list[str]:
    """What was said of them."""
    assert isinstance(ctx.listener, Notes)
    return ctx.listener.plans


def test_the_plan_of_dpo_is_said_once(context) -> None:
    """By the reference pass where that runs, and else, its log-probs being known, by dDPO."""
    first = context("first")
    reference.run(first)
    (said,) = plans(first)
    assert said.startswith("dpo: ") and "all layers keep activations" in said
    dpo.run(first)
    assert plans(first) == [said]
    assert first.run.output("reference", "computed") == 12
    again = context("again")
    dpo.run(again)
    assert again.run.output("reference", "computed") == 0
    assert len(plans(again)) == 1
    assert "plan" in first.run.manifest["stages"]["dpo"]


def test_another_cut_is_said(context) -> None:
    """The reference pass plans with held-out pairs too: where they are the longest, for less."""
    ctx = context("run", budget="20MiB")
    short, long = (pairs_of([_pair(n)] * 8) for n in (8, 1000))
    for lengths in (long, short, short):
        fit.fitted(ctx, "dpo", lengths)
    first, second = plans(ctx)
    assert "of 4 layers keep" in first and "all layers keep" in second


def _pair(length: int) -> EncodedPair:
    ids = torch.arange(length, dtype=torch.int32).numpy()
    return EncodedPair(ids[:4], ids, ids)
