"""What is packed unpacks to the nearest values, and the package that owns the format agrees."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.folders.compressed_tensors import DIVISORS, PackedTarget, pack, quantise
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(3))
Q0, DOWN0 = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def packed(model: FoldedModel, tokenizer: Path, out: Path, **options: Any) -> PackedTarget:
    dtype = options.pop("dtype", "float16")
    return PackedTarget(
        model, tokenizer, ZEPHYR_TEMPLATE, out, dtype, **{"identity": "one", **options}
    )


def write(target: PackedTarget, model: FoldedModel) -> dict[str, Any]:
    (report,) = stream(model, [target])
    target.commit()
    return report


def unpacked(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """s (nibble - 8), nibble by nibble, from the format's description."""
    words = tensors[f"{module}.weight_packed"]
    scales = tensors[f"{module}.weight_scale"]
    rows, columns = tensors[f"{module}.weight_shape"].tolist()
    assert words.dtype == torch.int32 and words.shape == (rows, columns // 8)
    codes = torch.stack([(words >> 4 * i & 15) - 8 for i in range(8)], dim=-1).flatten(1)
    return codes.to(scales.dtype) * scales.repeat_interleave(columns // scales.shape[1], dim=1)


def dequantised(codes_RC: torch.Tensor, scales_RG: torch.Tensor) -> torch.Tensor:
    group_size = codes_RC.shape[1] // scales_RG.shape[1]
    return codes_RC.float() * scales_RG.float().repeat_interleave(group_size, dim=1)


def test_the_order_of_nibbles() -> None:
    codes = torch.tensor([[-8, -7, 0, 1, 2, 7, -1, -8]], dtype=torch.int8)
    assert pack(codes).tolist() == [[0x07FA9810]]
    assert pack(torch.full((2, 16), 7, dtype=torch.int8)).tolist() == [[-1, -1], [-1, -1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_are_the_nearest_and_scales_the_best_offered(dtype: torch.dtype) -> None:
    weight = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] *= 1e-3
    before = weight.clone()
    codes, scales = quantise(weight, 64, dtype)
    assert torch.equal(weight, before)
    assert scales.dtype == dtype and scales.shape == (300, 4)
    assert codes.min() >= -8 and codes.max() <= 7
    steps = scales.float().repeat_interleave(64, dim=1)
    inside = (weight / steps > -8) & (weight / steps < 7)
    error = (dequantised(codes, scales) - weight).abs()
    assert (error[inside] <= steps[inside] * 0.5001).all()
    # Each group against each divisor, one at a time.
    groups = weight.reshape(-1, 64)
    ours = error.reshape(-1, 64).square().sum(dim=1)
    for divisor in DIVISORS:
        step = (groups.abs().amax(dim=1, keepdim=True) / divisor).to(dtype).float()
        plain = ((groups / step).round().clamp(-8, 7) * step - groups).square().sum(dim=1)
        assert (ours <= plain * 1.0001).all()
    plain = (groups.abs().amax(dim=1, keepdim=True) / 7.5).to(dtype).float()
    plain = ((groups / plain).round().clamp(-8, 7) * plain - groups).square().sum()
    assert ours.sum() < 0.9 * plain


def test_zeros_and_what_is_close_to_them() -> None:
    weight = torch.zeros(2, 128)
    weight[1, 0] = 1e-9
    codes, scales = quantise(weight, 64, torch.float16)
    assert not codes.any()
    assert (scales > 0).all() and scales.isfinite().all()


def test_chunks_do_not_show() -> None:
    weight = torch.randn(9000, 128, generator=torch.Generator().manual_seed(1))
    codes, scales = quantise(weight, 128, torch.float16)
    last, last_scales = quantise(weight[8190:], 128, torch.float16)
    assert torch.equal(codes[8190:], last) and torch.equal(scales[8190:], last_scales)


def test_every_stored_weight_is_near_the_models(
    nf4_base: Path, adapter: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(nf4_base, adapter), tmp_path / "w4a16"
    target = packed(model, tokenizer_folder, out)
    report = write(target, model)
    tensors = load_file(out / "model.safetensors")
    assert report["group_size"] == 64  # down_proj's rows are 448 long
    assert report["tensors"] == len(tensors)
    assert report["format"] == "pack-quantized" and report["notes"] == []
    files = [path for path in out.iterdir() if path.name != "MANIFEST.json"]
    assert target.nbytes == sum(path.stat().st_size for path in files)
    for name in model.names():
        weight, module = model.tensor(name), name.removesuffix(".weight")
        if "proj" not in name:
            assert torch.equal(tensors[name], weight.half())
            continue
        assert name not in tensors
        error = unpacked(tensors, module).float() - weight
        assert error.norm() < 0.11 * weight.norm(), name


def test_the_config_names_what_is_packed(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "w4a16"
    write(packed(model, tokenizer_folder, out, dtype="bfloat16"), model)
    config = json.loads((out / "config.json").read_text())
    stated = config["quantization_config"]
    assert config["dtype"] == "bfloat16"
    assert (stated["quant_method"], stated["format"]) == ("compressed-tensors", "pack-quantized")
    group = stated["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    assert group["weights"]["group_size"] == 64 and group["weights"]["num_bits"] == 4
    assert stated["ignore"] == ["lm_head"]
    assert load_file(out / "model.safetensors")[f"{Q0}.weight_scale"].dtype == torch.bfloat16


def test_a_matrix_whose_rows_are_no_groups_stays_and_is_named(
    plain_base: Path, tied_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(plain_base, None), tmp_path / "w4a16"
    for layer in (0, 1):  # 448 columns become 440
        model._shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (256, 440)
    tensor = model.tensor
    model.tensor = lambda n: tensor(n)[:, :440] if "down" in n else tensor(n)  # type: ignore[method-assign]
    report = write(packed(model, tokenizer_folder, out), model)
    assert report["group_size"] == 128  # what is left has rows of 256
    assert [note.split(":")[0] for note in report["notes"]] == [DOWN0, DOWN0.replace("0", "1")]
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["ignore"][1:] == [DOWN0, DOWN0.replace("0", "1")]
    assert load_file(out / "model.safetensors")[f"{DOWN0}.weight"].shape == (256, 440)
    with pytest.raises(RecipeError, match="no matrix"):  # rows of 96 and 172
        packed(FoldedModel(tied_base, None), tokenizer_folder, tmp_path / "none")


def test_what_does_not_fit_is_refused(
    plain_base: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model = FoldedModel(plain_base, None)
    for options in ({"dtype": "float32"}, {"group_size": 32}):
        with pytest.raises(RecipeError, match="W4A16"):
            packed(model, tokenizer_folder, tmp_path / "x", **options)
    target = packed(model, tokenizer_folder, tmp_path / "x")
    target.begin()
    for name in model.names()[:2]:
        target.add(name, model.tensor(name))
    with pytest.raises(DataError, match=rf"scales of tensor {Q0}\.weight do not fit"):
        target.add(f"{Q0}.weight", model.tensor(f"{Q0}.weight") * 1e8)
    target.close()


@pytest.mark.parametrize("count", [3, 4])
def test_a_kill_between_the_parts_of_a_matrix(
    count: int,
    plain_base: Path,
    tokenizer_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = FoldedModel(plain_base, None)
    whole = write(packed(model, tokenizer_folder, tmp_path / "whole"), model)
    written: list[str] = []
    append = PartFile.append

    def stopping(file: PartFile, name: str, data: Any) -> None:
        if len(written) == count:
            raise KeyboardInterrupt
        written.append(name)
        append(file, name, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartFile, "append", stopping)
        write(packed(model, tokenizer_folder, tmp_path / "w4a16"), model)
    assert written[2:3] == [f"{Q0}.weight_packed"]
    again = write(packed(model, tokenizer_folder, tmp_path / "w4a16"), model)
    assert again["files"] == whole["files"]


@pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None,
    reason="the package compressed-tensors is not installed",
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_package_reads_the_same_model(
    dtype: str, nf4_base: Path, adapter: Path, tokenizer_folder: Path, tmp_path: Path
) -> None:
    model, out = FoldedModel(nf4_base, adapter), tmp_path / "w4a16"
    write(packed(model, tokenizer_folder, out, dtype=dtype), model)
    theirs = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    tensors = load_file(out / "model.safetensors")
    state = {k: v for k, v in tensors.items() if ".weight_" not in k}
    for key in tensors:
        if key.endswith(".weight_packed"):
            module = key.removesuffix(".weight_packed")
            state[f"{module}.weight"] = unpacked(tensors, module)
    ours = AutoModelForCausalLM.from_config(
        type(theirs.config)(**model.config), dtype=getattr(torch, dtype)
    )
    ours.load_state_dict(state)
    with torch.no_grad():
        expected, found = ours.eval()(IDS).logits, theirs.eval()(IDS).logits
    assert torch.equal(expected, found)
