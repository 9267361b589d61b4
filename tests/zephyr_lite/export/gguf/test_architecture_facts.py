"""A GGUF's architecture: llama.cpp computes what transformers computes, or the model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.gguf.architecture import (
    Architecture,
    check_architecture,
    permute_rotary,
    read_architecture,
)
from zephyr_lite.export.gguf.vocabulary import read_vocabulary

POSITIONS = 160
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.12,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {"mistral": "Mistral", "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


def make_model(model_type: str, **fields: Any) -> PreTrainedModel:
    """A random model whose biases and norms are no ones and zeros."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            base = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.data = base + 0.3 * torch.randn_like(parameter)
    return model.eval()


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def weights_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def architecture_of(model: PreTrainedModel, **options: Any) -> Architecture:
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(model).items()}
    return read_architecture(config_of(model), shapes, **options)


def write(model: PreTrainedModel, architecture: Architecture, tokenizer: Path, out: Path) -> Path:
    """All tensors in F32."""
    writer = gguf.GGUFWriter(out, architecture.name)
    architecture.add_metadata(writer)
    read_vocabulary(tokenizer, 512).add_to(writer)
    tensors = {
        architecture.rename(name): architecture.stored(name, weight)
        for name, weight in weights_of(model).items()
    }
    for name, weight in {**tensors, **architecture.extra()}.items():
        writer.add_tensor(name, weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def divergence(model: PreTrainedModel, path: Path, count: int = POSITIONS) -> float:
    """Largest KL(transformers || llama.cpp) over all positions of a random text, nats."""
    pytest.importorskip("xllamacpp")
    generator = torch.Generator().manual_seed(5)
    ids = [1, *torch.randint(259, 400, (count - 2,), generator=generator).tolist()]
    with torch.no_grad():
        truth = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    with LlamaCppModel(path, n_ctx=256, exact=True, threads=1) as running:
        found = running.log_probs_along(ids[:1], [*ids[1:], 300])
    assert found.shape == truth.shape
    truth, found = truth.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((truth.exp() * (truth - found)).sum(-1).max())


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, wide heads": ("mistral", {"head_dim": 24, "tie_word_embeddings": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one kv head each": ("llama", {"num_key_value_heads": 4}),
    "llama3 scaling": ("llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("llama", rope("linear", factor=4.0)),
    "yarn": ("llama", rope("yarn", factor=5.0, original_max_position_embeddings=32)),
    "qwen2": ("qwen2", {}),
    "qwen2, tied, yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            **rope("yarn", factor=4.0, original_max_position_embeddings=40),
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 24}),
    "qwen3, linear": ("qwen3", {"head_dim": 16, **rope("linear", factor=3.0)}),
}


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tokenizer_folder: Path, tmp_path: Path) -> None:
    model_type, fields = CASES[case]
    model = make_model(model_type, **fields)
    path = write(model, architecture_of(model), tokenizer_folder, tmp_path / "m.gguf")
    assert divergence(model, path) < 1e-9  # seen 4e-11


@pytest.mark.parametrize("spoilt", ["order of rows", "rope factors", "scaling", "biases"])
def test_the_comparison_sees_each_fact(
    spoilt: str, tokenizer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = rope("linear", factor=4.0) if spoilt == "scaling" else {"rope_parameters": LLAMA3}
    model = make_model("llama", attention_bias=True, **fields)
    if spoilt == "order of rows":
        monkeypatch.setattr(Architecture, "stored", lambda _, name, weight: weight)
    elif spoilt == "biases":
        stored = Architecture.stored
        monkeypatch.setattr(
            Architecture,
            "stored",
            lambda self, name, weight: weight if weight.dim() == 1 else stored(self, name, weight),
        )
    elif spoilt == "rope factors":
        monkeypatch.setattr(Architecture, "extra", lambda _: {})
    else:
        monkeypatch.setattr(gguf.GGUFWriter, "add_rope_scaling_factor", lambda *_: None)
    path = write(model, architecture_of(model), tokenizer_folder, tmp_path / "m.gguf")
    assert divergence(model, path) > 0.1  # seen 0.34


def test_permutation_pairs_the_rows_rotary_embedding_pairs() -> None:
    heads, half = 3, 4
    rows = torch.arange(heads * 2 * half).float()
    paired = permute_rotary(rows[:, None].expand(-1, 5), heads)[:, 0].reshape(heads, half, 2)
    assert torch.equal(paired[..., 1] - paired[..., 0], torch.full((heads, half), float(half)))
    assert torch.equal(permute_rotary(rows, heads), paired.flatten())


def test_only_llama_is_permuted() -> None:
    weight = torch.randn(64, 8)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(architecture_of(make_model("llama")).stored(name, weight), weight)
    assert architecture_of(make_model("qwen2")).stored(name, weight) is weight


def test_factors_of_llama3_at_both_ends() -> None:
    """Published limits: high frequencies stay, low ones are divided by the factor."""
    factors = architecture_of(make_model("llama", rope_parameters=LLAMA3)).rope.factors
    assert factors is not None and factors.dtype == torch.float32 and factors.shape == (8,)
    assert factors[0] == 1.0 and factors[-1] == 8.0
    assert (factors.diff() >= 0).all() and ((factors > 1) & (factors < 8)).any()


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        ("mistral", {"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"head_dim": 15}, "head_dim 15 is odd"),
        ("qwen2", {"head_dim": 24}, "head_dim 24 x 4 heads"),
        ("qwen3", {"attention_bias": True, "head_dim": 16}, "attention_bias"),
        ("qwen2", {"rope_parameters": LLAMA3}, "llama3"),
        ("llama", rope("dynamic", factor=2.0), "rope_type 'dynamic'"),
        ("llama", rope("longrope"), "rope_type 'longrope'"),
        ("llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor: 0.5"),
        ("llama", rope("default", mrope_section=[2, 3, 3]), "mrope_section"),
        ("llama", rope("yarn", factor=4.0, attention_factor=1.0), "attention_factor: 1.0"),
        ("llama", rope("yarn", factor=4.0, beta_fast=16), "beta_fast: 16"),
        ("llama", rope("yarn", factor=4.0, truncate=False), "truncate: False"),
        ("llama", rope("yarn", factor=4.0, mscale=1.0), "mscale: 1.0"),
    ],
)
def test_what_gguf_cannot_say_is_refused_by_field(
    model_type: str, fields: dict[str, Any], message: str
) -> None:
    config = {**config_of(make_model(model_type)), **fields}
    with pytest.raises(RecipeError, match=message):
        check_architecture(config)


def test_a_field_that_says_the_usual_is_no_reason_to_refuse() -> None:
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.1386294361119891}
    config = config_of(make_model("llama")) | rope("yarn", factor=4.0, **usual, mscale=None)
    check_architecture(config | {"partial_rotary_factor": 1.0})


@pytest.mark.parametrize(
    ("model_type", "field"),
    [("llama", "vocab_size"), ("mistral", "num_key_value_heads"), ("qwen3", "head_dim")],
)
def test_a_missing_field_is_named(model_type: str, field: str) -> None:
    config = config_of(make_model(model_type))
    del config[field]
    with pytest.raises(DataError, match=rf"config\.json lacks {field}"):
        check_architecture(config)


def test_a_scaling_without_its_factor_is_an_error() -> None:
    config = config_of(make_model("llama")) | rope("linear")
    with pytest.raises(DataError, match=r"type linear in config\.json lacks factor"):
        check_architecture(config)
    with pytest.raises(DataError, match="high_freq_factor 1"):
        check_architecture(config | {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}})


def test_the_older_spelling_of_rope_is_read() -> None:
    """transformers 4: rope_theta and rope_scaling; neither: 10000, as Llama-2's config.json."""
    model = make_model("llama")
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(model).items()}
    config = config_of(model)
    del config["rope_parameters"]
    scaling = {**LLAMA3, "type": "llama3"}
    del scaling["rope_theta"], scaling["rope_type"]
    older = read_architecture(config | {"rope_theta": 500.0, "rope_scaling": scaling}, shapes)
    newer = read_architecture(config | {"rope_parameters": LLAMA3}, shapes)
    assert older == newer
    assert torch.equal(older.extra()["rope_freqs.weight"], newer.extra()["rope_freqs.weight"])
    assert read_architecture(config | {"rope_scaling": None}, shapes).rope.theta == 10000.0


def test_the_set_of_tensors_is_the_architectures() -> None:
    model = make_model("qwen2")
    config = config_of(model)
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(model).items()}
    bias = "model.layers.1.self_attn.k_proj.bias"
    with pytest.raises(DataError, match=rf"no tensor {bias}"):
        read_architecture(config, {k: v for k, v in shapes.items() if k != bias})
    foreign = {**shapes, "model.layers.2.mlp.up_proj.weight": (96, 64)}
    with pytest.raises(DataError, match=r"layers\.2\.mlp\.up_proj\.weight has no place"):
        read_architecture(config, foreign)
    with pytest.raises(DataError, match=r"lm_head\.weight has no place"):
        read_architecture(config | {"tie_word_embeddings": True}, shapes)
    with pytest.raises(DataError, match=r"has shape \(512, 64\), config\.json says \(500, 64\)"):
        read_architecture(config | {"vocab_size": 500}, shapes)
    with pytest.raises(DataError, match=r"k_proj\.weight has shape \(32, 64\)"):
        read_architecture(config | {"num_key_value_heads": 4}, shapes)
    with pytest.raises(DataError, match="vision has no place in a GGUF of architecture qwen2"):
        architecture_of(model).rename("model.vision")


def test_context_is_the_window_where_there_is_one() -> None:
    windowed = make_model("mistral", sliding_window=64)
    assert architecture_of(windowed).context_length == 64
    assert "context_length is 64, the model's sliding window" in architecture_of(windowed).notes[0]
    asked = architecture_of(windowed, context_length=128)
    assert asked.context_length == 128
    assert "past 64 tokens the file attends to all" in asked.notes[0]
    assert architecture_of(windowed, context_length=32).notes == ()
    with pytest.raises(RecipeError, match="context_length 161 is beyond the model's 160 positions"):
        architecture_of(windowed, context_length=161)


def test_whose_window_counts() -> None:
    """Llama has none whatever its config.json says; Qwen's must be switched on."""
    config = config_of(make_model("mistral", sliding_window=None))
    shapes = {n: tuple(w.shape) for n, w in weights_of(make_model("mistral")).items()}
    assert read_architecture(config, shapes).context_length == POSITIONS
    del config["sliding_window"]  # transformers then takes 4096
    config["max_position_embeddings"] = 8192
    assert read_architecture(config, shapes).context_length == 4096
    as_llama = config | {"architectures": ["LlamaForCausalLM"], "sliding_window": 64}
    assert read_architecture(as_llama, shapes).context_length == 8192
    qwen = make_model("qwen2")
    shapes = {n: tuple(w.shape) for n, w in weights_of(qwen).items()}
    config = {**config_of(qwen), "sliding_window": 64, "layer_types": None}
    assert read_architecture(config, shapes).context_length == POSITIONS
    config |= {"use_sliding_window": True, "max_window_layers": 2}
    assert read_architecture(config, shapes).context_length == POSITIONS
    assert read_architecture(config | {"max_window_layers": 1}, shapes).context_length == 64


def test_yarn_reaches_beyond_the_positions_of_config_json() -> None:
    fields = rope("yarn", factor=4.0, original_max_position_embeddings=POSITIONS)
    model = make_model("qwen2", **fields)
    assert architecture_of(model).context_length == POSITIONS
    assert architecture_of(model, context_length=4 * POSITIONS).context_length == 4 * POSITIONS
    with pytest.raises(RecipeError, match="beyond the model's 640 positions"):
        architecture_of(model, context_length=4 * POSITIONS + 1)
