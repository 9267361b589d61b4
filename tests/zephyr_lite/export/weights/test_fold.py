"""The folded model is what PEFT computed in training, and what does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.fold import FoldedModel

IDS = torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(3))
Build = Callable[[FoldedModel], torch.nn.Module]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def copied(source: Path, folder: Path) -> Path:
    """A copy a test may spoil."""
    return Path(shutil.copytree(source, folder))


def edit_config(folder: Path, **fields: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], name: str = "adapter_model"
) -> Path:
    path = folder / f"{name}.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def logits_of_model(folded: FoldedModel) -> torch.Tensor:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**folded.config))
    model.load_state_dict({name: folded.tensor(name) for name in folded.names()}, strict=False)
    with torch.no_grad():
        return model.float().eval()(IDS).logits


def logits_of(build: Build, base: Path, adapter: Path | None) -> torch.Tensor:
    with torch.no_grad():
        return build(FoldedModel(base, adapter))(IDS).logits


def test_plain_base_is_reproduced_bit_for_bit(plain_base: Path) -> None:
    folded = FoldedModel(plain_base, None)
    stored: dict[str, torch.Tensor] = {}
    for path in plain_base.glob("*.safetensors"):
        stored |= load_file(path)
    assert set(folded.names()) == set(stored)
    for name in folded.names():
        assert folded.shape(name) == tuple(stored[name].shape)
        assert torch.equal(folded.tensor(name), stored[name])


def test_order_is_embedding_layers_norm_head(plain_base: Path) -> None:
    names = FoldedModel(plain_base, None).names()
    assert names[0] == "model.embed_tokens.weight"
    assert names[1:4] == [
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
    ]
    assert names[9] == "model.layers.0.mlp.down_proj.weight"
    assert names[-2:] == ["model.norm.weight", "lm_head.weight"]


def test_folded_nf4_equals_stock_peft(
    nf4_base: Path, adapter: Path, folded_model: Build, peft_logits: Callable[..., torch.Tensor]
) -> None:
    ours, theirs = logits_of(folded_model, nf4_base, adapter), peft_logits(nf4_base, adapter, IDS)
    assert (ours - theirs).abs().max() < 1e-5
    without = logits_of(folded_model, nf4_base, None)
    assert (without - theirs).abs().max() > 0.1  # the adapter is big enough to be seen


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 40, "k_.*": 1}},
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    ],
    ids=["rslora", "patterns", "modules_to_save", "head"],
)
def test_variants_equal_stock_peft(
    options: dict[str, Any],
    plain_base: Path,
    make_adapter: Callable[..., Path],
    folded_model: Build,
    peft_logits: Callable[..., torch.Tensor],
) -> None:
    adapter = make_adapter(plain_base, **options)
    ours, theirs = (
        logits_of(folded_model, plain_base, adapter),
        peft_logits(plain_base, adapter, IDS),
    )
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]], ids=["head", "inside"])
def test_tied_embeddings(
    targets: list[str],
    tied_base: Path,
    make_adapter: Callable[..., Path],
    folded_model: Build,
    peft_logits: Callable[..., torch.Tensor],
) -> None:
    adapter = make_adapter(tied_base, target_modules=targets)
    folded = FoldedModel(tied_base, adapter)
    assert ("lm_head.weight" in folded.names()) == ("lm_head" in targets)
    assert folded.config["tie_word_embeddings"] == ("lm_head" not in targets)
    ours, theirs = logits_of(folded_model, tied_base, adapter), peft_logits(tied_base, adapter, IDS)
    assert (ours - theirs).abs().max() < 1e-5


def test_dequantised_weights_are_rounded_to_the_training_dtype(nf4_bf16_base: Path) -> None:
    folded = FoldedModel(nf4_bf16_base, None)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = folded.tensor(name)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.to(torch.bfloat16).float())
    assert folded.shape(name) == tuple(weight.shape) == (256, 448)
    assert "quantization_config" not in folded.config


def test_a_leftover_tensor_is_named(plain_base: Path, adapter: Path, tmp_path: Path) -> None:
    spoilt = copied(adapter, tmp_path / "a")
    key = "base_model.model.model.layers.0.self_attn.q_norm.weight"
    edit_tensors(spoilt, lambda t: t.update({key: torch.ones(4)}))
    with pytest.raises(DataError, match=r"1 adapter tensors fit nothing.*q_norm"):
        FoldedModel(plain_base, spoilt)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_B.weight"), "q_proj.lora_A.weight: its B is missing"),
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), "q_proj.lora_B.weight: its A is missing"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(8, 255)}), "q_proj.*base has"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": torch.zeros(4, 256)}), "rank 8"),
        (lambda t: [t.pop(k) for k in list(t) if "layers.1" in k], "targets model.layers.1"),
        (lambda t: t.clear(), "holds no tensors"),
    ],
    ids=["no B", "no A", "shape", "rank", "truncated", "empty"],
)
def test_damaged_adapters_are_refused(
    change: Callable[[dict[str, torch.Tensor]], Any],
    message: str,
    plain_base: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    spoilt = edit_tensors(copied(adapter, tmp_path / "a"), change)
    with pytest.raises(DataError, match=message):
        FoldedModel(plain_base, spoilt)


def test_the_wrong_base_is_refused(tied_base: Path, adapter: Path) -> None:
    with pytest.raises(DataError, match=r"tensor model\.layers\.0\..*: the adapter is for"):
        FoldedModel(tied_base, adapter)


@pytest.mark.parametrize(
    "fields",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"fan_in_fan_out": True},
        {"peft_type": "LOHA"},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [5]},
        {"a_switch_of_next_year": True},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_variants_that_mean_something_else_are_refused_by_name(
    fields: dict[str, Any], plain_base: Path, adapter: Path, tmp_path: Path
) -> None:
    spoilt = edit_config(copied(adapter, tmp_path / "a"), **fields)
    with pytest.raises(RecipeError, match=next(iter(fields))):
        FoldedModel(plain_base, spoilt)


@pytest.fixture
def named_adapter(make_adapter: Callable[..., Path]) -> Callable[..., Path]:
    """`named_adapter(base, "sft", **options)`: several in one test."""

    def make(base: Path, name: str, **options: Any) -> Path:
        folder = make_adapter(base, **options)
        return folder.rename(folder.with_name(name))

    return make


@pytest.fixture
def two_adapters(named_adapter: Callable[..., Path]) -> Callable[[Path], list[Path]]:
    """An SFT adapter and one that was trained on top of it."""
    return lambda base: [
        named_adapter(base, "sft"),
        named_adapter(base, "dpo", r=3, use_rslora=True),
    ]


def test_a_stack_equals_both_adapters_in_stock_peft(
    nf4_base: Path, two_adapters: Callable[[Path], list[Path]]
) -> None:
    sft, dpo = two_adapters(nf4_base)
    model = AutoModelForCausalLM.from_pretrained(nf4_base, device_map="cpu", dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, str(sft), adapter_name="sft")
    peft.load_adapter(str(dpo), adapter_name="dpo")
    peft.base_model.set_adapter(["sft", "dpo"])
    peft.train()  # in eval mode bitsandbytes repacks the weights of a CPU into bf16
    with torch.no_grad():
        theirs = peft(IDS).logits
    ours = FoldedModel(nf4_base, [sft, dpo])
    assert (logits_of_model(ours) - theirs).abs().max() < 1e-5
    assert [adapter.folder for adapter in ours.adapters] == [sft, dpo]
    assert (logits_of_model(FoldedModel(nf4_base, sft)) - theirs).abs().max() > 0.1


def test_a_stack_is_one_sum(plain_base: Path, two_adapters: Callable[[Path], list[Path]]) -> None:
    """Not further from the exact sum than one rounding of it and of the product."""
    model, base = FoldedModel(plain_base, two_adapters(plain_base)), FoldedModel(plain_base, None)
    for name in model.names():
        exact = base.tensor(name).double()
        for adapter in model.adapters:
            if name in adapter.low_rank:
                a, b, scale = adapter.factors(name)
                exact += scale * b.double() @ a.double()
        assert (model.tensor(name).double() - exact).abs().max() < 1e-7, name


def test_two_adapters_that_replace_one_matrix_are_refused(
    plain_base: Path, named_adapter: Callable[..., Path]
) -> None:
    sft = named_adapter(plain_base, "sft", modules_to_save=["lm_head"])
    dpo = named_adapter(plain_base, "dpo", modules_to_save=["lm_head"])
    with pytest.raises(DataError, match=r"dpo.*replaces lm_head\.weight, which the adapter .*sft"):
        FoldedModel(plain_base, [sft, dpo])
    on_top = named_adapter(plain_base, "top", target_modules=["lm_head", "q_proj"])
    folded = FoldedModel(plain_base, [sft, on_top])  # a matrix replaced, then a sum on top of it
    a, b, scale = folded.adapters[1].factors("lm_head.weight")
    expected = FoldedModel(plain_base, sft).tensor("lm_head.weight") + scale * b @ a
    assert torch.allclose(folded.tensor("lm_head.weight"), expected, rtol=0, atol=1e-6)
    with pytest.raises(DataError, match=r"replaces lm_head\.weight"):
        FoldedModel(plain_base, [on_top, sft])


def test_a_sum_that_overflows_is_named(plain_base: Path, adapter: Path, tmp_path: Path) -> None:
    spoilt = edit_tensors(
        copied(adapter, tmp_path / "a"),
        lambda t: [t[f"{Q0}.lora_{side}.weight"].fill_(1e30) for side in "AB"],
    )
    folded = FoldedModel(plain_base, spoilt)
    with pytest.raises(DataError, match=r"model\.layers\.0\.self_attn\.q_proj\.weight holds"):
        folded.tensor("model.layers.0.self_attn.q_proj.weight")


def test_a_tied_head_of_its_own_is_refused(
    tied_base: Path, make_adapter: Callable[..., Path]
) -> None:
    folder = make_adapter(tied_base, target_modules=["q_proj"])
    head = "base_model.model.lm_head.weight"
    edit_tensors(folder, lambda t: t.update({head: torch.ones(512, 96)}))
    with pytest.raises(DataError, match=r"holds an lm_head\.weight other than its embedding"):
        FoldedModel(tied_base, folder)
