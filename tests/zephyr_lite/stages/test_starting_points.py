"""Where a run may start: a finished SFT adapter or model, and a base that is quantised already.

Each goes through the whole command line on the micro recipe; `first` is the run they start from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from zephyr_lite.recipe import Source
from zephyr_lite.stages.context import _source_name

SHORT = (
    "base.build.epochs=1",
    "data.feedback.train.limit=24",
    "sft.epochs=1",
    "dpo.epochs=1",
    "export.quants=[f32]",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache for all, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Where the runs lie beside each other."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(command, micro, home, runs):
    """`run("name", "key=value", ..., stage=)` -> (exit code, output), in the folder runs/name."""

    def start(name: str, *overrides: str, stage: str = "run") -> tuple[int, str]:
        sets = [part for o in (*SHORT, *overrides) for part in ("--set", o)]
        return command.run(stage, micro, "--run", str(runs / name), *sets, home=home)

    return start


@pytest.fixture
def first(run, runs) -> Path:
    """A whole run with merged weights; made once."""
    if not (runs / "first" / "export" / "merged").exists():
        status, text = run("first", "export.merged=true")
        assert status == 0, text
    return runs / "first"


@pytest.fixture
def built(first, home) -> Path:
    """The micro base as an ordinary checkpoint."""
    return next((home / "built").glob("*/MANIFEST.json")).parent


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def named_base(folder: Path) -> str:
    config = folder / "dpo" / "adapter" / "adapter_config.json"
    return json.loads(config.read_text())["base_model_name_or_path"]


def is_verified(folder: Path) -> bool:
    report = json.loads((folder / "export" / "report.json").read_text())
    return all(file["verify"]["passed"] for file in report["files"])


def test_an_adapter_in_place_of_training_gives_the_same_run(first, run, runs):
    status, text = run("second", f"sft.from={first}", stage="dpo")
    assert status == 0, text
    assert "nothing was trained" in text
    for stage in ("sft", "dpo"):
        name = Path(stage) / "adapter" / "adapter_model.safetensors"
        assert (runs / "second" / name).read_bytes() == (first / name).read_bytes()
    stages = manifest(runs / "second")["stages"]
    taken = stages["sft"]["start"]
    assert (taken["kind"], taken["from"], len(taken["sha256"])) == ("adapter", str(first), 64)
    assert stages["sft"]["figures"]["eval_loss"] == pytest.approx(
        manifest(first)["stages"]["sft"]["figures"]["eval_loss"]
    )
    assert stages["reference"]["computed"] == 0, "the same reference: shared"
    status, text = run("second", f"sft.from={first / 'dpo' / 'adapter'}", stage="dpo")
    assert status == 2, "another adapter is another run"
    assert "start: sha256" in text


def test_a_stock_peft_adapter_of_other_targets_runs_to_a_checked_file(built, run, runs, tmp_path):
    """As TRL saves one: a folder's name for its base, half precision, two of seven linears."""
    model = AutoModelForCausalLM.from_pretrained(built)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    peft = get_peft_model(model, config).half()
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.manual_seed(1))
    peft.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
    overrides = (f"sft.from={tmp_path}", "data.dialogues=null")
    status, text = run("stock", *overrides)
    assert status == 0, text
    assert "cannot be told from here" in text
    assert is_verified(runs / "stock")
    assert named_base(runs / "stock") == "micro"
    weights = load_file(runs / "stock" / "dpo" / "adapter" / "adapter_model.safetensors")
    untouched = next(w for n, w in weights.items() if "up_proj.lora_A" in n)
    assert not untouched[:2].any() and untouched[2:].any(), "zeros stand for the SFT adapter"
    config = json.loads((runs / "stock" / "dpo" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 2 + 4


def test_a_finished_model_is_the_base_of_what_follows(first, run, runs, command, micro, home):
    merged = first / "export" / "merged"
    status, text = run("over", f"sft.from={merged}")
    assert status == 0, text
    assert "rounds most of its adapter away" in text
    folder = runs / "over"
    assert not (folder / "sft" / "adapter").exists()
    assert named_base(folder) == str(merged)
    assert is_verified(folder)
    record = manifest(folder)
    assert record["base"]["model"] == str(merged)
    assert record["base"]["quantization"]["type"] == "nf4"
    assert record["stages"]["sft"]["start"]["kind"] == "model"
    assert record["stages"]["sft"]["figures"]["eval_tokens"] > 0
    weights = load_file(folder / "dpo" / "adapter" / "adapter_model.safetensors")
    assert {w.shape[0] for n, w in weights.items() if "lora_A" in n} == {4}, "no SFT adapter in it"
    asked = (micro, "--run", str(folder), *(p for o in SHORT for p in ("--set", o)))
    overrides = ("--set", f"sft.from={merged}", "--stage", "sft")
    status, text = command.run("export", *asked, *overrides, home=home)
    assert status == 0, text
    assert is_verified(folder), "the SFT model itself: a base without an adapter"
    status, text = run("over", f"sft.from={merged}", "dpo.adapter=continue")
    assert status == 2
    assert "dpo.adapter" in text


def test_a_base_that_is_quantised_already_is_used_as_it_is(built, run, runs, tmp_path):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    AutoModelForCausalLM.from_pretrained(built, quantization_config=config).save_pretrained(
        tmp_path
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((built / name).read_bytes())
    status, text = run("ready", f"base={tmp_path}")
    assert status == 0, text
    assert "quantised already (nf4, double quant off)" in text
    assert "not as the recipe says (nf4, double quant on)" in text
    assert is_verified(runs / "ready")
    found = manifest(runs / "ready")["base"]
    assert found["quantization"] == {"type": "nf4", "double_quant": False, "as_found": True}
    plain = (f"base={tmp_path}", "base.quantization=none")
    status, text = run("plain", *plain, stage="sft")
    assert status == 0, text
    assert "not as the recipe says (none)" in text
    one, other = (runs / name / "sft" / "adapter" for name in ("ready", "plain"))
    weights = "adapter_model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()


def test_held_out_dialogues_may_be_split_off(first, run, runs):
    overrides = ("data.dialogues.eval=[]", "data.dialogues.holdout=0.3")
    status, text = run("split", f"sft.from={first}", *overrides, stage="sft")
    assert status == 0, text
    figures = json.loads((runs / "split" / "sft" / "eval.json").read_text())
    assert figures["base"]["eval_tokens"] == figures["sft"]["eval_tokens"] > 0
    assert figures["base"]["eval_loss"] > figures["sft"]["eval_loss"]


def test_an_adapter_of_another_shape_is_refused(first, run, tmp_path):
    """A copy, so that no manifest stands beside it and only its tensors can tell."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((first / "sft" / "adapter" / name).read_bytes())
    overrides = (f"sft.from={tmp_path}", "base.build.hidden_size=32")
    status, text = run("shape", *overrides, stage="sft")
    assert status == 2, text
    assert f"sft.from: {tmp_path}: " in text
    assert "has shape (4, 64)" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("sft.from=./nowhere",), "sft.from: ./nowhere is not a folder"),
        (("sft.from={empty}",), "holds neither adapter_config.json nor config.json"),
        (("sft.from={first}", "base.build.hidden_size=32"), "was trained on"),
        (("dpo.keep=best", "data.feedback.eval=[]"), "dpo.keep: best needs held-out pairs"),
    ],
    ids=["nowhere", "empty", "another base", "nothing held out"],
)
def test_what_cannot_start_is_refused_with_its_key(first, run, tmp_path, overrides, said):
    filled = [o.format(first=first, empty=tmp_path) for o in overrides]
    status, text = run(tmp_path.name, *filled, stage="dpo")
    assert status == 2, text
    assert said in text
    assert "hint: " in text
    assert "Traceback" not in text


def test_a_merged_model_that_stays_whole_is_the_trained_one(first, run, runs):
    """The merge is exact; what a quantised one loses, it loses on the grid."""
    merged = first / "export" / "merged"
    loss = {}
    for name, *overrides in (
        ("whole", f"sft.from={merged}", "base.quantization=none"),
        ("adapter", f"sft.from={first / 'dpo' / 'adapter'}"),
    ):
        status, text = run(name, *overrides, stage="sft")
        assert status == 0, text
        assert "rounds" not in text
        figures = json.loads((runs / name / "sft" / "eval.json").read_text())
        loss[name] = figures["sft"]["eval_loss"]
    assert loss["whole"] == pytest.approx(loss["adapter"], abs=2e-3), "float16 beside float32"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"path": "a/b", "split": "train"}, "a/b[train]"),
        ({"path": "a/b", "file": "x.json", "split": "unused"}, "a/b/x.json"),
        ({"path": "a/b", "file": "x.json", "revision": "v2"}, "a/b/x.json@v2"),
        ({"path": "a/b", "split": "train", "revision": "v2"}, "a/b[train]@v2"),
        ({"path": "rows.jsonl"}, "rows.jsonl"),
    ],
)
def test_inputs_name_a_source_with_its_file_and_revision(source, name):
    assert _source_name(Source.model_validate(source)) == name


def test_the_best_adapter_is_kept(first, run, runs):
    overrides = ("dpo.keep=best", "dpo.epochs=2", "dpo.eval_every=2", "dpo.log_every=2")
    status, text = run("best", *overrides, stage="dpo")
    assert status == 0, text
    lines = (runs / "best" / "dpo" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if "eval_loss" in line]
    best = max(found, key=lambda f: (f["eval_rewards/accuracies"], -f["eval_loss"], -f["step"]))
    figures = json.loads((runs / "best" / "dpo" / "eval.json").read_text())
    assert figures["dpo"]["step"] == best["step"]
    assert figures["dpo"]["eval_loss"] == best["eval_loss"]
    assert figures["last"]["eval_loss"] == found[-1]["eval_loss"]
    assert found[-1]["step"] == figures["dpo"]["steps"] == 6
    status, text = run("best", *overrides[:2], "dpo.eval_every=3", stage="dpo")
    assert status == 2, "when to evaluate decides what is kept"
    assert "dpo.eval_every: 2 -> 3" in text
    assert run("best", *overrides[:3], stage="dpo")[0] == 0, "how often to log decides nothing"
