"""What engine `native` does not run, and that its self-test can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_bases import ADAPTERS, BASES, CPU, SHAPE, documents, pairs, policy_on, random_model
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from zephyr_kernels import attention

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.model import head_norms, native
from zephyr_lite.model import layer as layer_module
from zephyr_lite.model.adapters import set_dropout
from zephyr_lite.model.base import accept_model
from zephyr_lite.model.engines import SAVED, choose, make_engine
from zephyr_lite.model.native import NativeEngine, refusal


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: Gemma2Config(**SHAPE), "gemma2 is not one of mistral, llama, qwen2, qwen3"),
        (
            lambda: Qwen3Config(**SHAPE, use_sliding_window=True, max_window_layers=2),
            "its layers differ in their attention patterns",
        ),
        (lambda: LlamaConfig(**SHAPE, mlp_bias=True), "its feed-forward block has biases"),
        (lambda: LlamaConfig(**SHAPE, hidden_act="gelu"), "activation gelu"),
        (
            lambda: LlamaConfig(
                **SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
            ),
            "rotary embedding of type dynamic",
        ),
        (
            lambda: Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=2),
            "its layers differ in their attention patterns",
        ),
    ],
    ids=["gemma2", "qwen3-patterns", "mlp-bias", "activation", "dynamic-rope", "patterns"],
)
def test_what_it_does_not_run_goes_to_hf_with_the_reason(
    config: Callable, reason: str, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path)
    assert choose("native", tmp_path) == ("hf", f"native does not run this base: {reason}")
    assert choose("hf", tmp_path) == ("hf", "")


@pytest.mark.parametrize("name", list(BASES))
def test_what_it_runs_is_chosen(name: str, tmp_path: Path) -> None:
    BASES[name]().save_pretrained(tmp_path)
    assert choose("native", tmp_path) == ("native", "")
    assert refusal(BASES[name]()) is None


def test_a_model_it_does_not_run_is_refused_by_name() -> None:
    model = random_model(LlamaConfig(**SHAPE, mlp_bias=True), {}, (), None)
    with pytest.raises(MachineError, match="does not run this model: its feed-forward block has"):
        make_engine("native", model, torch.float32, "none")


@pytest.mark.parametrize(
    "trains", ["embed_tokens", "down_proj.weight", "layers.2.input_layernorm", ""]
)
def test_a_base_that_trains_is_refused(trains: str) -> None:
    model = random_model(BASES["mistral"](), {}, (), None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in name)
    with pytest.raises(MachineError, match="its own weights train"):
        NativeEngine(model, torch.float32)


def test_engines_and_what_they_save() -> None:
    model = random_model(BASES["mistral"](), {}, (), None)
    for checkpointing, saved in SAVED.items():
        made: Any = make_engine("native", model, torch.float32, checkpointing)
        assert made.name == "native"
        assert made.keep == (len(made.layers) if saved == "keep" else 0)
        assert made.rest == ("offload" if saved == "offload" else "lean")
    with pytest.raises(MachineError, match="does not move activations") as found:
        make_engine("hf", model, torch.float32, "offload")
    assert found.value.hint == "set memory.checkpointing=full"


def test_a_window_shorter_than_a_sequence_is_refused() -> None:
    policy = policy_on("native", MistralConfig(**SHAPE, sliding_window=20))
    policy.log_probs(documents(20, 20, 20), training=True)
    policy.log_probs(pairs((15, 5, 5)), training=True)  # 25 in a row, 20 in a sequence
    for layout in (documents(3, 21), pairs((15, 5, 6))):
        with pytest.raises(MachineError, match="attention window of 20 tokens") as found:
            policy.log_probs(layout)
        assert found.value.hint == "lower max_length"


def test_a_window_that_is_switched_off_is_none() -> None:
    config = Qwen2Config(**SHAPE, sliding_window=8, use_sliding_window=False)
    policy_on("native", config).log_probs(documents(30))


# ---------------------------------------------------------------- the self-test


def _no_turn(x: torch.Tensor, *_: Any, **__: Any) -> None:
    """Positions lost."""


def _neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool) -> None:
    """The other convention of pairs."""
    attention_rotate(x, cos, sin, interleaved=True, inverse=inverse)


def _no_gain(x: torch.Tensor, gain: torch.Tensor, eps: float, out: Any = None) -> Any:
    return layer_rms_norm(x, torch.ones_like(gain), eps, out)


def _large_eps(x: torch.Tensor, gain: torch.Tensor, eps: float, out: Any = None) -> Any:
    return layer_rms_norm(x, gain, 1000 * eps, out)


def _no_residual(
    delta: torch.Tensor, x: torch.Tensor, gain: torch.Tensor, eps: float, out: Any = None
) -> Any:
    return layer_rms_norm(delta, gain, eps, out)


def _swapped(gate: torch.Tensor, up: torch.Tensor, out: Any = None) -> torch.Tensor:
    return layer_swiglu(up, gate, out)


attention_rotate, layer_rms_norm = layer_module.rotate_, layer_module.rms_norm
layer_swiglu = layer_module.swiglu


@pytest.mark.parametrize(
    ("module", "name", "broken"),
    [
        (layer_module, "rotate_", _no_turn),
        (layer_module, "rotate_", _neighbours),
        (layer_module, "rms_norm", _no_gain),
        (layer_module, "rms_norm", _large_eps),
        (layer_module, "add_rms_norm_", _no_residual),
        (layer_module, "swiglu", _swapped),
        (native, "rms_norm", _no_gain),
    ],
)
def test_the_self_test_catches_a_wrong_operation(
    module: Any, name: str, broken: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(BASES["mistral"](), ADAPTERS, ("sft",), None)
    assert NativeEngine(model, torch.float32).self_test(CPU) < 1e-5
    monkeypatch.setattr(module, name, broken)
    with pytest.raises(MachineError, match="disagrees with transformers on this Mistral") as found:
        NativeEngine(model, torch.float32).self_test(CPU)
    assert found.value.hint == "set engine=hf"


@pytest.mark.parametrize("broken", [_no_gain, _large_eps])
def test_the_self_test_catches_wrong_norms_of_heads(
    broken: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(BASES["qwen3"](), ADAPTERS, ("sft",), None)
    assert NativeEngine(model, torch.float32).self_test(CPU) < 1e-5
    monkeypatch.setattr(head_norms, "rms_norm", broken)
    with pytest.raises(MachineError, match="disagrees with transformers on this Qwen3"):
        NativeEngine(model, torch.float32).self_test(CPU)


def test_the_self_test_catches_an_attention_that_loses_the_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both engines attend by one function: neither is the other's truth there."""
    make_plan = attention.make_plan

    def without_contexts(segments: Any, *rest: Any) -> attention.Plan:
        alone = [attention.Segment(s.q_start, s.q_len, s.k_start, s.lead) for s in segments]
        return make_plan(alone, *rest)

    model = random_model(BASES["mistral"](), ADAPTERS, ("sft",), None)
    monkeypatch.setattr("zephyr_lite.model.attention.make_plan", without_contexts)
    with pytest.raises(MachineError, match="does not keep packed documents apart"):
        NativeEngine(model, torch.float32).self_test(CPU)


def test_the_self_test_draws_no_dropout_and_passes_in_bf16() -> None:
    adapters = {"sft": {"lora_dropout": 0.5}}
    model = random_model(BASES["mistral"](), adapters, ("sft",), "sft")
    set_dropout(model, None)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 0 < NativeEngine(model, torch.bfloat16).self_test(CPU) < 2e-2


def test_a_model_type_that_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "newllm"}')
    with pytest.raises(RecipeError, match="base has model type 'newllm', unknown to transformers"):
        accept_model(tmp_path, "base")
