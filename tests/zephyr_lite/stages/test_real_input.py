"""The whole sequence on real dialogues, real AI feedback and a real model."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from zephyr_lite.data.chat import load_tokenizer

FEEDBACK = ("ultrafeedback_pairs", "arena_bench", "dpo_multiturn_pairs")


@pytest.fixture(scope="module")
def run_folder(command, shared_data, tmp_path_factory):
    """A finished run over every dialogue file and three feedback files, few steps of each."""
    folder = tmp_path_factory.mktemp("real")
    files = sorted((shared_data / "sft").glob("*.jsonl"))
    recipe = {
        "name": "real",
        "base": {
            "model": str(shared_data / "models" / "stories260k-mistral"),
            "dtype": "float32",  # the figures are compared with an fp32 model's
        },
        "data": {
            "on_fault": "drop",
            "dialogues": {"train": [str(f) for f in files], "holdout": 0.002},
            "feedback": {
                "train": [{"path": str(shared_data / "aif" / f"{n}.jsonl")} for n in FEEDBACK],
                "holdout": 0.01,
            },
        },
        "sft": {"max_length": 512, "max_steps": 2, "batch_size": 2, "learning_rate": 1e-3},
        "dpo": {
            "max_length": 256,
            "max_prompt_length": 128,
            "max_steps": 2,
            "batch_size": 4,
            "beta": 0.1,
            "learning_rate": 1e-3,
            "optimizer": "adamw",
            "lora": {"r": 8, "alpha": 8},
        },
        "export": {"quants": ["f16"], "verify_prompts": 2, "verify_tokens": 16},
    }
    file = folder / "real.yaml"
    file.write_text(yaml.safe_dump(recipe))
    status, text = command.run("run", str(file), "--run", str(folder / "run"), home=folder / "home")
    assert status == 0, text
    return folder / "run"


def _lines(path) -> int:
    return sum(1 for line in path.read_text(encoding="utf-8").split("\n") if line.strip())


def test_no_row_is_silently_lost(run_folder, shared_data):
    sft = json.loads((run_folder / "sft" / "report.json").read_text())
    rows = {f: c["rows_read"] for f, c in sft["train"]["files"].items()}
    assert rows == {str(f): _lines(f) for f in sorted((shared_data / "sft").glob("*.jsonl"))}
    assert sft["train_dialogues"] + sft["held_out_dialogues"] == sft["train"]["kept"]
    assert sum(rows.values()) == sft["train"]["kept"] + sum(sft["train"]["dropped"].values())

    aif = json.loads((run_folder / "aif" / "report.json").read_text())
    rows = {f: c["rows_read"] for f, c in aif["train"]["files"].items()}
    assert rows == {
        str(shared_data / "aif" / f"{n}.jsonl"): _lines(shared_data / "aif" / f"{n}.jsonl")
        for n in FEEDBACK
    }
    assert sum(rows.values()) == aif["train"]["kept"] + sum(aif["train"]["dropped"].values())
    assert aif["train_pairs"] + aif["held_out_pairs"] == aif["train"]["kept"]
    rejected = (run_folder / "aif" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rejected) == sum(aif["train"]["dropped"].values())

    for side, pairs in (("train", aif["train_pairs"]), ("eval", aif["held_out_pairs"])):
        report = json.loads((run_folder / "reference" / f"report-{side}.json").read_text())
        assert report["pairs"] == pairs == report["kept"] + len(report["equal_after_truncation"])


def test_stock_peft_gives_the_figures_of_the_run(run_folder):
    """The final adapter on the original base, loaded by PEFT alone, scores the held-out pairs."""
    manifest = json.loads((run_folder / "manifest.json").read_text())
    base = run_folder.parent / "home" / "bases"
    (folder,) = (p for p in base.iterdir() if p.is_dir())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(run_folder / "dpo" / "adapter")).train()
    tokenizer = load_tokenizer(folder)

    import pyarrow.parquet as pq

    rows = pq.read_table(run_folder / "aif" / "pairs.parquet").to_pylist()
    chosen = []
    for row in rows:
        if row["split"] != "eval":
            continue
        pair = tokenizer.encode_pair(
            json.loads(row["prompt"]),
            row["chosen"],
            row["rejected"],
            max_length=256,
            max_prompt_length=128,
        )
        ids = torch.tensor([[*pair.prompt.tolist(), *pair.chosen.tolist()]])
        with torch.no_grad():
            logp = model(ids).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None])[len(pair.prompt) - 1 :]
        chosen.append(picked.double().sum().item())
    recorded = manifest["stages"]["dpo"]["figures"]["eval_logps/chosen"]
    assert sum(chosen) / len(chosen) == pytest.approx(recorded, rel=1e-5)


def test_the_second_run_of_the_command_does_nothing(run_folder, command):
    before = (run_folder / "dpo" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    status, text = command.run(
        "run",
        str(run_folder.parent / "real.yaml"),
        "--run",
        str(run_folder),
        home=run_folder.parent / "home",
    )
    assert status == 0, text
    assert "steps" not in text
    after = (run_folder / "dpo" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert after == before
