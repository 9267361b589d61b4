"""A file is read again by another reader and held against the model, or what it is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import StorageError
from zephyr_lite.export.check import reread
from zephyr_lite.export.check.reread import BOUNDS, verify_weights
from zephyr_lite.export.check.verify import ExportMismatch
from zephyr_lite.export.gguf.architecture import Architecture, read_architecture
from zephyr_lite.export.gguf.mixture import FILE_TYPES
from zephyr_lite.export.gguf.vocabulary import read_vocabulary
from zephyr_lite.export.weights.fold import FoldedModel


@pytest.fixture(scope="module")
def model(nf4_base: Path, adapter: Path) -> FoldedModel:
    return FoldedModel(nf4_base, adapter)


@pytest.fixture(scope="module")
def architecture(model: FoldedModel) -> Architecture:
    return read_architecture(model.config, {name: model.shape(name) for name in model.names()})


@pytest.fixture(scope="module")
def written(
    model: FoldedModel,
    tokenizer_folder: Path,
    write_gguf: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`written("q4_k_m")`: the model as that type, under the name of an unfinished file."""
    folder = tmp_path_factory.mktemp("written")

    def file(quant: str) -> Path:
        part = folder / f"{quant}.gguf.part"
        if not part.exists():
            out = folder / f"{quant}.gguf"
            write_gguf(model, tokenizer_folder, ZEPHYR_TEMPLATE, out, quant)
            out.rename(part)
        return part

    return file


@pytest.fixture
def compare(
    model: FoldedModel,
    architecture: Architecture,
    tokenizer_folder: Path,
    written: Callable[[str], Path],
) -> Callable[..., dict[str, Any]]:
    """Compare the file of a type with the model, or with what the options put in its place."""

    def run(quant: str, **options: Any) -> dict[str, Any]:
        vocabulary = read_vocabulary(tokenizer_folder, model.config["vocab_size"])
        return verify_weights(
            options.pop("path", None) or written(quant),
            options.pop("model", model),
            options.pop("architecture", architecture),
            dataclasses.replace(vocabulary, **options.pop("vocabulary", {})),
            options.pop("template", ZEPHYR_TEMPLATE),
            **options,
        )

    return run


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_every_type_passes(
    quant: str, compare: Callable[..., dict[str, Any]], model: FoldedModel
) -> None:
    seen: list[tuple[int, int]] = []
    report = compare(quant, on_tensor=lambda *at: seen.append(at))
    assert report["passed"]
    assert report["file"] == f"{quant}.gguf"
    assert report["type"] == FILE_TYPES[quant].name
    assert report["tensors"] == len(model.names()) == seen[-1][0] == seen[-1][1]
    # Weights that lie on NF4's values round back to them a little: 0.96 at four bits and below.
    assert report["adapters"][0]["kept"] == pytest.approx(1, abs=0.06)
    assert all(
        error < BOUNDS[gguf.GGMLQuantizationType[kind]]
        for kind, error in report["mean_error"].items()
    )
    json.dumps(report)


def refused(compare: Callable[..., dict[str, Any]], quant: str, **options: Any) -> dict[str, Any]:
    with pytest.raises(ExportMismatch) as caught:
        compare(quant, **options)
    assert caught.value.exit_code == 7
    return caught.value.report


@pytest.mark.parametrize("quant", ["f16", "q8_0", "q4_k_m", "q3_k_m"])
def test_unpermuted_rows_are_found(
    quant: str,
    compare: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Architecture, "stored", lambda self, name, weight: weight)
    failures = refused(compare, quant)["failures"]
    assert {f.split(" ")[0] for f in failures} - {"adapter"} == {
        f"blk.{layer}.attn_{which}.weight" for layer in (0, 1) for which in "qk"
    }


@pytest.mark.parametrize("quant", ["f16", "q4_k_m", "q3_k_m"])
def test_one_matrix_of_noise_is_found(
    quant: str,
    compare: Callable[..., dict[str, Any]],
    model: FoldedModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor, name = model.tensor, "model.layers.1.mlp.up_proj.weight"

    def noisy(wanted: str) -> torch.Tensor:
        weight = tensor(wanted)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        return weight + 0.3 * weight.std() * noise if wanted == name else weight

    monkeypatch.setattr(model, "tensor", noisy)
    report = refused(compare, quant)
    assert len(report["failures"]) == 1
    assert report["worst"]["tensor"] == "blk.1.ffn_up.weight"


def test_a_small_adapter_that_was_forgotten_is_found(
    compare: Callable[..., dict[str, Any]],
    nf4_base: Path,
    make_adapter: Callable[..., Path],
    tokenizer_folder: Path,
    write_gguf: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """Its change is far below the error of the type, and lies across it."""
    small = FoldedModel(nf4_base, make_adapter(nf4_base, lora_alpha=1))
    out = tmp_path / "x.gguf"
    options = {"model": small, "path": out}
    write_gguf(small, tokenizer_folder, ZEPHYR_TEMPLATE, out, "q3_k_m")
    assert compare("q3_k_m", **options)["adapters"][0]["kept"] == pytest.approx(1, abs=0.1)
    write_gguf(FoldedModel(nf4_base, None), tokenizer_folder, ZEPHYR_TEMPLATE, out, "q3_k_m")
    report = refused(compare, "q3_k_m", **options)
    (failure,) = report["failures"]
    assert failure.startswith("adapter 0 is there to ")
    assert abs(report["adapters"][0]["kept"]) < 0.1


def test_another_mixture_is_found(
    compare: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reread.kinds
    monkeypatch.setattr(
        reread,
        "kinds",
        lambda quant, *a, **k: real("q6_k" if quant == "q4_k_m" else quant, *a, **k),
    )
    failures = refused(compare, "q4_k_m")["failures"]
    assert "blk.0.ffn_gate.weight is Q4_K, of a q4_k_m file Q6_K" in failures


@pytest.mark.parametrize(
    ("options", "failure"),
    [
        ({"template": "{{ x }}"}, "tokenizer.chat_template is another"),
        ({"template": None}, "tokenizer.chat_template is foreign"),
        ({"vocabulary": {"eos": 0}}, "tokenizer.ggml.eos_token_id is another"),
        ({"vocabulary": {"scores": []}}, "tokenizer.ggml.scores is foreign"),
        ({"vocabulary": {"scores": [0.5] * 512}}, "tokenizer.ggml.scores is another"),
        ({"vocabulary": {"tokens": ["a"] * 512}}, "tokenizer.ggml.tokens is another"),
        ({"vocabulary": {"tokens": ["a"]}}, "tokenizer.ggml.tokens is another"),
        ({"vocabulary": {"merges": ["a b"]}}, "tokenizer.ggml.merges is missing"),
    ],
)
def test_another_vocabulary_or_template_is_found(
    options: dict[str, Any], failure: str, compare: Callable[..., dict[str, Any]]
) -> None:
    assert refused(compare, "q8_0", **options)["failures"] == [failure]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"norm_eps": 1e-4}, "llama.attention.layer_norm_rms_epsilon"),
        ({"context_length": 1024}, "llama.context_length"),
    ],
)
def test_other_facts_are_found(
    change: dict[str, Any],
    key: str,
    compare: Callable[..., dict[str, Any]],
    architecture: Architecture,
) -> None:
    other = dataclasses.replace(architecture, **change)
    assert refused(compare, "q8_0", architecture=other)["failures"] == [f"{key} is another"]


def test_missing_and_foreign_tensors_and_shapes_are_found(
    compare: Callable[..., dict[str, Any]], model: FoldedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, shape = model.names(), model.shape
    odd = "model.layers.0.mlp.up_proj.weight"
    monkeypatch.setattr(model, "shape", lambda name: (7, 256) if name == odd else shape(name))
    monkeypatch.setattr(model, "names", lambda: names[:-2])
    failures = refused(compare, "f16")["failures"]
    assert "output.weight is foreign" in failures
    assert "output_norm.weight is foreign" in failures
    assert "blk.0.ffn_up.weight has shape [448, 256], the model [7, 256]" in failures


def test_a_damaged_file_is_a_storage_error(
    compare: Callable[..., dict[str, Any]], written: Callable[[str], Path], tmp_path: Path
) -> None:
    data = written("q8_0").read_bytes()
    for name, damaged in (("short", data[:-4096]), ("head", data[:5000]), ("foreign", b"PK" * 99)):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(StorageError, match="is not readable as GGUF"):
            compare("q8_0", path=tmp_path / name)
    with pytest.raises(StorageError):
        compare("q8_0", path=tmp_path / "none")
