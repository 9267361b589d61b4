"""Bytes of a layer that wait for its backward, at Mistral-7B's sizes and without a number."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from random_bases import CPU, random_model, with_border
from transformers import MistralConfig, Qwen3Config

from zephyr_lite.data.layout import document_layout
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.layer import Call, Saved, run
from zephyr_lite.model.native import NativeEngine

MISTRAL_7B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_hidden_layers": 1, "vocab_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def meta_models() -> dict[int, Any]:
    """One layer of Mistral-7B in bf16 without data, under no adapter and ranks 16 + 128."""
    found = {}
    for rank, adapters in {0: {}, 144: {"sft": {"r": 16}, "dpo": {"r": 128}}}.items():
        with torch.device("meta"):
            model = random_model(
                MistralConfig(**MISTRAL_7B), adapters, list(adapters), "dpo" if adapters else None
            )
        for name, parameter in model.named_parameters():
            if "lora_" not in name:  # masters stay fp32
                parameter.data = parameter.data.to(torch.bfloat16)
        found[rank] = model
    return found


def bytes_waiting(model: Any, saved: Saved, tokens: int) -> int:
    """Bytes of every storage that the layer's node holds until its backward.

    Not counted: the call, whose cos and sin are one for all layers, and the model's own parameters.
    """
    layer = NativeEngine(model, torch.bfloat16).layers[0]
    layout = document_layout([(np.arange(tokens), np.zeros(tokens, bool))])
    plan = to_device(layout, CPU).plan
    turn_TP = torch.empty(tokens, 64, device="meta")
    x = torch.empty(tokens, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
    y: Any = run(x, layer, Call(plan, turn_TP, turn_TP, 128**-0.5, saved, None, None))
    held = [v for k, v in vars(y.grad_fn).items() if k not in ("call", "layer")]
    storages = {}
    for tensor in tensors_in([*held, list(y.grad_fn.saved_tensors)]):
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def tensors_in(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif dataclasses.is_dataclass(x):
        for part in dataclasses.fields(x):
            yield from tensors_in(getattr(x, part.name))
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from tensors_in(part)


def bytes_per_token(model: Any, saved: Saved) -> float:
    """The slope, so that what does not grow with tokens is no part of it."""
    return (bytes_waiting(model, saved, 2048) - bytes_waiting(model, saved, 1024)) / 1024


@pytest.mark.parametrize("bordered", [False, True], ids=["as held", "bordered"])
@pytest.mark.parametrize("rank", [0, 144])
def test_bytes_a_token_and_layer_at_mistral_7b(
    meta_models: dict[int, Any], rank: int, bordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 on meta tensors, lse and rstd in fp32: x, qkv, out, mid, gate and up, and every S.

    No more with a border: room for dS is where S lies, and what S lay behind is not held for it.
    """
    if bordered:
        with_border(monkeypatch)
    assert bytes_per_token(meta_models[rank], "keep") == 94_344 + 14 * rank <= 94_400 + 14 * rank
    assert bytes_per_token(meta_models[rank], "lean") == 8_192 <= 8_300


def test_norms_of_heads_keep_nothing_more() -> None:
    """What is kept of q and k is what was normed."""
    with torch.device("meta"):
        model = random_model(Qwen3Config(**MISTRAL_7B, head_dim=128), {}, (), None)
    model = model.to(torch.bfloat16)
    assert bytes_per_token(model, "keep") == 94_344
    assert bytes_per_token(model, "lean") == 8_192
