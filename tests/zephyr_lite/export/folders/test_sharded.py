"""The merged folder loads in stock transformers, survives kills, and holds nothing unasked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.folders.sharded import (
    MergedTarget,
    ShardedFolder,
    StoredTensor,
    refuse_bnb_merged,
)
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.storage import file_digest, is_sealed, open_sealed

SMALL_SHARD = 2_000_000


def merged(model: FoldedModel, tokenizer: Path, out: Path, dtype: Any = "float16", **more: Any):
    options = {"identity": "one", "max_shard_bytes": SMALL_SHARD, **more}
    return MergedTarget(model, tokenizer, ZEPHYR_TEMPLATE, out, dtype, **options)


def write(target: MergedTarget, model: FoldedModel) -> dict[str, Any]:
    (report,) = stream(model, [target])
    target.commit()
    return report


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_it_loads_in_stock_transformers(
    dtype: str, nf4_base: Path, adapter: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(nf4_base, adapter), tmp_path / "merged"
    report = write(merged(model, tokenizer_folder, out, dtype), model)
    assert report["shards"] > 1
    assert (report["folder"], report["dtype"]) == ("merged", dtype)
    for name, file in report["files"].items():
        size, sha256 = (out / name).stat().st_size, file_digest(out / name)
        assert file == {"bytes": size, "sha256": sha256}
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {n: load_file(out / file)[n] for n, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == getattr(torch, dtype)
    assert loaded.generation_config.eos_token_id == 2
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.tensor(name).to(weight.dtype)), name


def test_one_shard_and_a_tied_head(tied_base: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    model, out = FoldedModel(tied_base, None), tmp_path / "merged"
    target = merged(model, tokenizer_folder, out, "float32", max_shard_bytes=10**9)
    write(target, model)
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert target.nbytes == sum(len(c) for n, c in contents(out).items() if n != "MANIFEST.json")
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("text", ["  two spaces", "a</s> b\n", "naïve 漢字"])
def test_the_tokenizer_is_the_file_itself(
    text: str, tied_base: Path, tokenizer_folder: Path, tokenizer: object, tmp_path: Path
) -> None:
    """Beside a Llama's config, transformers would rewrite the normaliser of its own class."""
    model, out = FoldedModel(tied_base, None), tmp_path / "merged"
    write(merged(model, tokenizer_folder, out), model)
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
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    model.config |= {"_attn_implementation_internal": "x", "quantised": 1}
    write(merged(model, tokenizer_folder, out, max_shard_bytes=10**9), model)
    assert contents(out).keys() == {
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
    assert open_sealed(out) == {"kind": "merged model", "dtype": "float16"}


@pytest.mark.parametrize("scaled", [False, True])
def test_rope_is_said_in_the_words_of_both_versions(
    scaled: bool, plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    """transformers 4 knows `rope_theta` and `rope_scaling` only, and defaults to a base of 1e4."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    rope = {**(scaling if scaled else {"rope_type": "default"}), "rope_theta": 1e6}
    model.config |= {"rope_parameters": rope, "model_type": "llama"}
    write(merged(model, tokenizer_folder, out), model)
    config = json.loads((out / "config.json").read_text())
    assert config["rope_theta"] == 1e6
    assert config.get("rope_scaling") == (scaling if scaled else None)
    loaded = AutoConfig.from_pretrained(out)
    assert isinstance(loaded, LlamaConfig)
    assert loaded.rope_parameters == rope


def test_a_value_that_does_not_fit_is_named(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = FoldedModel(plain_base, None)
    target = merged(model, tokenizer_folder, tmp_path / "merged")
    name = model.names()[0]
    target.begin()
    with pytest.raises(DataError, match=rf"{name} does not fit float16") as caught:
        target.add(name, model.tensor(name) * 1e8)
    target.close()
    assert "bfloat16" in (caught.value.hint or "")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(RecipeError, match="float8"):
        merged(model, tokenizer_folder, tmp_path / "merged", "float8")


def test_nf4_storage_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="removes most of the adapter") as caught:
        refuse_bnb_merged()
    assert "lora_gguf" in (caught.value.hint or "")


# ---------------------------------------------------------------- kills


def stop_behind(count: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Kill the process behind `count` tensors; returns what was written until then."""
    written: list[str] = []
    append = PartFile.append

    def stopping(file: PartFile, name: str, data: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(name)
        append(file, name, data)

    patch.setattr(PartFile, "append", stopping)
    return written


@pytest.mark.parametrize("count", [0, 1, 9, 20])
def test_a_kill_costs_nothing_and_the_bytes_are_the_same(
    count: int,
    plain_base: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    write(merged(model, tokenizer_folder, tmp_path / "whole"), model)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        written = stop_behind(count, patch)
        write(merged(model, tokenizer_folder, out), model)
    assert len(written) == count
    assert not out.exists()
    read: list[str] = []
    tensor = model.tensor
    monkeypatch.setattr(model, "tensor", lambda name: (read.append(name), tensor(name))[1])
    write(merged(model, tokenizer_folder, out), model)
    assert read == model.names()[count:]
    assert contents(out) == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "whole"}


@pytest.mark.parametrize("when", ["seal", "rename"])
def test_a_kill_while_it_is_sealed(
    when: str,
    plain_base: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    write(merged(model, tokenizer_folder, out, identity="zero"), model)
    target = merged(model, tokenizer_folder, out, "bfloat16")
    stream(model, [target])

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"zephyr_lite.storage.{'seal' if when == 'seal' else 'os.rename'}", killed)
        patch.setattr("zephyr_lite.storage._remove", lambda _: None)  # who is killed tidies nothing
        target.commit()
    target.close()
    assert open_sealed(out)["dtype"] == "float16"  # the old one, whole
    monkeypatch.setattr(model, "tensor", killed)  # nothing is computed again
    write(merged(model, tokenizer_folder, out, "bfloat16"), model)
    assert open_sealed(out)["dtype"] == "bfloat16"
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_kill_right_behind_the_seal_leaves_the_finished_folder_alone(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then its shards have two names; writing another export into one would damage it."""
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    with monkeypatch.context() as patch:
        patch.setattr("zephyr_lite.export.folders.sharded.shutil.rmtree", lambda *_, **__: None)
        write(merged(model, tokenizer_folder, out), model)
    assert (tmp_path / "merged.part").is_dir()
    target = merged(model, tokenizer_folder, out, identity="two")
    target.begin()
    target.add(model.names()[0], model.tensor(model.names()[0]) * 2)
    target.close()
    assert is_sealed(out)


def test_shards_of_another_plan_are_removed(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    stream(model, [first := merged(model, tokenizer_folder, out)])
    first.close()
    second = merged(model, tokenizer_folder, out, max_shard_bytes=10**9)
    second.begin()
    assert {path.name.partition(".part")[0] for path in second.part.iterdir()} == {
        "model.safetensors"
    }
    second.close()
    write(second, model)
    assert [name for name in contents(out) if name.startswith("model")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_a_tensor_that_was_not_planned_is_a_bug(tmp_path: Path) -> None:
    folder = ShardedFolder(tmp_path / "x", [StoredTensor("a", "F16", (2, 3))], "one", {})
    folder.begin()
    for wrong in (torch.zeros(2, 3), torch.zeros(3, 2, dtype=torch.float16)):
        with pytest.raises(ValueError, match="planned"):
            folder.append("a", wrong)
    folder.append("a", torch.arange(6, dtype=torch.float16).reshape(3, 2).T)
    folder.finish()
    folder.commit()
    expected = torch.tensor([[0, 2, 4], [1, 3, 5]], dtype=torch.float16)
    stored = (tmp_path / "x" / "model.safetensors").read_bytes()
    assert int.from_bytes(stored[:8], "little") % 8 == 0  # data begins where any type may
    assert torch.equal(load_file(tmp_path / "x" / "model.safetensors")["a"], expected)


def test_damage_on_the_disk_is_found_before_the_folder_exists(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "merged"
    target = merged(model, tokenizer_folder, out)
    target.begin()
    for name in model.names():
        target.add(name, model.tensor(name))
    shard = max(target.part.glob("*.part"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"\xff")
    with pytest.raises(StorageError, match="not what was written"):
        target.finish()
    target.close()
    assert not out.exists()


def test_without_a_tokenizer_nothing_begins(plain_base: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no tokenizer\.json"):
        merged(FoldedModel(plain_base, None), tmp_path, tmp_path / "merged")
