"""What an engine changes on a model, that it can be taken back, and what PEFT changes under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_truth import relative
from peft import LoraConfig, get_peft_model
from random_bases import ADAPTERS, BASES, CPU, documents, policy_on, random_model

from zephyr_lite.errors import MachineError
from zephyr_lite.model.adapters import activate, add_adapter, set_dropout
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.engines import Engine, make_engine
from zephyr_lite.model.native import NativeEngine
from zephyr_lite.recipe import Lora

LAYOUT = to_device(documents(12, 3, 9), CPU)
QUERIES = "model.layers.1.self_attn.q_proj"


def bare(base: str = "mistral") -> Any:
    return random_model(BASES[base](), {}, (), None)


def stacked(base: str = "mistral") -> Any:
    return random_model(BASES[base](), ADAPTERS, ("sft", "dpo"), "dpo")


def hidden(engine: Engine) -> torch.Tensor:
    with torch.no_grad():
        return engine.hidden(LAYOUT)


def storages(model: Any) -> list[int]:
    return [p.untyped_storage().nbytes() - p.numel() * p.element_size() for p in model.parameters()]


# ---------------------------------------------------------------- undo


@pytest.mark.parametrize("base", ["mistral", "llama, biases", "qwen3"])
def test_after_undo_the_model_is_the_untouched_one(base: str) -> None:
    model, untouched = stacked(base), stacked(base)
    engine = NativeEngine(model, torch.float32)
    engine.self_test(CPU)
    assert any(storages(model)), "rewired: weights are views of larger matrices"
    engine.undo()
    assert storages(model) == storages(untouched) and not any(storages(model))
    found, truth = model.state_dict(), untouched.state_dict()
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[name], truth[name]) for name in truth)
    for name, parameter in untouched.named_parameters():
        assert model.get_parameter(name).requires_grad == parameter.requires_grad
    assert model.config.to_dict() == untouched.config.to_dict()
    ours, theirs = (hidden(make_engine("hf", m, torch.float32, "none")) for m in (model, untouched))
    assert torch.equal(ours, theirs)


def test_an_engine_that_was_undone_runs_nothing() -> None:
    engine = NativeEngine(stacked(), torch.float32)
    engine.undo()
    engine.undo()
    for use in (engine.hidden, engine.predicting):
        with pytest.raises(MachineError, match="undone") as found:
            use(LAYOUT)
        assert found.value.hint == "make another engine"


def test_another_engine_may_follow_and_is_the_same() -> None:
    model = stacked()
    engine = NativeEngine(model, torch.float32)
    before = hidden(engine)
    engine.undo()
    assert torch.equal(hidden(NativeEngine(model, torch.float32)), before)


def test_what_was_not_rewired_is_left_where_it_is(load_tiny: Callable) -> None:
    """Packed weights, and weights in another dtype."""
    for model, dtype in ((load_tiny(), torch.float32), (bare(), torch.bfloat16)):
        before = {n: p.data_ptr() for n, p in model.named_parameters()}
        NativeEngine(model, dtype).undo()
        assert {n: p.data_ptr() for n, p in model.named_parameters()} == before


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_transformers_attends_as_before(engine: str) -> None:
    """The self-test of `native` runs `hf`, whose attention needs a layout: generation has none."""
    model, ids = bare(), torch.arange(3, 9)[None]
    before = model.config._attn_implementation
    wanted = model.generate(ids, max_new_tokens=5, do_sample=False)
    made = make_engine(engine, model, torch.float32, "full")
    made.self_test(CPU)
    if engine == "hf":
        assert model.config._attn_implementation != before
        made.undo()
        assert not model.is_gradient_checkpointing
    assert model.config._attn_implementation == before
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), wanted)


# ---------------------------------------------------------------- what PEFT does afterwards


def attach(model: Any, name: str, *targets: str) -> Any:
    """An adapter that changes something, and alone is active."""
    config = LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=list(targets))
    if hasattr(model, "peft_config"):
        model.add_adapter(name, config)
    else:
        model = get_peft_model(model, config, adapter_name=name)
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if f"lora_B.{name}" in parameter_name:
            parameter.data.normal_(std=0.1)
    activate(model, [name], name)
    set_dropout(model, None)
    return model


def test_adapters_that_are_attached_later_are_seen() -> None:
    model: Any = bare()
    engine = NativeEngine(model, torch.float32)
    without = hidden(engine)
    for name, targets in (("one", ("q_proj", "down_proj")), ("two", ("q_proj", "v_proj"))):
        model = attach(model, name, *targets)
        found = hidden(engine)
        truth = hidden(make_engine("hf", model, torch.float32, "none"))
        assert relative(found, truth) < 1e-5 < 1e-2 < relative(found, without)
        assert torch.equal(found, hidden(NativeEngine(model, torch.float32)))
        engine.hidden(LAYOUT).sum().backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2 * 2 * 4 and all(p.grad is not None for p in trained)
    model.unload()
    assert torch.equal(hidden(engine), without), "and those that are taken off are gone"


@pytest.mark.parametrize("place", [QUERIES, f"{QUERIES}.base_layer"])
def test_a_linear_that_was_replaced_is_told(place: str) -> None:
    model = stacked()
    engine = NativeEngine(model, torch.float32)
    model.get_base_model().set_submodule(place, torch.nn.Linear(64, 64, bias=False))
    with pytest.raises(MachineError, match="a linear of the model was replaced after the engine"):
        hidden(engine)


def test_an_adapter_that_is_merged_is_not_added_twice() -> None:
    model = stacked()
    engine = NativeEngine(model, torch.float32)
    before = hidden(engine)
    model.merge_adapter(["sft"])
    with pytest.raises(MachineError, match="was merged into the frozen weights"):
        hidden(engine)
    model.unmerge_adapter()
    assert relative(hidden(engine), before) < 1e-5


# ---------------------------------------------------------------- the report


def test_the_report_names_what_runs_where(load_tiny: Callable) -> None:
    engine = policy_on("native", BASES["qwen3"](), saved="full").engine
    assert engine.report() == [
        "4 layers of model/layer.py, lean, q and k normed",
        "qkv of 4 layers: float32, joined in place, sft r 4+4+4, dpo r 3+3",
        "o of 4 layers: float32, joined in place, sft r 4, dpo r 3",
        "gate_up of 4 layers: float32, joined in place, sft r 4+4, dpo r 3",
        "down of 4 layers: float32, joined in place, sft r 4, dpo r 3",
    ]
    nf4 = NativeEngine(load_tiny(), torch.float32).report()
    assert all(line.endswith("nf4, dequantised to float32") for line in nf4[1:])
    model = add_adapter(load_tiny(), "dpo", Lora(r=4), seed=0)
    for gemm, way in (("exact", "in its border"), ("fp16acc", "added to its products")):
        adapted = NativeEngine(model, torch.float32, gemm=gemm).report()
        assert all(line.endswith(f", {way}") for line in adapted[1:]), adapted
    copied = NativeEngine(bare(), torch.bfloat16).report()
    assert copied[1] == "qkv of 4 layers: bfloat16, a copy"


def test_layers_that_differ_have_lines_of_their_own() -> None:
    adapters = {"dpo": {"layers_to_transform": [0, 2], "target_modules": ["q_proj"]}}
    model = random_model(BASES["mistral"](), adapters, ("dpo",), "dpo")
    assert NativeEngine(model, torch.float32).report()[1:3] == [
        "qkv of 2 layers: float32, joined in place, dpo r 3",
        "qkv of 2 layers: float32, joined in place",
    ]


def test_engine_hf_says_that_nothing_was_changed() -> None:
    for checkpointing, words in (("none", "kept whole"), ("full", "computed again")):
        (line,) = make_engine("hf", bare(), torch.float32, checkpointing).report()
        assert line.startswith("transformers' and PEFT's modules as they are") and words in line
