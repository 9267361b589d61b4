"""A quantised file of ours is llama.cpp's own, byte for byte, made of the same 16-bit weights.

`golden_bytes.json` holds, per mixture and matrix, the type and the first half of the SHA-256 of
what `llama_model_quantize` of llama-cpp-python 0.3.36 wrote for the model below. Its rows of 480
make some matrices fall back, so that every type a mixture can hold is there.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from zephyr_lite.errors import MachineError
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.quants.quantise import KINDS, routes
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel

GOLDEN = json.loads(Path(__file__).with_name("golden_bytes.json").read_text())
CONFIG: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 480,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
ROWS = {"q": 256, "k": 64, "v": 64, "o": 256}


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (512, 256)}
    for layer in range(2):
        at = f"model.layers.{layer}."
        found |= {f"{at}self_attn.{p}_proj.weight": (rows, 256) for p, rows in ROWS.items()}
        found |= {f"{at}mlp.{p}_proj.weight": (480, 256) for p in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (256, 480)
        found |= {f"{at}{p}_layernorm.weight": (256,) for p in ("input", "post_attention")}
    return {**found, "model.norm.weight": (256,), "lm_head.weight": (512, 256)}


def weight(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Nearly normal values with some outliers, by integers, so that they are the same anywhere."""
    x = np.arange(np.prod(shape), dtype=np.uint64) + np.uint64(seed << 32)
    for factor in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ (x >> np.uint64(29))) * np.uint64(factor)
    x ^= x >> np.uint64(32)
    parts = x[:, None] >> np.arange(0, 64, 16, dtype=np.uint64) & np.uint64(0xFFFF)
    values = (parts.sum(axis=1).astype(np.int64) - 131070) * np.where(x % np.uint64(61), 1, 4)
    return torch.from_numpy(values.reshape(shape) / 2.0**20).to(torch.float16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> FoldedModel:
    folder = tmp_path_factory.mktemp("golden")
    tensors = {name: weight(seed, shape) for seed, (name, shape) in enumerate(shapes().items())}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return FoldedModel(folder, None)


@pytest.mark.parametrize("route", ["torch", "ggml"])
@pytest.mark.parametrize("quant", GOLDEN["mixtures"])
def test_the_bytes_are_llama_cpps(
    quant: str,
    route: Literal["torch", "ggml"],
    model: FoldedModel,
    tokenizer_folder: Path,
    tmp_path: Path,
) -> None:
    try:
        use = routes(route)
    except MachineError as error:
        pytest.skip(str(error))
    out = tmp_path / "m.gguf"
    target = GgufTarget(model, tokenizer_folder, "t", out, quant, name="m", identity="", routes=use)
    stream(model, [target])
    target.commit()
    found = {
        t.name: [t.tensor_type.name, hashlib.sha256(t.data.tobytes()).hexdigest()[:32]]
        for t in gguf.GGUFReader(out).tensors
        if len(t.shape) == 2
    }
    assert found == GOLDEN["mixtures"][quant]


def test_every_type_that_is_no_16_bit_one_is_among_them() -> None:
    rows = [row for mixture in GOLDEN["mixtures"].values() for row in mixture.values()]
    assert {kind for kind, _ in rows} == {kind.name for kind in KINDS} - {"F32", "F16", "BF16"}
