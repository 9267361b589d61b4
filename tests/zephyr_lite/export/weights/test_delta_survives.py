"""The smallest delta of a stack arrives in the file: the sum is rounded once, and not onto NF4.

A preference adapter changes a matrix by a thousandth of its size. What arrives of it is measured as
the projection of the realised change on it: what the file holds with the second adapter, minus what
it holds without, times the delta, over the delta squared. 1: all of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from gguf import GGMLQuantizationType as Kind
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from zephyr_lite.export.quants.blocks import encode_q8_0
from zephyr_lite.export.quants.k_quants import encode_q4_k
from zephyr_lite.export.weights.fold import FoldedModel

SHAPES = {"q_proj": (512, 512), "up_proj": (1024, 512), "down_proj": (512, 1024)}
SFT, DPO = 0.1, 0.001  # |delta| / |W|
Stored = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[FoldedModel, FoldedModel]:
    """The model with the SFT adapter, and with both."""
    root = tmp_path_factory.mktemp("stack")
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {"model.embed_tokens.weight": torch.randn(64, 512)}
    sizes: dict[str, float] = {}
    for layer in range(2):
        for module, shape in SHAPES.items():
            name = f"model.layers.{layer}.{module}.weight"
            # Heavier tails than normal, as trained matrices have.
            weight = (0.02 * torch.randn(shape) * (1 + torch.rand(shape[0], 1))).bfloat16()
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            parts = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
            tensors |= {name: packed, **parts}
            sizes[name] = weight.float().norm().item()
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    sft = adapter(root / "sft", sizes, SFT, rank=16)
    dpo = adapter(root / "dpo", sizes, DPO, rank=8)
    return FoldedModel(root, sft), FoldedModel(root, [sft, dpo])


def adapter(folder: Path, sizes: Mapping[str, float], relative: float, rank: int) -> Path:
    """A random adapter whose delta has that share of each matrix's norm."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        out, into = SHAPES[name.split(".")[3]]
        a, b = torch.randn(rank, into), torch.randn(out, rank)
        tensors[f"{key}.lora_A.weight"] = a
        tensors[f"{key}.lora_B.weight"] = b * (relative * size / (b @ a).norm())
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(SHAPES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def kept(folded: tuple[FoldedModel, FoldedModel], stored: Stored) -> np.ndarray:
    """Of each matrix, the share of the second delta that arrives in what `stored` gives back."""
    without, both = folded
    shares: list[float] = []
    for name in both.adapters[1].low_rank:
        a, b, scale = both.adapters[1].factors(name)
        delta = (scale * b @ a).double()
        change = stored(both.tensor(name)).double() - stored(without.tensor(name)).double()
        shares.append(float((change * delta).sum() / delta.square().sum()))
    return np.array(shares)


def through_gguf(encode: Any, kind: Kind, values: int) -> Stored:
    """What llama.cpp reads of a weight: its blocks by our encoder, read by `gguf`."""

    def stored(weight: torch.Tensor) -> torch.Tensor:
        blocks = encode(weight.reshape(-1, values)).numpy()
        rows = np.ascontiguousarray(blocks).view(np.uint8).reshape(weight.shape[0], -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, kind)).view(weight.shape)

    return stored


def test_the_second_delta_is_a_thousandth(folded: tuple[FoldedModel, FoldedModel]) -> None:
    without, both = folded
    for name in both.adapters[1].low_rank:
        change = both.tensor(name) - without.tensor(name)
        assert 0.0008 < change.norm() / without.tensor(name).norm() < 0.0012
    assert kept(folded, lambda weight: weight) == pytest.approx(1, abs=1e-4)


def test_q8_0_keeps_it(folded: tuple[FoldedModel, FoldedModel]) -> None:
    assert kept(folded, through_gguf(encode_q8_0, Kind.Q8_0, 32)).min() >= 0.95


def test_q4_k_keeps_most_of_it(folded: tuple[FoldedModel, FoldedModel]) -> None:
    assert kept(folded, through_gguf(encode_q4_k, Kind.Q4_K, 256)).mean() >= 0.85


def test_pefts_merge_into_nf4_storage_loses_it(folded: tuple[FoldedModel, FoldedModel]) -> None:
    """Why it is not done so: SFT merged into NF4 lies on its grid, whose half step is more."""
    _, both = folded
    shares: list[float] = []
    for name in both.adapters[1].low_rank:
        sft, dpo = (adapter.factors(name) for adapter in both.adapters)
        linear = merged_by_peft(linear_4bit(both.base.tensor(name)), *sft)
        before = dequantised(linear)
        change = dequantised(merged_by_peft(linear, *dpo)) - before
        delta = dpo[2] * dpo[1] @ dpo[0]
        shares.append(float((change * delta).sum() / delta.square().sum()))
    assert abs(np.mean(shares)) < 0.05


def linear_4bit(weight: torch.Tensor) -> Linear4bit:
    linear = Linear4bit(weight.shape[1], weight.shape[0], bias=False, quant_type="nf4")
    linear.weight = Params4bit(weight.bfloat16(), requires_grad=False, quant_type="nf4")
    return linear.to("cpu")  # this quantises


def dequantised(linear: Linear4bit) -> torch.Tensor:
    return dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()


def merged_by_peft(linear: Linear4bit, a: torch.Tensor, b: torch.Tensor, scale: float) -> Any:
    """PEFT's own `merge_and_unload` of one adapter into a 4-bit linear."""
    model = torch.nn.ModuleDict({"linear": linear})
    model.is_loaded_in_4bit = True  # what PEFT asks a model from transformers
    options: dict[str, Any] = {"r": len(a), "lora_alpha": scale * len(a)}
    peft: Any = get_peft_model(model, LoraConfig(target_modules=["linear"], **options))
    layer = peft.base_model.model["linear"]
    layer.lora_A["default"].weight.data = a.clone()
    layer.lora_B["default"].weight.data = b.clone()
    return peft.merge_and_unload()["linear"]
