"""The merged folder loads in stock transformers and holds nothing a tokenizer file asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.export.safetensors import write_merged


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_loads_in_stock_transformers(
    dtype: str, nf4_base: Path, adapter: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = FoldedModel(nf4_base, adapter)
    out = tmp_path / "merged"
    report = write_merged(
        model, tokenizer_folder, ZEPHYR_TEMPLATE, out, dtype, max_shard_bytes=2_000_000
    )
    assert report["shards"] > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {n: load_file(out / file)[n] for n, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.generation_config.eos_token_id == 2
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.tensor(name).to(weight.dtype)), name


def test_one_shard_and_a_tied_head(tied_base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    write_merged(FoldedModel(tied_base, None), tokenizer_folder, "t", out, "float32")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("text", ["  two spaces", "a</s> b\n", "naïve 漢字"])
def test_the_tokenizer_is_the_file_itself(
    text: str, plain_base: Path, tokenizer_folder: Path, tokenizer: object, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    write_merged(FoldedModel(plain_base, None), tokenizer_folder, ZEPHYR_TEMPLATE, out)
    assert (out / "tokenizer.json").read_bytes() == (
        tokenizer_folder / "tokenizer.json"
    ).read_bytes()
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids  # type: ignore[attr-defined]
    messages = [{"role": "user", "content": text}]
    rendered = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render(messages, True)


def test_only_fixed_names_and_fields_are_written(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = FoldedModel(plain_base, None)
    model.config |= {"_attn_implementation_internal": "x", "quantised": 1}
    out = tmp_path / "merged"
    write_merged(model, tokenizer_folder, ZEPHYR_TEMPLATE, out)
    assert {path.name for path in out.iterdir()} == {
        "MANIFEST.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert not {"vocab_file", "chat_template"} & written.keys()
    config = json.loads((out / "config.json").read_text())
    assert not any(key.startswith("_") for key in config)
    assert "quantization_config" not in config


def test_a_failure_leaves_nothing(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FoldedModel(plain_base, None)
    original = model.tensor
    monkeypatch.setattr(model, "tensor", lambda n: original(n) * (1e8 if "norm" in n else 1))
    with pytest.raises(DataError, match=r"input_layernorm\.weight does not fit"):
        write_merged(model, tokenizer_folder, "t", tmp_path / "merged", "float16")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RecipeError, match="float8"):
        write_merged(model, tokenizer_folder, "t", tmp_path / "merged", "float8")  # type: ignore[arg-type]
