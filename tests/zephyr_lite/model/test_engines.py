"""Engines: packed = alone, a shared prompt = two sequences; what hf refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)
from zephyr_kernels import _xformers, attention, backend

from zephyr_lite.data.layout import Layout, document_layout, pair_layout
from zephyr_lite.errors import MachineError
from zephyr_lite.model import hf
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.engines import choose_attention, choose_kernels
from zephyr_lite.model.hf import ATTENTION_NAME, HfEngine
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Lora, Memory

CPU = torch.device("cpu")
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def small(config: Any, model: Any, **changes: Any) -> Any:
    """A frozen random model of a family."""
    torch.manual_seed(0)
    return model(config(**{**SHAPE, **changes})).train().requires_grad_(False)


def one_row(ids: np.ndarray) -> Layout:
    return document_layout([(ids, np.zeros(len(ids), bool))])


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def run(policy: Policy, layouts: list[Layout], weights: list[torch.Tensor]) -> Result:
    """Log-probs one after the other, and every adapter gradient of their weighted sum."""
    found = []
    for layout, weight_N in zip(layouts, weights, strict=True):
        logp_N = policy.log_probs(layout, training=True)
        (logp_N * weight_N).sum().backward()
        found.append(logp_N.detach())
    gradients = {}
    for name, parameter in policy.trainable().items():
        assert parameter.grad is not None
        gradients[name], parameter.grad = parameter.grad, None
    return torch.cat(found), gradients


def assert_same(one: Result, two: Result, tolerance: Any) -> None:
    """Equal to fp32 rounding: every log-prob, and every adapter gradient by itself."""
    assert (one[0] - two[0]).abs().max() < tolerance.logp
    assert one[1].keys() == two[1].keys()
    for name, gradient in one[1].items():
        error = (gradient - two[1][name]).norm() / gradient.norm()
        assert error < tolerance.gradient, f"{name}: {error:.2g}"


def random_weights(*sizes: int) -> list[torch.Tensor]:
    """A weight per scored token, so that no gradient can hide in another's."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, generator=generator) for n in sizes]


def test_packed_documents_equal_each_alone(stack, shake, random_documents, tolerance) -> None:
    policy = stack()
    shake(policy.model, "dpo")
    documents = random_documents([12, 1, 40, 9, 2, 130, 33])
    alone = [document_layout([d]) for d in documents]
    weights = random_weights(*(len(a.rows_N) for a in alone))
    packed = run(policy, [document_layout(documents)], [torch.cat(weights)])
    assert_same(packed, run(policy, alone, weights), tolerance)


def test_shared_prompt_equals_two_sequences(stack, shake, random_pairs, tolerance) -> None:
    policy = stack()
    shake(policy.model, "dpo")
    pairs = random_pairs([(1, 1, 1), (9, 4, 12), (30, 1, 2), (3, 60, 5), (65, 8, 8)])
    shared = pair_layout(pairs)
    apart = [pair_layout([p], share_prompt=False) for p in pairs]
    weights = random_weights(*(len(a.rows_N) for a in apart))
    one = run(policy, [shared], [torch.cat(weights)])
    assert_same(one, run(policy, apart, weights), tolerance)
    assert shared.n_tokens < sum(a.n_tokens for a in apart)


def test_full_checkpointing_gives_the_same_gradients(stack, shake, random_pairs) -> None:
    layout = pair_layout(random_pairs([(9, 4, 12), (3, 6, 5)]))
    results = []
    for checkpointing in ("none", "full"):
        policy = stack(dropout=0.3, checkpointing=checkpointing)
        shake(policy.model, "dpo")
        torch.manual_seed(11)  # dropout is drawn again in the recomputation, and must be the same
        results.append(run(policy, [layout], random_weights(len(layout.rows_N))))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][n]) for n, g in results[0][1].items())


@pytest.mark.parametrize("engine", ["hf"])
def test_full_checkpointing_recomputes(stack, random_pairs) -> None:
    layout = pair_layout(random_pairs([(9, 4, 12)]))
    passes = {}
    for checkpointing in ("none", "full"):
        policy, calls = stack(checkpointing=checkpointing), []
        mlp = policy.engine.decoder.layers[0].mlp
        mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        policy.log_probs(layout, training=True).sum().backward()
        passes[checkpointing] = len(calls)
    assert passes == {"none": 1, "full": 2}


@pytest.mark.parametrize(
    ("config", "model", "changes"),
    [
        (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
        (MistralConfig, MistralForCausalLM, {"sliding_window": None, "num_key_value_heads": 4}),
        (LlamaConfig, LlamaForCausalLM, {}),
        (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
    ids=["mistral", "mistral-mha", "llama", "llama-tied"],
)
def test_one_document_equals_stock_transformers(config, model, changes, engine) -> None:
    causal_lm = small(config, model, **changes)
    ids = np.random.default_rng(0).integers(0, 96, 37)
    with torch.no_grad():
        causal_lm.set_attn_implementation("sdpa")
        theirs = causal_lm(torch.from_numpy(ids)[None]).logits[0]
        policy = make_policy(causal_lm, torch.float32, CPU, Memory(), engine=engine)
        hidden = policy.engine.hidden(to_device(one_row(ids), CPU))
        ours = hidden @ policy.head_VD.T
        steps = policy.next_token_log_probs(ids.tolist())
    assert (ours - theirs).abs().max() < 1e-5
    assert (steps - theirs.log_softmax(-1)).abs().max() < 1e-5


def test_the_nf4_model_equals_stock_transformers(tiny_nf4, load_tiny, engine) -> None:
    ids = np.random.default_rng(0).integers(0, 384, 50)
    stock = AutoModelForCausalLM.from_pretrained(tiny_nf4.folder, dtype=torch.float32).train()
    policy = make_policy(load_tiny(), torch.float32, CPU, Memory(), engine=engine)
    with torch.no_grad():
        theirs = stock(torch.from_numpy(ids)[None]).logits[0]
        ours = policy.engine.hidden(to_device(one_row(ids), CPU)) @ policy.head_VD.T
    assert (ours - theirs).abs().max() < 1e-5


def _plain_causal(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """Packed rows as one long document: what most frameworks do without a word."""
    groups = query.shape[1] // key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
    )
    return out.transpose(1, 2), None


def _top_left(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    """A shared prompt of which the rejected answer sees one key less than it should."""
    layout = options["layout"]
    late = [(q, n, c + 1, m - 1) for q, n, c, m in layout.plan.contexts]
    broken = replace(layout, plan=replace(layout.plan, contexts=tuple(late)))
    return hf._attention_of_layout(module, query, key, value, mask, **options | {"layout": broken})


@pytest.mark.parametrize("broken", [_plain_causal, _top_left])
def test_the_self_test_catches_a_broken_attention(broken, tiny_mistral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32)
    engine = HfEngine(model)
    assert engine.self_test(CPU) < 1e-5
    AttentionInterface.register(ATTENTION_NAME, broken)
    try:
        with pytest.raises(MachineError, match="MistralModel does not keep packed documents apart"):
            engine.self_test(CPU)
    finally:
        AttentionInterface.register(ATTENTION_NAME, hf._attention_of_layout)


def test_the_self_test_catches_lost_positions(tiny_mistral: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32)
    engine = HfEngine(model)
    decoder = engine.decoder

    def without_positions(*, position_ids: torch.Tensor, **others: Any) -> Any:
        return decoder(position_ids=torch.arange(position_ids.shape[1])[None], **others)

    engine.decoder = without_positions
    with pytest.raises(MachineError, match="apart"):
        engine.self_test(CPU)


def test_dropout_does_not_fail_the_self_test(load_tiny, shake, engine) -> None:
    model = add_adapter(load_tiny("none"), "sft", Lora(r=4, dropout=0.5), seed=0)
    shake(model, "sft")
    make_policy(model, torch.float32, CPU, Memory(), engine=engine)


def test_a_window_shorter_than_a_sequence_is_refused(engine) -> None:
    model = small(MistralConfig, MistralForCausalLM, sliding_window=20)
    policy = make_policy(model, torch.float32, CPU, Memory(), engine=engine)
    short = [(np.arange(20), np.zeros(20, bool))] * 3
    policy.log_probs(document_layout(short))  # 60 tokens in a row, 20 in a sequence
    with pytest.raises(MachineError, match="attention window of 20 tokens"):
        policy.log_probs(one_row(np.arange(21)))


def test_a_window_as_long_as_the_sequence_changes_nothing(engine) -> None:
    ids = np.random.default_rng(0).integers(0, 96, 20)
    model = small(MistralConfig, MistralForCausalLM, sliding_window=20)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        theirs = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
    policy = make_policy(model, torch.float32, CPU, Memory(), engine=engine)
    assert (policy.next_token_log_probs(ids.tolist()) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "model", "changes", "message"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {}, "gemma2: layers with different attention patterns"),
        (GptOssConfig, GptOssForCausalLM, {}, "gpt_oss: layers with different attention patterns"),
        (
            Gemma2Config,
            Gemma2ForCausalLM,
            {"layer_types": ["full_attention"] * 2},
            "Gemma2Attention has attention scores with softcap",
        ),
        (
            GptOssConfig,
            GptOssForCausalLM,
            {"layer_types": ["full_attention"] * 2, "num_local_experts": 2},
            "GptOssAttention has attention scores with s_aux",
        ),
        (StableLmConfig, StableLmForCausalLM, {}, "StableLmAttention is not told"),
    ],
    ids=["gemma2", "gpt-oss", "softcap", "sinks", "no-keywords"],
)
def test_a_model_that_attends_in_another_way_is_refused_by_name(
    config, model, changes, message
) -> None:
    with pytest.raises(MachineError, match=message):
        make_policy(small(config, model, **changes), torch.float32, CPU, Memory(), engine="hf")


def test_a_head_with_a_bias_is_refused(load_tiny: Callable) -> None:
    model = load_tiny("none")
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(384))
    with pytest.raises(MachineError, match="not a matrix without bias"):
        make_policy(model, torch.float32, CPU, Memory())


def test_4_bit_rows_that_bitsandbytes_misreads_are_refused(tmp_path: Path, engine: str) -> None:
    """Rows of 96: its CPU code takes the wrong block's scale."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    small(MistralConfig, MistralForCausalLM, sliding_window=None, **shape).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=settings
    )
    with pytest.raises(MachineError, match=r"layers\.0\.mlp\.down_proj: bitsandbytes misreads"):
        frozen = model.train().requires_grad_(False)
        make_policy(frozen, torch.float32, CPU, Memory(), engine=engine)


def test_kernels_that_cannot_run_are_an_error_only_where_they_are_required() -> None:
    try:
        for wanted in ("auto", "off"):
            assert choose_kernels(wanted, "native", CPU) == "torch"
        with pytest.raises(MachineError, match="kernels: require, but there is no GPU"):
            choose_kernels("require", "native", CPU)
        with pytest.raises(MachineError, match="engine hf does not use them"):
            choose_kernels("require", "hf", torch.device("cuda"))
        choose_kernels("off", "native", CPU)
        with backend.using("triton"):
            assert backend.runs_triton(torch.empty(1))
        assert not backend.runs_triton(torch.empty(1))
    finally:
        backend.use("auto")


def test_xformers_that_cannot_compute_is_refused_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tiny_mistral: Path
) -> None:
    gpu, half = torch.device("cuda"), torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tiny_mistral, dtype=torch.float32)
    with pytest.raises(MachineError, match="attention: xformers: it needs a GPU") as found:
        make_policy(model, torch.float32, CPU, Memory(), attention="xformers")
    assert found.value.hint == "set attention=auto"
    _xformers.fmha.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", None)
    with pytest.raises(MachineError, match=r"it cannot be imported \(.*xformers") as found:
        choose_attention("xformers", gpu, half, 128)
    assert found.value.hint == "pip install xformers, or set attention=auto"
    monkeypatch.setattr(_xformers, "fmha", lambda: None)  # there, and without a kernel
    monkeypatch.setattr(_xformers, "computes", lambda *_: False)
    with pytest.raises(MachineError, match=r"nothing for heads of 128 in torch\.bfloat16 on this"):
        choose_attention("xformers", gpu, half, 128)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert attention.computed_by(gpu, half, 128) == "flash", "a refusal leaves no choice behind"


def test_the_attention_that_computes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, half = torch.device("cuda"), torch.bfloat16
    assert choose_attention("auto", CPU, torch.float32, 100) == "flash"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_attention("auto", gpu, half, 128) == "flash"
    assert choose_attention("auto", gpu, torch.float32, 128) == "dense"
    monkeypatch.setattr(_xformers, "fmha", lambda: None)
    monkeypatch.setattr(_xformers, "computes", lambda *_: True)
    assert choose_attention("xformers", gpu, torch.float32, 128) == "xformers"
    assert choose_attention("auto", gpu, half, 128) == "flash", "and can be taken back"
