"""Adapters: saved as trained, frozen where frozen, foreign ones refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from zephyr_lite.data.layout import document_layout, pair_layout
from zephyr_lite.errors import DataError, VerificationError
from zephyr_lite.model.adapters import (
    CONFIG,
    WEIGHTS,
    activate,
    adapter_identity,
    add_adapter,
    load_adapter,
    save_adapter,
    trainable_tensors,
)
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Lora, Memory

CPU = torch.device("cpu")
IDS = list(range(3, 40))


def policy_of(model: Any) -> Policy:
    return make_policy(model, torch.float32, CPU, Memory(head_rows=16))


def our_logits(policy: Policy) -> torch.Tensor:
    """Logits after IDS, by engine and head as training runs them."""
    layout = document_layout([(np.array(IDS), np.zeros(len(IDS), bool))])
    with torch.no_grad():
        return policy.engine.hidden(to_device(layout, CPU)) @ policy.head_VD.T


def stock_logits(base: Path, adapter: Path) -> torch.Tensor:
    """Logits of the original base with the adapter, by transformers and PEFT alone."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, device_map="cpu")
    # In train mode: in eval mode bitsandbytes may repack the weights of a CPU into bf16.
    peft = PeftModel.from_pretrained(model, str(adapter)).train()
    for module in peft.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        return peft(torch.tensor([IDS])).logits[0]


def edited(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of an adapter with another config."""
    shutil.copytree(adapter, folder)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))
    return folder


def test_stock_peft_reproduces_a_stack_over_the_original_base(
    stack, shake, tiny_nf4, sft_adapter, tmp_path, tolerance
) -> None:
    policy = stack(r=4, alpha=6)
    shake(policy.model, "dpo", seed=5)
    save_adapter(policy.model, ["sft", "dpo"], tmp_path, "some/base")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (12, 12, 0.0)
    assert config["base_model_name_or_path"] == "some/base"
    ours, theirs = our_logits(policy), stock_logits(tiny_nf4.folder, tmp_path)
    assert (ours - theirs).abs().max() < tolerance.peft_logits
    alone = stock_logits(tiny_nf4.folder, sft_adapter)
    assert (ours - alone).abs().max() > 0.1, "the second adapter must have an effect"


def test_one_adapter_is_saved_as_it_is(load_tiny, shake, tiny_nf4, tmp_path, tolerance) -> None:
    model = add_adapter(load_tiny(), "sft", Lora(r=6, alpha=9, dropout=0.05), seed=0)
    shake(model, "sft")
    policy = policy_of(model)
    policy.use(["sft"])
    save_adapter(model, ["sft"], tmp_path, "b")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (6, 9, 0.05)
    gap = our_logits(policy) - stock_logits(tiny_nf4.folder, tmp_path)
    assert gap.abs().max() < tolerance.peft_logits


@pytest.mark.parametrize("names", [["sft"], ["sft", "dpo"]], ids=["alone", "stacked"])
def test_a_rank_stabilised_scale_survives(
    names, load_tiny, shake, tiny_nf4, sft_adapter, tmp_path, tolerance
) -> None:
    model = load_adapter(load_tiny(), "sft", edited(sft_adapter, tmp_path / "rs", use_rslora=True))
    model = add_adapter(model, "dpo", Lora(r=4, alpha=6), seed=2)
    shake(model, "dpo", seed=5)
    policy = policy_of(model)
    policy.use(names)
    (tmp_path / "saved").mkdir()
    save_adapter(model, names, tmp_path / "saved", "b")
    gap = our_logits(policy) - stock_logits(tiny_nf4.folder, tmp_path / "saved")
    assert gap.abs().max() < tolerance.peft_logits


def test_a_loaded_adapter_goes_on_and_is_saved_whole(
    load_tiny, shake, sft_adapter, tiny_nf4, tmp_path, tolerance
) -> None:
    """dpo.adapter=continue: twice the same adapter, one to train and one to refer to."""
    model = load_adapter(load_tiny(), "sft", sft_adapter)
    model = load_adapter(model, "dpo", sft_adapter)
    policy = policy_of(model)
    policy.use(["sft"])
    before = our_logits(policy)
    policy.use(["dpo"], "dpo")
    assert torch.equal(our_logits(policy), before)
    shake(model, "dpo", seed=8)
    save_adapter(model, ["dpo"], tmp_path, "b")
    gap = our_logits(policy) - stock_logits(tiny_nf4.folder, tmp_path)
    assert gap.abs().max() < tolerance.peft_logits
    policy.use(["sft"])
    assert torch.equal(our_logits(policy), before), "the reference moved with the policy"


def test_saving_and_loading_is_exact(load_tiny, sft_adapter, tmp_path) -> None:
    model = load_adapter(load_tiny(), "x", sft_adapter)
    save_adapter(model, ["x"], tmp_path, "base")
    assert (tmp_path / WEIGHTS).read_bytes() == (sft_adapter / WEIGHTS).read_bytes()


def test_exactly_the_named_adapter_trains(stack) -> None:
    policy = stack()
    names = set(policy.trainable())
    assert names == {n for n, _ in policy.model.named_parameters() if ".dpo." in n}
    assert len(names) == 2 * 7 * 4
    policy.use(["sft"])
    assert policy.trainable() == {}
    policy.use([])
    assert policy.trainable() == {}
    policy.use(["sft", "dpo"], "sft")
    assert all(".sft." in n for n in policy.trainable())


def test_only_the_trainable_adapter_gets_a_gradient(stack, shake, random_pairs) -> None:
    policy = stack()
    shake(policy.model, "dpo")
    policy.log_probs(pair_layout(random_pairs([(4, 5, 6)])), training=True).sum().backward()
    with_gradient = {n for n, p in policy.model.named_parameters() if p.grad is not None}
    assert with_gradient == set(policy.trainable())
    assert all(p.grad.norm() > 0 for p in policy.trainable().values())


def dropouts(policy: Policy) -> dict[str, bool]:
    """Dropout modules that are at work, by name."""
    modules = policy.model.named_modules()
    return {n: m.training for n, m in modules if isinstance(m, torch.nn.Dropout)}


def test_dropout_is_in_the_trainable_adapter_only_and_only_in_training(
    load_tiny, shake, random_pairs
) -> None:
    model = add_adapter(load_tiny(), "sft", Lora(r=8, dropout=0.5), seed=1)
    model = add_adapter(model, "dpo", Lora(r=4, dropout=0.5), seed=2)
    shake(model, "sft", 1)
    shake(model, "dpo", 2)
    policy = policy_of(model)
    policy.use(["sft", "dpo"], "dpo")
    layout = pair_layout(random_pairs([(4, 5, 6)]))
    still = policy.log_probs(layout)
    assert torch.equal(policy.log_probs(layout), still)
    assert not any(dropouts(policy).values())
    moved = policy.log_probs(layout, training=True)
    assert not torch.equal(moved, policy.log_probs(layout, training=True))
    policy.log_probs(layout, training=True)
    at_work = {n for n, on in dropouts(policy).items() if on}
    assert at_work == {n for n in dropouts(policy) if n.endswith(".dpo")}
    assert torch.equal(policy.log_probs(layout), still)


def test_a_fresh_adapter_changes_nothing(stack, random_pairs) -> None:
    """The step-0 wiring: equal bit for bit, not nearly."""
    policy = stack()
    layout = pair_layout(random_pairs([(4, 5, 6), (7, 1, 2)]))
    both = policy.log_probs(layout)
    policy.use(["sft"])
    assert torch.equal(policy.log_probs(layout), both)
    policy.use([])
    assert not torch.equal(policy.log_probs(layout), both), "the SFT adapter must have an effect"


def adapter_weights(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if f".{name}." in n}


def test_initial_weights_depend_on_the_seed_only(load_tiny) -> None:
    def fresh(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(noise)
        model = add_adapter(load_tiny("none"), "dpo", Lora(r=4), seed)
        assert torch.initial_seed() == noise
        return adapter_weights(model, "dpo")

    one, same, other = fresh(3, 0), fresh(3, 1), fresh(4, 0)
    assert all(torch.equal(one[n], same[n]) for n in one)
    first = next(n for n in one if "lora_A" in n)
    assert not torch.equal(one[first], other[first])
    assert all(p.eq(0).all() for n, p in one.items() if "lora_B" in n)


def test_masters_are_fp32_over_a_bf16_base(load_tiny, sft_adapter) -> None:
    model = load_adapter(load_tiny(dtype="bfloat16"), "sft", sft_adapter)
    model = add_adapter(model, "dpo", Lora(r=4), seed=0)
    activate(model, ["sft", "dpo"], "dpo")
    assert {p.dtype for p in adapter_weights(model, "sft").values()} == {torch.float32}
    assert {p.dtype for p in trainable_tensors(model).values()} == {torch.float32}
    next(iter(trainable_tensors(model).values())).data = torch.zeros(1, dtype=torch.bfloat16)
    with pytest.raises(VerificationError, match="float32"):
        trainable_tensors(model)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}},
        {"alpha_pattern": {"q_proj": 4}},
        {"lora_bias": True},
        {"fan_in_fan_out": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"trainable_token_indices": [1, 2]},
        {"target_parameters": ["q_proj.weight"]},
        {"layers_to_transform": [0, 1]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"target_modules": ".*q_proj"},
        {"peft_type": "IA3"},
    ],
    ids=lambda change: "-".join(map(str, next(iter(change.items())))),
)
def test_what_is_not_plain_lora_is_refused(change, load_tiny, sft_adapter, tmp_path) -> None:
    model = load_tiny("none")
    weights = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(DataError, match=next(iter(change))):
        load_adapter(model, "x", edited(sft_adapter, tmp_path / "a", **change))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())


def spoilt(adapter: Path, folder: Path, spoil: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of an adapter with other tensors."""
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / WEIGHTS)
    spoil(tensors)
    save_file(tensors, folder / WEIGHTS)
    return folder


def _drop_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors.pop(sorted(tensors)[3])


def _add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(8, 64)


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if "q_proj.lora_A" in n)
    tensors[name] = tensors[name][:, :32].contiguous()


def _broadcast(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in tensors if "q_proj.lora_B" in n)
    tensors[name] = tensors[name][:1].contiguous()


@pytest.mark.parametrize("spoil", [_drop_one, _add_one, _narrow, _broadcast])
def test_tensors_that_do_not_fit_are_refused(spoil, load_tiny, sft_adapter, tmp_path) -> None:
    with pytest.raises(DataError, match=r"fit|shape"):
        load_adapter(load_tiny("none"), "x", spoilt(sft_adapter, tmp_path / "a", spoil))


def test_a_stack_of_unlike_targets_is_exact(
    load_tiny, shake, tiny_nf4, tmp_path, tolerance
) -> None:
    """Each has a linear to itself, one they share, and some neither touches."""
    model = add_adapter(load_tiny(), "sft", Lora(r=4, alpha=6, targets=("q_proj", "v_proj")), 0)
    model = add_adapter(model, "dpo", Lora(r=2, alpha=6, targets=("v_proj", "up_proj")), seed=0)
    shake(model, "sft", 1)
    shake(model, "dpo", 2)
    policy = policy_of(model)
    policy.use(["sft", "dpo"])
    save_adapter(model, ["sft", "dpo"], tmp_path, "b")
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["q_proj", "up_proj", "v_proj"], "the same in any process"
    assert config["r"] == 6
    gap = our_logits(policy) - stock_logits(tiny_nf4.folder, tmp_path)
    assert gap.abs().max() < tolerance.peft_logits
    again = load_adapter(load_tiny(), "dpo", tmp_path)
    assert len(dict(adapter_weights(again, "dpo"))) == 2 * 3 * 4


def test_identity_is_weights_scale_and_targets(load_tiny, sft_adapter, tmp_path) -> None:
    one = adapter_identity(sft_adapter)
    assert adapter_identity(edited(sft_adapter, tmp_path / "a", inference_mode=False)) == one
    names = json.loads((sft_adapter / CONFIG).read_text())["target_modules"]
    assert adapter_identity(edited(sft_adapter, tmp_path / "b", target_modules=names[::-1])) == one
    for number, change in enumerate(
        ({"r": 9}, {"lora_alpha": 1}, {"use_rslora": True}, {"target_modules": names[1:]})
    ):
        assert adapter_identity(edited(sft_adapter, tmp_path / f"{number}", **change)) != one
