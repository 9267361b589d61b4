"""Whole files of the byte-level families: verified end to end, and refused for another cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from zephyr_lite.export.check import verify as verify_module
from zephyr_lite.export.check.texts import odd_strings
from zephyr_lite.export.check.verify import ExportMismatch, verify_gguf
from zephyr_lite.export.gguf import byte_level
from zephyr_lite.export.weights.fold import FoldedModel

pytest.importorskip("xllamacpp")

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHAPE = {
    "vocab_size": 1600, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    "initializer_range": 0.06,
}  # fmt: skip
DECOMPOSED = "cafe\u0301 no\u0308l"
PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "once upon a time 2024"}],
    [{"role": "system", "content": "it's 漢字"}, {"role": "user", "content": DECOMPOSED}],
]


def chatml(messages: list[dict[str, str]]) -> str:
    turns = (f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return "".join(turns) + "<|im_start|>assistant\n"


@pytest.fixture
def verify(
    byte_level_tokenizer: Callable[..., Path],
    write_gguf: Callable[..., dict[str, Any]],
    folded_model: Any,
    as_truth: Any,
    tmp_path: Path,
) -> Callable[..., dict[str, Any]]:
    """`verify("qwen2", "qwen2")`: write and verify a tiny model with a tokenizer of that style."""

    def run(model_type: str, style: str) -> dict[str, Any]:
        folder = byte_level_tokenizer(style, special=SPECIAL, eos="<|im_end|>")
        torch.manual_seed(4)
        config = AutoConfig.for_model(model_type, **SHAPE)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        model, out = FoldedModel(folder, None), tmp_path / "m.gguf"
        write_gguf(model, folder, CHATML, out, "f16")
        truth = as_truth(folded_model(model))
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        options: dict[str, Any] = {"n_tokens": 8, "eos_token": "<|im_end|>", "threads": 1}
        return verify_gguf(out, truth, tokenizer, CHATML, chatml, PROMPTS, **options)

    return run


@pytest.mark.parametrize(
    ("model_type", "style", "composed"), [("qwen2", "qwen2", True), ("llama", "llama-bpe", False)]
)
def test_a_byte_level_model_passes(
    model_type: str, style: str, composed: bool, verify: Callable[..., dict[str, Any]]
) -> None:
    report = verify(model_type, style)
    assert report["passed"]
    assert report["tokens"]["composed"] is composed
    assert report["tokens"]["compared"] > len(odd_strings())
    assert report["template"]["roles"] == ["user", "system", "assistant"]
    assert report["template"]["compared"] > 2 * len(odd_strings())
    assert report["stop"] == {"token": "<|im_end|>", "ends_turn": True, "also": None}


def test_composing_is_all_that_is_forgiven(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared as it is, decomposed text has other ids in llama.cpp, and nothing else has."""
    monkeypatch.setattr(verify_module, "composes", lambda spec: False)
    with pytest.raises(ExportMismatch, match="tokenised differently") as caught:
        verify("qwen2", "qwen2")
    tokens, template = (caught.value.report[part] for part in ("tokens", "template"))
    assert tokens["different_prompts"] == template["different_prompts"] == [1]
    decomposed = {text for text in odd_strings() if not unicodedata.is_normalized("NFC", text)}
    assert set(tokens["different_strings"]) == decomposed


@pytest.mark.parametrize(
    ("model_type", "style", "wrong"),
    [("qwen2", "qwen2", "gpt-2"), ("llama", "llama-bpe", "qwen2")],
)
def test_another_cut_into_words_is_refused(
    model_type: str,
    style: str,
    wrong: str,
    verify: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(byte_level, "pre_tokenizer", lambda *_: wrong)
    with pytest.raises(ExportMismatch, match="tokenised differently") as caught:
        verify(model_type, style)
    tokens, template = (caught.value.report[part] for part in ("tokens", "template"))
    assert tokens["different_strings"] and template["different_strings"]
