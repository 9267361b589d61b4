"""Original weights are taken only when the 4-bit base was made of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import DataError
from zephyr_lite.export.weights.base_weights import BaseWeights
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.export.weights.same_base import same_architecture


def changed(source: Path, folder: Path, change: Callable[[str, torch.Tensor], Any]) -> Path:
    """A copy in which `change` replaces tensors."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        save_file({k: change(k, v) for k, v in load_file(path).items()}, path)
    return folder


def check(original: Path, quantised: Path) -> None:
    same_architecture(BaseWeights(original), BaseWeights(quantised))


def test_the_checkpoint_it_was_made_of_passes(
    plain_base: Path, nf4_base: Path, nf4_bf16_base: Path, tmp_path: Path
) -> None:
    check(plain_base, nf4_base)
    check(plain_base, nf4_bf16_base)  # rounded to bf16 before it was quantised
    half = changed(plain_base, tmp_path / "half", lambda _, v: v.half())
    check(half, nf4_base)
    check(plain_base, plain_base)


def test_an_old_spelling_of_the_config_is_the_same_config(
    plain_base: Path, nf4_base: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(plain_base, tmp_path / "old"))
    config = json.loads((old / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    config["torch_dtype"] = config.pop("dtype", "float32")
    (old / "config.json").write_text(json.dumps(config))
    check(old, nf4_base)


def test_a_fine_tune_of_the_base_is_not_the_base(
    plain_base: Path, nf4_base: Path, tmp_path: Path
) -> None:
    """Every matrix moved by 2 % of its size, the embedding left alone: shapes and names fit."""
    generator = torch.Generator().manual_seed(1)

    def tune(name: str, weight: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(weight.shape, generator=generator)
        return weight + 0.02 * weight.std() * noise if "_proj" in name else weight

    other = changed(plain_base, tmp_path / "tuned", tune)
    FoldedModel(other, None)
    with pytest.raises(DataError, match=r"safetensors: tensor model\.layers.* holds other values"):
        check(other, nf4_base)


def test_another_embedding_is_named(plain_base: Path, nf4_base: Path, tmp_path: Path) -> None:
    def roll(name: str, weight: torch.Tensor) -> torch.Tensor:
        return weight.roll(1, 0).contiguous() if "embed" in name else weight

    other = changed(plain_base, tmp_path / "rolled", roll)
    with pytest.raises(DataError, match=r"model\.embed_tokens\.weight holds other values"):
        check(other, nf4_base)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("num_attention_heads", 4), ("vocab_size", 513), ("model_type", "x")],
)
def test_another_config_is_named(
    field: str, value: Any, plain_base: Path, nf4_base: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(plain_base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(DataError, match=rf"config\.json: .*{value if value == 'x' else field}"):
        check(other, nf4_base)


def test_other_shapes_names_and_quantised_originals_are_named(
    plain_base: Path, nf4_base: Path, tied_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"config\.json: model_type is 'llama'"):
        check(tied_base, nf4_base)

    def widen(name: str, weight: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight, weight[:1]]) if name == "model.norm.weight" else weight

    wider = changed(plain_base, tmp_path / "wider", widen)
    with pytest.raises(DataError, match=r"model\.norm\.weight has shape \[257\]"):
        check(wider, nf4_base)
    rename = {"model.norm.weight": "model.layer_norm.weight"}
    other = Path(shutil.copytree(plain_base, tmp_path / "renamed"))
    for path in other.glob("*.safetensors"):
        save_file({rename.get(k, k): v for k, v in load_file(path).items()}, path)
    (other / "model.safetensors.index.json").unlink()
    weights: dict[str, torch.Tensor] = {}
    for path in other.glob("*.safetensors"):
        weights |= load_file(path)
        path.unlink()
    save_file(weights, other / "model.safetensors")
    with pytest.raises(DataError, match=r"has besides tensor model\.layer_norm\.weight"):
        check(other, nf4_base)
    with pytest.raises(DataError, match="these are not the original weights"):
        check(nf4_base, nf4_base)


def test_an_adapter_folds_into_the_original_weights(
    plain_base: Path, nf4_base: Path, adapter: Path
) -> None:
    """The delta is the same; only what it is added to differs, by what 4 bits cost."""
    name = "model.layers.1.mlp.down_proj.weight"
    deltas = [
        FoldedModel(base, adapter).tensor(name) - FoldedModel(base, None).tensor(name)
        for base in (plain_base, nf4_base)
    ]
    assert torch.allclose(*deltas, rtol=0, atol=1e-6)
    apart = FoldedModel(plain_base, None).tensor(name) - FoldedModel(nf4_base, None).tensor(name)
    error = apart.norm() / FoldedModel(plain_base, None).tensor(name).norm()
    assert 0.05 < error < 0.13
