"""The GGUF file holds the model: same tensors as a known-good one, typed, whole, twice the same."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.gguf.target import GgufTarget, Planned, check_gguf
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.storage import file_digest


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.fixture
def plain(plain_base: Path) -> FoldedModel:
    return FoldedModel(plain_base, None)


@pytest.fixture
def target(tokenizer_folder: Path, tmp_path: Path) -> Callable[..., GgufTarget]:
    """`target(model, quant)` is a GGUF in the making."""

    def make(model: FoldedModel, quant: str, **options: Any) -> GgufTarget:
        usual = {"name": "m", "identity": "id", "routes": {}}
        folder, template = options.pop("folder", tokenizer_folder), options.pop("template", "t")
        out = tmp_path / f"m-{quant}.gguf"
        return GgufTarget(model, folder, template, out, quant, **{**usual, **options})

    return make


@pytest.fixture
def write(target: Callable[..., GgufTarget]) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """`write(model, quant)` -> (file, entry of the report)."""

    def make(model: FoldedModel, quant: str, **options: Any) -> tuple[Path, dict[str, Any]]:
        made = target(model, quant, **options)
        (report,) = stream(model, [made])
        made.commit()
        return made.part.with_suffix(""), report

    return make


Write = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.mark.parametrize("name", ["stories260k", "stories260k-mistral"])
def test_f32_equals_the_reference_file(name: str, shared_data: Path, write: Write) -> None:
    folder = shared_data / "models" / name
    out, _ = write(FoldedModel(folder, None), "f32", folder=folder, template=ZEPHYR_TEMPLATE)
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


def test_metadata_and_report(plain: FoldedModel, write: Write) -> None:
    metadata = {
        "general.license": "apache-2.0",
        "general.base_model.0.name": "the base",
        "general.base_model.0.repo_url": "https://huggingface.co/some/base",
    }
    out, report = write(
        plain, "q8_0", name="tiny zephyr", template=ZEPHYR_TEMPLATE, metadata=metadata
    )
    fields, tensors = read(out)
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "model"
    assert fields["general.name"] == "tiny zephyr"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == 2
    assert fields["general.base_model.count"] == 1
    assert metadata.items() <= fields.items()
    assert fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.vocab_size"] == len(fields["tokenizer.ggml.tokens"]) == 512
    assert fields["tokenizer.chat_template"] == ZEPHYR_TEMPLATE
    assert report["file"] == "m-q8_0.gguf" and report["quant"] == "q8_0"
    assert report["sha256"] == file_digest(out)
    assert report["bytes"] == out.stat().st_size
    assert report["tensors"] == len(tensors) == 21
    assert report["parameters"] == sum(int(np.prod(plain.shape(n))) for n in plain.names())
    assert report["fallback"] == {} and report["notes"] == []
    assert report["kinds"] == {"Q8_0": 16, "F32": 5}
    assert tensors["blk.0.attn_norm.weight"].tensor_type == Kind.F32
    assert list(out.parent.iterdir()) == [out]


def test_the_trained_weights_are_in_it(nf4_base: Path, adapter: Path, write: Write) -> None:
    model = FoldedModel(nf4_base, adapter)
    out, _ = write(model, "f16")
    _, tensors = read(out)
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.v_proj", "attn_v")):
        expected = model.tensor(f"model.layers.1.{ours}.weight").to(torch.float16).numpy()
        assert np.array_equal(tensors[f"blk.1.{theirs}.weight"].data, expected)


def test_rows_that_do_not_divide_fall_back_and_it_is_said(tied_base: Path, write: Write) -> None:
    out, report = write(FoldedModel(tied_base, None), "q8_0")
    assert report["fallback"] == {f"blk.{i}.ffn_down.weight": "F16" for i in range(2)}
    _, tensors = read(out)
    assert tensors["blk.0.ffn_down.weight"].tensor_type == Kind.F16
    assert tensors["blk.0.ffn_up.weight"].tensor_type == Kind.Q8_0
    assert "output.weight" not in tensors


def test_factors_of_rope_are_stored_though_the_model_has_no_such_tensor(
    plain: FoldedModel, target: Callable[..., GgufTarget], write: Write
) -> None:
    plain.config["architectures"] = ["LlamaForCausalLM"]
    plain.config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    stopped = target(plain, "q8_0")
    stopped.begin()
    stopped.close()
    out, report = write(plain, "q8_0")  # goes on behind them
    _, tensors = read(out)
    factors = tensors["rope_freqs.weight"]
    assert factors.tensor_type == Kind.F32 and factors.data.shape == (16,)
    assert factors.data[0] == 1 and factors.data[-1] == 8
    assert report["tensors"] == 22


def test_the_same_inputs_give_the_same_file(plain: FoldedModel, write: Write) -> None:
    out, first = write(plain, "q8_0")
    once = out.read_bytes()
    _, second = write(plain, "q8_0")
    assert out.read_bytes() == once
    assert first == second


def test_what_decides_the_bytes_starts_afresh(
    plain: FoldedModel, target: Callable[..., GgufTarget]
) -> None:
    name = plain.names()[0]

    def stands(**options: Any) -> bool:
        made = target(plain, "q8_0", **options)
        made.begin()
        found = made.has(name)
        if not found:
            made.add(name, plain.tensor(name))
        made.close()
        return found

    assert not stands()
    assert stands()
    assert not stands(identity="of another adapter")
    assert not stands(template="another template")
    assert not stands(template="another template", routes={Kind.Q8_0: "ggml"})
    assert stands(template="another template", routes={Kind.Q8_0: "ggml"})
    # A route of a type that the file does not hold is nothing to it.
    assert stands(template="another template", routes={Kind.Q8_0: "ggml", Kind.Q4_K: "ggml"})


def test_weights_are_not_changed(plain: FoldedModel, target: Callable[..., GgufTarget]) -> None:
    made = target(plain, "f32")
    made.begin()
    for name in plain.names():
        weight = plain.tensor(name)
        before = weight.clone()
        made.add(name, weight)
        assert torch.equal(weight, before), name
    made.close()


def test_q8_0_is_near_the_model(plain: FoldedModel, write: Write) -> None:
    _, tensors = read(write(plain, "q8_0")[0])
    tensor = tensors["blk.0.ffn_down.weight"]
    expected = plain.tensor("model.layers.0.mlp.down_proj.weight").numpy()
    error = np.abs(dequantize(tensor.data, tensor.tensor_type) - expected).max()
    assert error <= np.abs(expected).max() / 127


def test_what_cannot_be_exported_is_refused_before_a_file_appears(
    plain: FoldedModel, target: Callable[..., GgufTarget], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="beyond the model's"):
        target(plain, "f16", context_length=10**6)
    plain.config["architectures"] = ["GPT2LMHeadModel"]
    with pytest.raises(RecipeError, match="GPT2LMHeadModel"):
        target(plain, "f16")
    assert not list(tmp_path.iterdir())


def test_a_header_that_finds_no_room_is_an_error_of_storage(
    plain: FoldedModel, target: Callable[..., GgufTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(StorageError, match="/nowhere: cannot be written"):
        target(plain, "f16")


def test_a_value_beyond_fp16_names_its_tensor(
    plain: FoldedModel, target: Callable[..., GgufTarget], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    original = plain.tensor
    monkeypatch.setattr(plain, "tensor", lambda n: original(n) * (1e7 if n == name else 1))
    with pytest.raises(DataError, match=r"k_proj\.weight does not fit float16"):
        stream(plain, [target(plain, "f16")])


def test_damage_is_seen_on_re_reading(plain: FoldedModel, write: Write) -> None:
    out, _ = write(plain, "f16")
    plan = [
        Planned(t.name, tuple(int(n) for n in reversed(t.shape)), t.tensor_type)
        for t in gguf.GGUFReader(out).tensors
    ]
    check_gguf(out, plan, "t")
    with pytest.raises(StorageError, match="verbatim"):
        check_gguf(out, plan, "t ")
    with pytest.raises(StorageError, match="holds 21 tensors, planned 20"):
        check_gguf(out, plan[1:], "t")
    at = next(i for i, t in enumerate(plan) if t.name == "blk.0.ffn_down.weight")
    name, shape = plan[at].name, plan[at].shape
    for wrong in (
        Planned("blk.0.ffn_gone.weight", shape, Kind.F16),
        Planned(name, shape, Kind.BF16),
        Planned(name, shape[::-1], Kind.F16),
    ):
        with pytest.raises(StorageError, match=r"ffn_down\.weight is not where or what"):
            check_gguf(out, [*plan[:at], wrong, *plan[at + 1 :]], "t")
    for shift in (-32, 32, 1):  # over the tensor before it, away from it, out of line
        offset = gguf.GGUFReader(out, "r+").tensors[at].field.parts[-1]
        offset[0] = int(offset[0]) + shift
        with pytest.raises(StorageError):
            check_gguf(out, plan, "t")
        offset[0] = int(offset[0]) - shift
    check_gguf(out, plan, "t")
    with out.open("ab") as handle:
        handle.write(b"\0" * 32)
    with pytest.raises(StorageError, match="bytes, planned"):
        check_gguf(out, plan, "t")
    os.truncate(out, out.stat().st_size - 4096)
    with pytest.raises(StorageError):
        check_gguf(out, plan, "t")
