"""The GGUF file holds the model: same tensors as a known-good file, permuted, typed, whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.export import gguf as gguf_module
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.export.gguf import (
    check_architecture,
    check_gguf,
    permute_rotary,
    plan_tensors,
    write_gguf,
)
from zephyr_lite.storage import file_digest


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture
def plain(plain_base: Path) -> FoldedModel:
    return FoldedModel(plain_base, None)


@pytest.mark.parametrize("name", ["stories260k", "stories260k-mistral"])
def test_f32_equals_the_reference_file(name: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models" / name
    out = tmp_path / "x.gguf"
    write_gguf(FoldedModel(folder, None), folder, ZEPHYR_TEMPLATE, out, "f32", name=name)
    fields, tensors = read(out)
    expected_fields, expected = read(shared_data / "models/stories260k/reference-f32.gguf")
    # The reference spells the tied head out; without it llama.cpp takes the embedding.
    assert np.array_equal(expected.pop("output.weight").data, tensors["token_embd.weight"].data)
    assert tensors.keys() == expected.keys()
    for key, tensor in expected.items():
        assert np.array_equal(tensors[key].data, tensor.data), key
    for key, value in expected_fields.items():
        if key.startswith("llama.") or key in (
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.token_type",
            "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.add_space_prefix",
        ):
            assert fields[key] == value, key


def test_metadata_and_report(plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "m.gguf", []
    report = write_gguf(
        plain,
        tokenizer_folder,
        ZEPHYR_TEMPLATE,
        out,
        "q8_0",
        name="tiny zephyr",
        on_tensor=lambda *at: seen.append(at),
    )
    fields, tensors = read(out)
    assert fields["general.architecture"] == "llama"
    assert fields["general.name"] == "tiny zephyr"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == 2
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.attention.key_length"] == fields["llama.rope.dimension_count"] == 32
    assert fields["llama.rope.freq_base"] == 10000.0
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 512
    assert fields["tokenizer.chat_template"] == ZEPHYR_TEMPLATE
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert report["sha256"] == file_digest(out)
    assert report["bytes"] == out.stat().st_size
    assert report["tensors"] == len(tensors) == 21 and seen[-1] == (21, 21)
    assert report["parameters"] == sum(int(np.prod(plain.shape(n))) for n in plain.names())
    assert report["kept_f16"] == []
    kinds = {t.tensor_type.name for t in tensors.values()}
    assert kinds == {"F32", "Q8_0"}
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert not list(tmp_path.glob("*.part"))


def test_rows_that_do_not_divide_stay_f16(
    tied_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    model = FoldedModel(tied_base, None)
    report = write_gguf(model, tokenizer_folder, ZEPHYR_TEMPLATE, out, "q8_0", name="m")
    assert report["kept_f16"] == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]
    _, tensors = read(out)
    assert tensors["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0
    assert "output.weight" not in tensors


def test_permutation_pairs_the_rows_rotary_embedding_pairs() -> None:
    heads, half = 3, 4
    rows = torch.arange(heads * 2 * half).float()
    paired = permute_rotary(rows[:, None].expand(-1, 5), heads)[:, 0].reshape(heads, half, 2)
    assert torch.equal(paired[..., 1] - paired[..., 0], torch.full((heads, half), float(half)))
    assert torch.equal(permute_rotary(rows, heads), paired.flatten())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope scaling"),
        ({"rope_parameters": None}, "rope parameters"),
        ({"hidden_act": "gelu"}, "gelu"),
    ],
)
def test_other_architectures_are_refused(
    fields: dict[str, Any], message: str, plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    plain.config |= fields
    with pytest.raises(RecipeError, match=message):
        write_gguf(plain, tokenizer_folder, "t", tmp_path / "m.gguf", "f16", name="m")
    assert not list(tmp_path.iterdir())


def test_a_config_that_contradicts_the_weights_is_refused(plain: FoldedModel) -> None:
    plain.config["vocab_size"] = 500
    with pytest.raises(DataError, match="512 rows, vocab_size is 500"):
        plan_tensors(plain, "f16")
    del plain.config["vocab_size"]
    with pytest.raises(DataError, match=r"config\.json lacks vocab_size"):
        check_architecture(plain.config)


def test_the_older_spelling_of_rope_is_read(
    plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    del plain.config["rope_parameters"]
    plain.config |= {"rope_theta": 1e6, "rope_scaling": None, "sliding_window": 128}
    out = tmp_path / "m.gguf"
    report = write_gguf(plain, tokenizer_folder, "t", out, "f16", name="m")
    assert read(out)[0]["llama.rope.freq_base"] == 1e6
    assert "past 128 tokens" in report["notes"][0]


def test_a_missing_or_foreign_tensor_is_an_error(plain_base: Path, tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for path in plain_base.glob("*.safetensors"):
        tensors |= load_file(path)
    (tmp_path / "config.json").write_text((plain_base / "config.json").read_text())
    lost = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="20 weights, a model of 2 layers has 21"):
        plan_tensors(FoldedModel(tmp_path, None), "f16")
    save_file({**tensors, "model.vision.weight": lost}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.vision\.weight has no place"):
        plan_tensors(FoldedModel(tmp_path, None), "f16")


def test_a_value_beyond_fp16_names_its_tensor(
    plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    original = plain.tensor
    monkeypatch.setattr(plain, "tensor", lambda n: original(n) * (1e7 if n == name else 1))
    out = tmp_path / "m.gguf"
    with pytest.raises(DataError, match=r"k_proj\.weight does not fit fp16"):
        write_gguf(plain, tokenizer_folder, "t", out, "f16", name="m")
    assert not list(tmp_path.iterdir())


def test_an_earlier_file_survives_a_failed_export(
    plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("earlier")

    def killed(done: int, _: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(plain, tokenizer_folder, "t", out, "f16", name="m", on_tensor=killed)
    assert out.read_text() == "earlier"


def test_damage_is_seen_on_re_reading(
    plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "m.gguf"
    write_gguf(plain, tokenizer_folder, "t", out, "f16", name="m")
    plan = plan_tensors(plain, "f16")
    check_gguf(out, plan, "t")
    with pytest.raises(StorageError, match="verbatim"):
        check_gguf(out, plan, "t ")
    with pytest.raises(StorageError, match="not where or what"):
        check_gguf(out, plan_tensors(plain, "f32"), "t")
    with out.open("ab") as handle:
        handle.write(b"\0" * 32)
    with pytest.raises(StorageError, match="bytes, planned"):
        check_gguf(out, plan, "t")
    os.truncate(out, out.stat().st_size - 4096)
    with pytest.raises(StorageError):
        check_gguf(out, plan, "t")


def test_a_full_disk_is_known_before_anything_is_written(
    plain: FoldedModel, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage: Callable[[Path], Any] = lambda _: type("Usage", (), {"free": 1000})  # noqa: E731
    monkeypatch.setattr(gguf_module.shutil, "disk_usage", usage)
    with pytest.raises(MachineError, match="GiB free"):
        write_gguf(plain, tokenizer_folder, "t", tmp_path / "m.gguf", "f16", name="m")
    assert not list(tmp_path.iterdir())
