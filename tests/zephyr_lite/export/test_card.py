"""The card says what is true of this run, the same each time, and nothing about this machine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from zephyr_lite.export.card import model_card, public_name

DRIFT = {"kl_mean": 0.00131, "top1": 0.959, "nll_truth": 5.0567, "nll_file": 5.0596}
LORA = {"r": 16, "alpha": 32.0, "dropout": 0.05}
MANIFEST: dict[str, Any] = {
    "zephyr_lite": "0.1.0",
    "name": "fable",
    "base": {
        "model": "some/Base-7B",
        "revision": "5e1f",
        "source": "a1" * 32,
        "sha256": "b2" * 32,
        "quantization": {"type": "nf4"},
    },
    "recipe": {
        "seed": 42,
        "base": {"model": "some/Base-7B"},
        "data": {
            "dialogues": {"train": [{"path": "owner/chat_200k", "split": "train"}]},
            "feedback": {"train": [{"path": "/home/someone/secret/pairs.jsonl", "split": None}]},
        },
        "sft": {"epochs": 1.0, "learning_rate": 2e-4, "from": None, "lora": LORA},
        "dpo": {"epochs": 1.0, "beta": 0.01, "adapter": "stacked", "lora": LORA},
        "export": {"base_weights": "nf4"},
    },
    "stages": {
        "aif": {"pairs": "c3" * 32},
        "sft": {"adapter": "d4" * 32},
        "dpo": {"adapter": "e5" * 32},
        "export": {"inputs": {"template": "f6" * 32}},
    },
}
REPORT: dict[str, Any] = {
    "stage": "dpo",
    "files": [
        {
            "file": "fable-Q4_K_M.gguf",
            "quant": "q4_k_m",
            "bytes": 4_368_439_584,
            "sha256": "07" * 32,
            "parameters": 7_241_732_096,
            "notes": ["stated context: 4096"],
            "verify": {"drift": {**DRIFT, "positions": 1280}},
        },
        {
            "file": "fable-lora.gguf",
            "quant": "lora",
            "bytes": 7_000_000,
            "sha256": "08" * 32,
            "notes": [],
        },
    ],
    "folders": [
        {
            "folder": "w4a16",
            "format": "pack-quantized",
            "files": {"model.safetensors": {"bytes": 99, "sha256": "09" * 32}},
            "notes": [],
        }
    ],
}


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def changed(tree: dict[str, Any], **entries: Any) -> dict[str, Any]:
    return {**copy.deepcopy(tree), **entries}


def test_the_head_is_what_a_hub_reads() -> None:
    head = head_of(model_card(MANIFEST, REPORT, license="apache-2.0"))
    assert head["base_model"] == "some/Base-7B"
    assert head["license"] == "apache-2.0"
    assert head["datasets"] == ["owner/chat_200k"]
    assert {"zephyr-lite", "dpo", "gguf", "compressed-tensors"} <= set(head["tags"])
    assert "license" not in head_of(model_card(MANIFEST, REPORT))


def test_files_figures_and_parents_are_listed() -> None:
    card = model_card(MANIFEST, REPORT)
    assert f"| `fable-Q4_K_M.gguf` | 4,368,439,584 | `{'07' * 32}` |" in card
    assert f"| `w4a16/model.safetensors` | 99 | `{'09' * 32}` |" in card
    assert "| `fable-Q4_K_M.gguf` | 0.0013 | 95.90% | +0.29% | 5.0567 | 5.0596 | 1280 |" in card
    assert "- `w4a16`: not compared with the trained model" in card
    assert "- `fable-Q4_K_M.gguf`: stated context: 4096" in card
    for hash in ("a1", "b2", "c3", "d4", "e5", "f6"):
        assert f"`{hash * 32}`" in card
    assert "| dpo.beta | `0.01` |" in card
    assert "4-bit (NF4) values, which are what training multiplied by" in card
    for line in (
        "llama-server -m fable-Q4_K_M.gguf",
        "llama-server -m BASE.gguf --lora fable-lora.gguf",
        "ollama create fable -f Modelfile",
        "vllm serve ./w4a16",
    ):
        assert f"\n{line}\n" in card
    assert "pipeline(" not in card  # the 4-bit folder is vLLM's


def test_answers_are_counted_when_questions_were_asked() -> None:
    report = changed(REPORT, questions={"asked": 20, "right": 19, "answers": [{"prompt": "x"}]})
    card = model_card(MANIFEST, report)
    assert "\nOf 20 held-out questions `fable-Q4_K_M.gguf` answered 19 rightly.\n" in card
    assert "\n\n\n" not in card


def test_an_sft_export_says_nothing_of_dpo() -> None:
    card = model_card(MANIFEST, changed(REPORT, stage="sft"))
    for text in ("dpo", "preference", "e5e5", "c3c3", "pairs.jsonl"):
        assert text not in card


@pytest.mark.parametrize("mode", ["nf4", "original"])
def test_the_merge_is_named(mode: str) -> None:
    manifest = copy.deepcopy(MANIFEST)
    manifest["recipe"]["export"]["base_weights"] = mode
    assert ("own 16-bit weights" in model_card(manifest, REPORT)) == (mode == "original")
    manifest["base"]["quantization"] = "none"
    assert "NF4" not in model_card(manifest, REPORT)


def test_places_on_this_machine_stay_here() -> None:
    manifest = copy.deepcopy(MANIFEST)
    place = "/home/someone/secret/base"
    manifest["base"] |= {"model": place, "revision": None}
    manifest["recipe"]["base"]["model"] = place
    manifest["recipe"]["sft"]["from"] = "~/secret/adapter/"
    manifest["stages"]["sft"]["linked_from"] = "/home/someone/secret/run"
    card = model_card(manifest, REPORT)
    assert "secret" not in card and "someone" not in card
    assert "base_model" not in head_of(card)
    assert "`base`" in card and "`adapter`" in card and "`pairs.jsonl`" in card


def test_a_local_folder_is_no_hub_id() -> None:
    base = MANIFEST["base"] | {"model": "models/mine", "revision": None}
    assert "base_model" not in head_of(model_card(changed(MANIFEST, base=base), REPORT))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("owner/name", "owner/name"),
        ("package:feedback.jsonl", "package:feedback.jsonl"),
        ("data/rows.jsonl", "rows.jsonl"),
        ("/a/b", "b"),
        ("~/b/", "b"),
        ("../a/b", "b"),
        ("C:\\Users\\me\\b", "b"),
        ("/", "local"),
    ],
)
def test_public_names(path: str, name: str) -> None:
    assert public_name(path) == name


def test_a_small_model_is_called_small() -> None:
    report = copy.deepcopy(REPORT)
    assert "It is small" not in model_card(MANIFEST, report)
    report["files"][0]["parameters"] = 2_295_552
    assert "It is small: 2.3 million parameters" in model_card(MANIFEST, report)


def test_text_cannot_break_out_of_its_place() -> None:
    report = copy.deepcopy(REPORT)
    report["files"][0]["notes"] = ["a | b\n# heading"]
    card = model_card(MANIFEST, report, license='mit"\n---\n# heading')
    assert "a / b # heading" in card
    assert head_of(card)["license"] == 'mit" --- # heading'
    assert "\n# heading" not in card


def test_the_same_run_gives_the_same_text() -> None:
    first = model_card(MANIFEST, REPORT)
    assert first == model_card(copy.deepcopy(MANIFEST), copy.deepcopy(REPORT))
    assert first.endswith("\n") and not first.endswith("\n\n")
