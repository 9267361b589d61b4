"""dSFT under an engine of its own: what is refused, what it is keyed by, what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.model.adapters import load_adapter
from zephyr_lite.recipe import Recipe
from zephyr_lite.run import Run
from zephyr_lite.stages import dpo, sft
from zephyr_lite.stages.context import Context
from zephyr_lite.stopping import Stop
from zephyr_lite.train.unsloth_process import PYTHON

CPU = torch.device("cpu")


class Heard:
    """A listener that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def start(self, label: str, total: int, done: int) -> None: ...
    def step(self, record: dict[str, Any]) -> None: ...
    def end(self) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def recipe(tiny_mistral: Path) -> Callable[..., Recipe]:
    """`recipe(section={...}, ...)`: a small recipe with fields put over it."""

    def make(**fields: Any) -> Recipe:
        tree: dict[str, Any] = {
            "name": "engines",
            "base": {"model": str(tiny_mistral)},
            "data": {
                "dialogues": {
                    "train": {"path": "package:dialogues.train.jsonl", "limit": 40},
                    "eval": {"path": "package:dialogues.eval.jsonl", "limit": 4},
                },
                "feedback": {"train": {"path": "package:feedback.train.jsonl", "limit": 4}},
            },
            "sft": {
                "max_length": 512,
                "batch_size": 2,
                "max_steps": 3,
                "optimizer": "adamw",
                "lora": {"r": 4},
            },
        }
        for key, value in fields.items():
            tree[key] = tree.get(key, {}) | value if isinstance(value, dict) else value
        return Recipe.model_validate(tree)

    return make


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Python that finds a module `unsloth`, see train/unsloth_stand_in.py, and is found."""
    source = Path(__file__).parents[1] / "train" / "unsloth_stand_in.py"
    folder = tmp_path / "environment"
    (folder / "unsloth-0.dist-info").mkdir(parents=True)
    (folder / "unsloth-0.dist-info" / "METADATA").write_text("Name: unsloth\nVersion: 0\n")
    (folder / "unsloth.py").write_text(source.read_text())
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={folder}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    return python


def sft_entry(recipe: Recipe, folder: Path, act: Callable = sft.run) -> dict[str, Any]:
    """Do something with a context over a run folder; the manifest's entry of dSFT after it."""
    with Run(recipe, folder) as run:
        act(Context(run, CPU, Heard(), Stop()))
        return run.manifest["stages"].get("sft", {})


def adapter_files(folder: Path) -> dict[str, Any]:
    """Everything of a saved adapter but the values of its tensors."""
    path = folder / "sft" / "adapter"
    with safe_open(path / "adapter_model.safetensors", "pt") as stored:
        tensors = {
            name: (stored.get_slice(name).get_dtype(), stored.get_slice(name).get_shape())
            for name in stored.keys()  # noqa: SIM118 - it is no dict
        }
        about = stored.metadata()
    config = json.loads((path / "adapter_config.json").read_text())
    names = sorted(p.name for p in path.iterdir())
    return {"names": names, "tensors": tensors, "metadata": about, "config": config}


def first_loss(folder: Path) -> float:
    """Loss of the first step, which no training of the adapter has touched."""
    return json.loads((folder / "sft" / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_an_adapter_is_the_same_whichever_engine_trained_it(
    recipe, stand_in, load_tiny, monkeypatch, tmp_path
) -> None:
    one, other = tmp_path / "native", tmp_path / "unsloth"
    by_unsloth = recipe(sft={"engine": "unsloth"})
    ours, theirs = sft_entry(recipe(), one), sft_entry(by_unsloth, other)
    assert adapter_files(one) == adapter_files(other)
    load_adapter(load_tiny(), "sft", other / "sft" / "adapter")
    assert first_loss(other) == pytest.approx(first_loss(one), abs=1e-4)  # base and rows
    figures = theirs["figures"]
    assert figures.keys() == ours["figures"].keys()
    assert figures["steps"] == ours["figures"]["steps"] == 3
    assert (
        figures["eval_loss"] < json.loads((other / "sft" / "parent.json").read_text())["eval_loss"]
    )
    assert theirs["unsloth"]["unsloth"] == "0" and "unsloth" not in ours
    assert theirs["machine"]["engine"] == "native"  # what measured it
    assert not (one / "sft" / "checkpoints").exists()
    assert not (other / "sft" / "checkpoints").exists()

    monkeypatch.setenv(PYTHON, str(tmp_path / "gone"))  # what is finished needs it no more
    assert sft_entry(by_unsloth, other) == theirs
    with pytest.raises(MachineError, match="gone, which does not exist"):
        sft_entry(by_unsloth, tmp_path / "third")


def test_the_engine_that_trains_is_an_input_whichever_field_names_it(recipe, tmp_path) -> None:
    def inputs(**fields: Any) -> dict[str, Any]:
        found: list[dict[str, Any]] = []

        def look(ctx: Context) -> None:
            settings, split = ctx.recipe.sft, ctx.recipe.data.dialogues
            assert settings is not None and split is not None
            found.append(sft._inputs(ctx, split, settings)["recipe"])

        sft_entry(recipe(**fields), tmp_path / "run", look)
        return found[0]

    ours, theirs = inputs(), inputs(engine="unsloth")
    assert ours["engine"] == "native" and theirs["engine"] == "unsloth"
    assert inputs(sft={"engine": "native"}) == ours == inputs(engine="hf", sft={"engine": "native"})
    assert inputs(sft={"engine": "unsloth"}) == theirs


def test_dsft_by_hf_and_the_rest_by_native(recipe, tmp_path) -> None:
    seen: list[str] = []

    def act(ctx: Context) -> None:
        sft.run(ctx)
        seen.append(ctx.engine)

    entry = sft_entry(recipe(sft={"engine": "hf"}), tmp_path, act)
    assert entry["machine"]["engine"] == "hf"
    assert seen == ["native"]


def test_under_unsloth_this_process_computes_by_native(recipe, tmp_path) -> None:
    seen: list[str] = []
    sft_entry(recipe(engine="unsloth"), tmp_path, lambda ctx: seen.append(ctx.engine))
    assert seen == ["native"]


def test_ddpo_by_unsloth_is_refused_before_anything_is_done(recipe, tmp_path) -> None:
    with pytest.raises(RecipeError, match="engine: unsloth trains dSFT only") as caught:
        sft_entry(recipe(engine="unsloth", dpo={}), tmp_path, dpo.check_inputs)
    assert caught.value.hint == "--set engine=native --set sft.engine=unsloth"
    sft_entry(recipe(sft={"engine": "unsloth"}, dpo={}), tmp_path, dpo.check_inputs)
    sft_entry(recipe(engine="unsloth"), tmp_path, dpo.check_inputs)
    assert not (tmp_path / "aif").exists()


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_masters_in_host_memory_want_adamw_and_say_so_first(stage, recipe, tmp_path) -> None:
    check = {"sft": sft.check_inputs, "dpo": dpo.check_inputs}[stage]
    host = {"memory": {"optimizer": "host"}, "dpo": {"optimizer": "adamw"}}
    sft_entry(recipe(**host), tmp_path, check)
    with pytest.raises(RecipeError, match=rf"{stage}\.optimizer is adamw_8bit"):
        sft_entry(recipe(**host | {stage: {"optimizer": "adamw_8bit"}}), tmp_path, check)


def test_masters_in_host_memory_are_no_input_of_a_stage(recipe, tmp_path) -> None:
    device = sft_entry(recipe(), tmp_path / "device")
    host = sft_entry(recipe(memory={"optimizer": "host"}), tmp_path / "host")
    assert host["fingerprint"] == device["fingerprint"]
    assert host["adapter"] == device["adapter"], "in fp32 the same bytes"
