"""Every spelling in which PEFT and trainers leave LoRA behind means what PEFT computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.export.weights.lora_config import is_targeted

Q0 = "model.layers.0.self_attn.q_proj"
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|mlp).*?(?:q_proj|v_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|v_proj)))"
)


def respell(folder: Path, change: Callable[[str], str], dtype: torch.dtype | None = None) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {change(k): v if dtype is None else v.to(dtype) for k, v in load_file(path).items()}
    save_file(tensors, path)


def set_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def folded(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = FoldedModel(base, adapter)
    return {name: model.tensor(name) for name in model.names()}


def merged_by_peft(base: Path, folder: Path, *, rows: int | None = None, **options: Any) -> Any:
    """Save a random adapter by PEFT's own default of what to save; return PEFT's merged weights."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    peft: Any = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options))
    for _, parameter in peft.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter.data) * 0.05
    peft.save_pretrained(folder)
    return peft.merge_and_unload().state_dict()


def test_a_state_dict_saved_as_it_is(plain_base: Path, make_adapter: Callable[..., Path]) -> None:
    adapter = make_adapter(plain_base)
    expected = folded(plain_base, adapter)
    respell(adapter, lambda key: key.replace(".weight", ".default.weight"))
    for name, weight in folded(plain_base, adapter).items():
        assert torch.equal(weight, expected[name])


def test_two_adapters_in_one_file_are_refused(
    plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    more = {k.replace(".weight", ".dpo.weight"): v.clone() for k, v in tensors.items()}
    save_file(tensors | more, path)
    with pytest.raises(DataError, match="holds two adapters"):
        FoldedModel(plain_base, adapter)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_factors_are_widened_before_they_are_multiplied(
    dtype: torch.dtype, plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base)
    respell(adapter, lambda key: key, dtype)
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{Q0}.lora_{side}.weight"].double() for side in "AB")
    before = FoldedModel(plain_base, None).tensor(f"{Q0}.weight").double()
    after = FoldedModel(plain_base, adapter).tensor(f"{Q0}.weight").double()
    assert torch.allclose(after, before + 12 / 8 * b @ a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"target_modules": ["embed_tokens", "q_proj"]}, None),
        ({"target_modules": ["q_proj", "lm_head"]}, None),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, None),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, 520),
        ({"target_modules": ["q_proj"]}, 520),
        ({"target_modules": ["q_proj"]}, 448),
        ({"target_modules": ["q_proj", "lm_head", "embed_tokens"]}, 520),
    ],
    ids=["embedding", "head", "both", "saved", "grown", "shrunk", "both on a grown one"],
)
@pytest.mark.filterwarnings("ignore")
def test_embeddings_heads_and_resized_vocabularies(
    options: dict[str, Any], rows: int | None, plain_base: Path, tmp_path: Path
) -> None:
    expected = merged_by_peft(plain_base, tmp_path / "a", rows=rows, **options)
    model = FoldedModel(plain_base, tmp_path / "a")
    assert set(model.names()) == set(expected)
    for name in model.names():
        assert torch.allclose(model.tensor(name), expected[name], rtol=0, atol=1e-5), name
    assert model.config["vocab_size"] == (rows or 512)
    assert model.shape("lm_head.weight")[0] == (rows or 512)


@pytest.mark.filterwarnings("ignore")
def test_a_tied_vocabulary_that_was_resized_stays_tied(tied_base: Path, tmp_path: Path) -> None:
    expected = merged_by_peft(tied_base, tmp_path / "a", rows=520, target_modules=["q_proj"])
    model = FoldedModel(tied_base, tmp_path / "a")
    assert model.config["tie_word_embeddings"] is True and model.config["vocab_size"] == 520
    name = "model.embed_tokens.weight"
    assert torch.equal(model.tensor(name), expected[name])
    assert "lm_head.weight" not in model.names()


@pytest.mark.filterwarnings("ignore")
def test_a_head_resized_without_its_embedding_is_refused(plain_base: Path, tmp_path: Path) -> None:
    """PEFT itself saves such an adapter: of a resized vocabulary only the targeted end."""
    targets = ["q_proj", "lm_head"]
    merged_by_peft(plain_base, tmp_path / "a", rows=520, target_modules=targets)
    with pytest.raises(DataError, match=r"lm_head.weight has 520 rows, model.embed_tokens.* 512"):
        FoldedModel(plain_base, tmp_path / "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": UNSLOTH},
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r".*(k|o|gate|up|down)_proj"},
        {"target_modules": ["q_proj", "v_proj", "k_proj"], "exclude_modules": ["k_proj"]},
    ],
    ids=["unsloth", "regex", "list", "all-linear", "exclude"],
)
def test_a_truncated_adapter_is_seen_however_targets_are_written(
    fields: dict[str, Any], plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base, target_modules=["q_proj", "v_proj"])
    set_config(adapter, **fields)
    FoldedModel(plain_base, adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "layers.1.self_attn.v" not in k}, path)
    with pytest.raises(DataError, match=r"targets model.layers.1.self_attn.v_proj and holds no"):
        FoldedModel(plain_base, adapter)


def test_layers_that_were_not_to_be_trained_are_not_missed(
    plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base, layers_to_transform=[1], target_modules=["q_proj"])
    assert FoldedModel(plain_base, adapter).adapters[0].low_rank.keys() == {
        "model.layers.1.self_attn.q_proj.weight"
    }
    set_config(adapter, layers_to_transform=[0, 1])
    with pytest.raises(DataError, match=r"targets model.layers.0.self_attn.q_proj"):
        FoldedModel(plain_base, adapter)


def test_layers_pattern() -> None:
    config = {"target_modules": ["up"], "layers_to_transform": 3, "layers_pattern": "h"}
    assert is_targeted(config, "model.h.3.up", False)
    assert not is_targeted(config, "model.h.4.up", False)
    assert not is_targeted(config, "model.layers.3.up", False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "eight"}, "r: 'eight' is not a rank"),
        ({"r": 0}, "r: 0 is not a rank"),
        ({"lora_alpha": None}, "lora_alpha: None is not a number"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "q_proj: 2.5 is not a rank"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern: '\\(' is not a pattern"),
        ({"target_modules": "*_proj"}, "target_modules: '\\*_proj' is not a pattern"),
    ],
)
def test_values_that_are_none_are_named(
    fields: dict[str, Any], message: str, plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base)
    set_config(adapter, **fields)
    with pytest.raises((DataError, RecipeError), match=f"adapter_config.json: {message}"):
        FoldedModel(plain_base, adapter)


def test_one_matrix_under_two_names_must_be_one(
    plain_base: Path, make_adapter: Callable[..., Path]
) -> None:
    adapter = make_adapter(plain_base, modules_to_save=["lm_head"])
    path, head = adapter / "adapter_model.safetensors", "base_model.model.lm_head"
    tensors = load_file(path)
    tensors[f"{head}.modules_to_save.weight"] = tensors[f"{head}.weight"].clone()
    save_file(tensors, path)
    FoldedModel(plain_base, adapter)
    tensors[f"{head}.modules_to_save.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(DataError, match=r"holds two of lm_head\.weight"):
        FoldedModel(plain_base, adapter)
