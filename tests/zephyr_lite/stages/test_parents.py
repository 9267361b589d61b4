"""Stages that a run beside this one finished are linked, verified, and outlive it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(command, micro, home, tmp_path_factory) -> Path:
    """runs/first of a folder of its own: trained, not exported."""
    folder = tmp_path_factory.mktemp("sweep") / "runs" / "first"
    status, text = command.run("dpo", micro, "--run", str(folder), home=home)
    assert status == 0, text
    return folder


@pytest.fixture
def runs(first, tmp_path) -> Path:
    """A copy of the folder that holds the first run, to break and to add to."""
    return Path(shutil.copytree(first.parent, tmp_path / "runs"))


def _stages(folder: Path) -> Tree:
    return json.loads((folder / "manifest.json").read_text())["stages"]


def _linked(folder: Path) -> dict[str, str]:
    return {n: e["linked_from"] for n, e in _stages(folder).items() if "linked_from" in e}


def _bytes(folder: Path) -> dict[str, bytes]:
    """Contents of every file below, by name."""
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "MANIFEST.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def test_a_sweep_over_beta_trains_only_what_differs(command, micro, home, runs):
    second = ("run", micro, "--run", str(runs / "second"), "--set", "dpo.beta=0.3")
    status, text = command.run(*second, home=home)
    assert status == 0, text
    place = str(runs / "first")
    assert _linked(runs / "second") == {"sft": place, "aif": place}
    assert f"sft: taken from {place} (same inputs)" in text
    assert "sft: 18 steps" not in text and "dpo: 18 steps" in text
    for stage in ("sft", "aif", "reference"):
        ours, theirs = _bytes(runs / "second" / stage), _bytes(runs / "first" / stage)
        assert ours and ours == theirs
    entries, others = _stages(runs / "second"), _stages(runs / "first")
    assert entries["sft"] == others["sft"] | {"linked_from": place}
    assert entries["reference"]["computed"] == 0
    assert entries["dpo"]["adapter"] != others["dpo"]["adapter"]

    # The first run may go: the links keep what they share, and the next of the sweep uses it.
    shutil.rmtree(runs / "first")
    shutil.rmtree(runs / "second" / "export")
    assert command.run(*second, home=home)[0] == 0
    assert (runs / "second" / "export" / "micro-Q8_0.gguf").exists()
    third = ("dpo", micro, "--run", str(runs / "third"), "--set", "dpo.beta=0.2")
    assert command.run(*third, home=home)[0] == 0
    assert set(_linked(runs / "third").values()) == {str(runs / "second")}


def test_links_share_bytes_and_hold_no_checkpoint(command, micro, home, runs):
    leftover = runs / "first" / "sft" / "checkpoints" / "step-0000001"
    leftover.mkdir(parents=True)
    status, text = command.run("sft", micro, "--run", str(runs / "second"), home=home)
    assert status == 0, text
    name = "sft/adapter/adapter_model.safetensors"
    assert (runs / "second" / name).samefile(runs / "first" / name)
    assert not (runs / "second" / "sft" / "checkpoints").exists()


def test_a_twin_takes_training_and_makes_its_own_export(command, micro, home, runs):
    """Export files bear the run's name and stand in its Modelfile: they are never shared."""
    status, text = command.run("run", micro, "--run", str(runs / "twin"), home=home)
    assert status == 0, text
    assert set(_linked(runs / "twin")) == {"sft", "aif", "dpo"}
    assert "loss" not in text, "something was trained"
    assert "linked_from" not in _stages(runs / "twin")["export"]


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("sft/adapter/adapter_model.safetensors", "sft"),
        ("aif/pairs.parquet", "aif"),
    ],
)
def test_a_damaged_run_lends_nothing_and_that_is_said(command, micro, home, runs, file, stage):
    damaged = runs / "first" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    status, text = command.run(stage, micro, "--run", str(runs / "second"), home=home)
    assert status == 0, text
    assert f"{stage}: not taken from {runs / 'first'}: {damaged}: damaged" in text
    assert _linked(runs / "second") == {}
    assert (runs / "second" / file).read_bytes() != bytes(content)
    assert list((runs / "second").glob(".*.part")) == []


def test_fresh_takes_nothing(command, micro, home, runs):
    asked = ("aif", micro, "--run", str(runs / "second"), "--fresh")
    status, text = command.run(*asked, home=home)
    assert status == 0, text
    assert _linked(runs / "second") == {}
