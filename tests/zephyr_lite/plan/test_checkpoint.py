"""Bytes of a base from its headers: those of the model that is loaded from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.model.base import load_base, prepare
from zephyr_lite.plan.checkpoint import (
    KNOWN,
    Checkpoint,
    find_checkpoint,
    known_base,
    nf4_bytes,
    read_checkpoint,
)
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.headers import read_header
from zephyr_lite.recipe import Base

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64,
}  # fmt: skip


def loaded_bytes(model: Any) -> tuple[int, int, int]:
    """(bytes of decoder linears with their quantisation's tensors, of all else, parameters)."""
    linear = other = count = 0
    for name, weight in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Linear4bit) and name.endswith(".weight"):
            state = module.weight.quant_state
            held = [weight, state.absmax, state.code]
            if state.nested:
                held += [state.offset, state.state2.absmax, state.state2.code]
            linear += sum(t.nbytes for t in held)
            count += state.shape.numel()
        else:
            is_linear = isinstance(module, torch.nn.Linear) and ".layers." in name
            size = weight.nbytes
            linear, other = (linear + size, other) if is_linear else (linear, other + size)
            if is_linear and name.endswith(".bias"):
                linear, other = linear - size, other + size
            count += weight.numel()
    return linear, other, count


def sizes(found: Checkpoint) -> tuple[int, int, int]:
    return found.linear_bytes, found.other_bytes, found.parameters


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_loaded_model(
    tiny_mistral: Path, load_tiny: Callable, quantization: str, dtype: str
):
    fields = {"model": str(tiny_mistral), "quantization": quantization, "dtype": dtype}
    found = read_checkpoint(tiny_mistral, Base.model_validate(fields))
    assert sizes(found) == loaded_bytes(load_tiny(quantization, dtype))


def test_a_quantised_checkpoint_is_counted_as_found(tiny_nf4: Any, load_tiny: Callable):
    """Its own settings hold, whatever the recipe asks for."""
    base = Base.model_validate({"model": str(tiny_nf4.folder), "double_quant": False})
    found = read_checkpoint(tiny_nf4.folder, base, device="cpu")
    assert sizes(found) == loaded_bytes(load_tiny())


def test_single_quantisation_is_counted(tiny_mistral: Path):
    base = Base.model_validate({"model": str(tiny_mistral), "double_quant": False})
    files = prepare(base, CPU)
    truth = loaded_bytes(load_base(files, base, CPU))
    assert sizes(read_checkpoint(tiny_mistral, base, device="cpu")) == truth
    assert sizes(read_checkpoint(files.folder, base, device="cpu")) == truth


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
        (Qwen2ForCausalLM, Qwen2Config(**SMALL)),
        (Qwen3ForCausalLM, Qwen3Config(**SMALL)),
    ],
)
def test_sizes_alone_give_what_the_headers_give(kind: Any, config: Any, tmp_path: Path):
    """Tied heads, biases of q, k and v, norms of heads; the path of models known without files."""
    from zephyr_lite.plan import checkpoint

    model = kind(config)
    model.save_pretrained(tmp_path)
    base = Base.model_validate({"model": str(tmp_path), "quantization": "none"})
    found = read_checkpoint(tmp_path, base, device="cpu")
    assert sizes(found) == loaded_bytes(model)
    assert sizes(checkpoint._expected(found.geometry, base, "cpu", "")) == sizes(found)
    quantised = base.model_copy(update={"quantization": "nf4"})
    expected = checkpoint._expected(found.geometry, quantised, "cpu", "")
    assert sizes(expected) == sizes(read_checkpoint(tmp_path, quantised, device="cpu"))


def test_a_tied_head_in_the_file_is_counted_once(tiny_mistral: Path, tmp_path: Path):
    shutil.copytree(tiny_mistral, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = Base.model_validate({"model": str(tmp_path)})
    head = 2 * config["vocab_size"] * config["hidden_size"]
    before = read_checkpoint(tiny_mistral, base)
    assert read_checkpoint(tmp_path, base).other_bytes == before.other_bytes - head


def test_a_sharded_checkpoint_is_read_by_its_index(tiny_mistral: Path, tmp_path: Path):
    tensors = load_file(tiny_mistral / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, members in parts.items():
        save_file({n: tensors[n] for n in members}, tmp_path / file)
    # The same weights once more, as some repositories have them; the index does not name it.
    save_file(tensors, tmp_path / "consolidated.safetensors")
    placed = {name: file for file, members in parts.items() for name in members}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    (tmp_path / "config.json").write_bytes((tiny_mistral / "config.json").read_bytes())
    base = Base.model_validate({"model": str(tmp_path)})
    assert sizes(read_checkpoint(tmp_path, base)) == sizes(read_checkpoint(tiny_mistral, base))

    index.write_text(json.dumps({"weight_map": placed | {"model.lost": "a.safetensors"}}))
    with pytest.raises(StorageError, match=r"lacks model\.lost"):
        read_checkpoint(tmp_path, base)
    index.write_text(json.dumps({"weight_map": {"w": "../elsewhere.safetensors"}}))
    with pytest.raises(StorageError, match="no sound weight_map"):
        read_checkpoint(tmp_path, base)


def _header(**entry: Any) -> bytes:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\xff" * 8 + bytes(8), "a header of 18446744073709551615 bytes"),
        (_header()[:-3], "a header of"),
        ((9).to_bytes(8, "little") + b"{'w': 1} " + bytes(8), "not JSON"),
        ((9).to_bytes(8, "little") + b'{"w": \xff\xfe}', "not JSON"),
        ((2).to_bytes(8, "little") + b"[]", "not an object"),
        (_header() + bytes(7), "bytes, and its header says"),
        (_header(dtype="F99") + bytes(8), "the entry of w is unsound"),
        (_header(shape=[3]) + bytes(8), "the entry of w is unsound"),
        (_header(shape=[-2]) + bytes(8), "the entry of w is unsound"),
        (_header(data_offsets=[0]) + bytes(8), "the entry of w is unsound"),
    ],
)
def test_a_damaged_header_is_a_clear_error(content: bytes, message: str, tmp_path: Path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(StorageError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


def test_mistral_is_known_without_a_file():
    found = known_base("mistralai/Mistral-7B-v0.1")
    assert found is not None
    assert found.parameters == 7_241_732_096
    assert found.linear_bytes / 1e9 == pytest.approx(3.60, abs=0.005)
    norms = 65 * 4096 * 2
    assert found.other_bytes - norms == 2 * 2 * 32000 * 4096  # 0.524 GB of embedding and head


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("Qwen/Qwen3-8B", 8_190_735_360),
    ],
)
def test_known_models_have_their_published_parameters(model: str, parameters: int):
    found = known_base(model)
    assert found is not None and found.parameters == parameters


def test_what_is_known_follows_the_recipe():
    base = Base.model_validate({"model": "Qwen/Qwen3-8B", "quantization": "none"})
    plain = known_base(base.model, base)
    assert plain is not None
    assert plain.linear_bytes == 2 * KNOWN[base.model].weights
    assert known_base("somebody/else") is None


def test_double_quantisation_saves_what_is_published():
    single, double = (nf4_bytes(4096 * 4096, double_quant=d) for d in (False, True))
    assert 8 * (single - double) / 4096**2 == pytest.approx(0.373, abs=0.001)  # bits a weight


def test_a_base_is_found_where_a_training_finds_it(tiny_mistral: Path, tmp_path: Path):
    local = find_checkpoint(Base.model_validate({"model": str(tiny_mistral)}), offline=True)
    assert local.source == "headers of its files"
    known = find_checkpoint(Base.model_validate({"model": "Qwen/Qwen2.5-7B"}), offline=True)
    assert known.source == "known sizes of Qwen/Qwen2.5-7B"
    with pytest.raises(MachineError, match="nor known here"):
        find_checkpoint(Base.model_validate({"model": "somebody/else"}), offline=True)
    with pytest.raises(RecipeError, match=r"no config\.json"):
        find_checkpoint(Base.model_validate({"model": str(tmp_path)}), offline=True)


def test_the_copy_of_the_hub_wins_only_when_it_is_whole(
    tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / ("0" * 40)
    (commit.parents[1] / "refs").mkdir(parents=True)
    (commit.parents[1] / "refs" / "main").write_text("0" * 40)
    commit.mkdir(parents=True)
    base = Base.model_validate({"model": "Qwen/Qwen3-8B"})
    shutil.copy(tiny_mistral / "config.json", commit)
    assert find_checkpoint(base, offline=True).geometry == KNOWN[base.model]  # half a copy is none
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copy(tiny_mistral / name, commit)
    whole = read_checkpoint(tiny_mistral, base)
    assert find_checkpoint(base, offline=True) == whole


def test_a_base_to_be_built_has_the_sizes_of_the_recipe():
    build = {
        "text": "package:text.jsonl", "tokenizer": "package:tokenizer.json", "hidden_size": 64,
        "intermediate_size": 128, "layers": 2, "heads": 4, "kv_heads": 2,
    }  # fmt: skip
    base = Base.model_validate({"model": "micro", "build": build})
    found = find_checkpoint(base, offline=True, device="cpu")
    vocabulary = found.geometry.vocabulary
    assert found.geometry == Geometry("mistral", 2, 64, 128, 4, 2, 16, vocabulary)
    build["tokenizer"] = "package:text.jsonl"
    wrong = Base.model_validate({"model": "micro", "build": build})
    with pytest.raises(DataError, match="not a tokenizer"):
        find_checkpoint(wrong, offline=True)
