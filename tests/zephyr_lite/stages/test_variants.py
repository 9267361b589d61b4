"""The recipe's alternatives, each through the whole command line on the micro recipe."""

from __future__ import annotations

import json
import math

import pytest


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache for all variants, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


def _run(command, micro, folder, home, *overrides, stage="run"):
    sets = [part for o in overrides for part in ("--set", o)]
    return command.run(stage, micro, "--fresh", "--run", str(folder), *sets, home=home)


@pytest.mark.parametrize(
    "overrides",
    [
        ("dpo.adapter=continue", "memory.checkpointing=full"),
        ("sft=null",),
        ("dpo=null", "data.feedback=null"),
        ("sft.packing=wrapped", "sft.loss_on=assistant", "dpo.loss=ipo"),
        ("base.quantization=none", "dpo.loss=hinge", "dpo.sft_weight=0.1"),
        ("dpo.loss=robust", "dpo.label_smoothing=0.1", "dpo.optimizer=paged_adamw_32bit"),
        ("data.feedback.rule=worst", "data.feedback.eval=[]", "data.feedback.holdout=0.2"),
        ("export.quants=[f32, f16]", "export.merged=true", "sft.schedule=linear"),
    ],
    ids=lambda o: o[0],
)
def test_every_alternative_runs_to_a_checked_file(command, micro, home, tmp_path, overrides):
    status, text = _run(command, micro, tmp_path, home, *overrides)
    assert status == 0, text
    report = json.loads((tmp_path / "export" / "report.json").read_text())
    assert all(f["verify"]["passed"] for f in report["files"])


def test_step_zero_loss_is_ln_2_and_wiring_is_exact(command, micro, home, tmp_path):
    for adapter in ("stacked", "continue"):
        folder = tmp_path / adapter
        status, text = _run(command, micro, folder, home, f"dpo.adapter={adapter}", stage="dpo")
        assert status == 0, text
        audit = json.loads((folder / "manifest.json").read_text())["stages"]["dpo"]["audit"]
        assert audit["wiring_nats"] == 0.0
        assert abs(audit["loss"] - math.log(2)) < 1e-6
        first = json.loads((folder / "dpo" / "metrics.jsonl").read_text().splitlines()[0])
        assert abs(first["loss"] - math.log(2)) < 1e-6  # warm-up starts at a rate of 0


def test_a_changed_recipe_is_refused_with_the_difference(command, micro, home, tmp_path):
    assert _run(command, micro, tmp_path, home, stage="sft")[0] == 0
    status, text = _run(command, micro, tmp_path, home, "sft.learning_rate=1e-4", stage="sft")
    assert status == 2
    assert "sft.learning_rate: 0.002 -> 0.0001" in text
    assert "--run NEW" in text
    assert "Traceback" not in text
    # What only changes how it runs is not another recipe.
    status, text = _run(command, micro, tmp_path, home, "sft.log_every=3", stage="sft")
    assert status == 0, text


def test_a_sweep_over_beta_reuses_the_reference(command, micro, home, tmp_path):
    assert _run(command, micro, tmp_path / "a", home, stage="dpo")[0] == 0
    for name, override in (("b", "dpo.beta=0.3"), ("c", "dpo.lora.r=8"), ("d", "dpo.epochs=1")):
        assert _run(command, micro, tmp_path / name, home, override, stage="dpo")[0] == 0
        manifest = json.loads((tmp_path / name / "manifest.json").read_text())
        assert manifest["stages"]["reference"]["computed"] == 0


def test_a_damaged_adapter_is_seen_before_it_is_used(command, micro, home, tmp_path):
    assert _run(command, micro, tmp_path, home, stage="sft")[0] == 0
    weights = tmp_path / "sft" / "adapter" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0x10
    weights.write_bytes(content)
    status, text = _run(command, micro, tmp_path, home, stage="dpo")
    assert status == 5
    assert "damaged" in text
    assert "Traceback" not in text


def test_the_same_seed_gives_the_same_bytes(command, micro, tmp_path):
    adapters = []
    for name in ("a", "b"):
        folder = tmp_path / name
        assert _run(command, micro, folder, tmp_path / f"home-{name}", stage="dpo")[0] == 0
        adapters.append((folder / "dpo" / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_chat_answers_from_the_file_and_from_transformers_alike(command, micro, home, tmp_path):
    assert _run(command, micro, tmp_path, home, "export.quants=[f32]")[0] == 0
    asked = ("chat", micro, "--run", str(tmp_path), "--prompt", "Hello", "--max-tokens", "12")
    answers = []
    for extra in ((), ("--stage", "dpo")):
        status, text = command.run(*asked, *extra, home=home)
        assert status == 0, text
        answers.append(text.splitlines()[1:])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    "override", ["data.feedback.train=missing.jsonl", "export.questions=missing.jsonl"]
)
def test_what_is_missing_is_said_before_anything_is_trained(
    command, micro, home, tmp_path, override
):
    status, text = _run(command, micro, tmp_path, home, override)
    assert status == 2
    assert "missing.jsonl: no such file" in text
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize(
    ("overrides", "is_said"),
    [
        (("data.feedback.eval=[]",), True),
        (("dpo=null", "data.feedback=null", "data.dialogues.eval=[]"), True),
        (
            (
                "dpo=null",
                "data.feedback=null",
                "data.dialogues.eval=[]",
                "data.dialogues.holdout=0.3",
            ),
            False,
        ),
    ],
    ids=["pairs", "dialogues", "dialogues held out by hash"],
)
def test_comparing_on_training_prompts_is_said(command, micro, home, tmp_path, overrides, is_said):
    status, text = _run(command, micro, tmp_path, home, *overrides)
    assert status == 0, text
    assert ("compared on training prompts" in text) == is_said
