"""The verifier passes what was trained and fails what was not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.errors import VerificationError
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.check.texts import odd_strings
from zephyr_lite.export.check.verify import (
    ExportMismatch,
    compare_template,
    compare_tokens,
    verify_gguf,
)
from zephyr_lite.export.gguf import architecture
from zephyr_lite.export.gguf import target as gguf_module
from zephyr_lite.export.weights.fold import FoldedModel

pytest.importorskip("xllamacpp")

PROMPTS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "once upon a time"}],
    [{"role": "system", "content": "you ofthe friend"}, {"role": "user", "content": " Hi "}],
    [
        {"role": "user", "content": "a\n\n"},
        {"role": "assistant", "content": "b 漢字"},
        {"role": "user", "content": "<|assistant|>\nfriendly"},
    ],
]


def with_prompt(messages: list[dict[str, str]]) -> str:
    return render(messages, True)


@pytest.fixture(scope="module")
def folded(nf4_base: Path, adapter: Path) -> FoldedModel:
    return FoldedModel(nf4_base, adapter)


@pytest.fixture(scope="module")
def truth(folded: FoldedModel, folded_model: Any, as_truth: Any) -> Any:
    return as_truth(folded_model(folded))


@pytest.fixture
def verify(
    folded: FoldedModel,
    truth: Any,
    tokenizer_folder: Path,
    tokenizer: Tokenizer,
    write_gguf: Callable[..., Any],
    tmp_path: Path,
) -> Callable[..., dict[str, Any]]:
    """Write the folded model (or what monkeypatching made of it) and verify it."""

    def run(quant: str, template: str = ZEPHYR_TEMPLATE, **options: Any) -> dict[str, Any]:
        out = tmp_path / f"{quant}.gguf"
        write_gguf(folded, tokenizer_folder, template, out, quant)
        arguments = {"prompts": PROMPTS, "n_tokens": 12, "threads": 1, **options}
        return verify_gguf(out, truth, tokenizer, ZEPHYR_TEMPLATE, with_prompt, **arguments)

    return run


@pytest.mark.parametrize(("quant", "bound"), [("f32", 1e-7), ("f16", 1e-4), ("q8_0", 1e-3)])
def test_what_was_trained_passes(
    quant: str,
    bound: float,
    verify: Callable[..., dict[str, Any]],
    request: pytest.FixtureRequest,
) -> None:
    if quant != "f32":
        request.getfixturevalue("fewer_strings")
    report = verify(quant)
    drift = report["drift"]
    assert report["passed"] and not report["failures"]
    assert report["tokens"]["compared"] > len(odd_strings()) // (1 if quant == "f32" else 8) + 3
    assert abs(drift["kl_mean"]) < bound
    assert 0 < drift["positions"] <= 36
    assert abs(drift["nll_truth"] - drift["nll_file"]) < 0.02
    json.dumps(report)
    if quant != "q8_0":
        assert drift["decided_top1"] == 1.0


@pytest.mark.usefixtures("fewer_strings")
def test_twenty_prompts_on_given_answers(verify: Callable[..., dict[str, Any]]) -> None:
    answers = [[290 + i, 3 + 0xE6, 300, 2] for i in range(20)]
    seen: list[tuple[int, int]] = []
    report = verify(
        "f16",
        prompts=[PROMPTS[0]] * 20,
        answers=answers,
        n_tokens=3,
        on_prompt=lambda *at: seen.append(at),
    )
    assert report["drift"]["positions"] == 60
    assert seen[-1] == (20, 20)


def failed(verify: Callable[..., dict[str, Any]], **options: Any) -> dict[str, Any]:
    with pytest.raises(ExportMismatch) as caught:
        verify("f16", **options)
    assert isinstance(caught.value, VerificationError)
    assert caught.value.report["passed"] is False
    return caught.value.report


@pytest.mark.usefixtures("fewer_strings")
def test_unpermuted_queries_and_keys_fail(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "permute_rotary", lambda weight, heads: weight)
    report = failed(verify)
    assert report["drift"]["kl_mean"] > 1e-3
    assert not report["tokens"]["different_strings"]


@pytest.mark.usefixtures("fewer_strings")
def test_a_forgotten_adapter_fails(
    verify: Callable[..., dict[str, Any]],
    nf4_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    folded: FoldedModel,
) -> None:
    monkeypatch.setattr(folded, "tensor", FoldedModel(nf4_base, None).tensor)
    assert failed(verify)["drift"]["kl_mean"] > 1e-3


@pytest.mark.usefixtures("fewer_strings")
@pytest.mark.parametrize(
    "spoil",
    [
        lambda v: {"scores": [-1000.0] * len(v.scores)},
        lambda v: {"scores": [-s for s in v.scores]},
        lambda v: {"add_space_prefix": False},
        lambda v: {"types": [1 if t == gguf.TokenType.CONTROL else t for t in v.types]},
    ],
    ids=["no scores", "reversed scores", "no space prefix", "specials as text"],
)
def test_a_wrong_vocabulary_fails(
    spoil: Callable[[Any], dict[str, Any]],
    verify: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = gguf_module.read_vocabulary

    def spoilt(folder: Path, size: int) -> Any:
        vocabulary = read(folder, size)
        return dataclasses.replace(vocabulary, **spoil(vocabulary))

    monkeypatch.setattr(gguf_module, "read_vocabulary", spoilt)
    tokens = failed(verify, n_tokens=2)["tokens"]
    assert tokens["different_strings"] or tokens["different_sweeps"]


@pytest.mark.usefixtures("fewer_strings")
def test_another_end_of_turn_fails(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = gguf_module.read_vocabulary
    monkeypatch.setattr(
        gguf_module, "read_vocabulary", lambda *a: dataclasses.replace(read(*a), eos=0)
    )
    report = failed(verify, n_tokens=2)
    assert any("rendered differently" in failure for failure in report["failures"])


def test_another_template_fails(verify: Callable[..., dict[str, Any]]) -> None:
    without_system = ZEPHYR_TEMPLATE.replace("loop.first and", "false and")
    template = failed(verify, template=without_system, n_tokens=2)["template"]
    assert template["verbatim"] is False
    assert template["different_prompts"] == [0, 2]
    assert len(template["different_strings"]) > 300  # every user's and assistant's turn


def test_a_template_that_strips_contents_fails(verify: Callable[..., dict[str, Any]]) -> None:
    stripping = ZEPHYR_TEMPLATE.replace("message['content']", "message['content']|trim")
    template = failed(verify, template=stripping, n_tokens=2)["template"]
    assert {" ", "Hello\n\n", "\t漢字"} <= set(template["different_strings"])
    assert "Hello world" not in template["different_strings"]


def test_a_template_of_another_trainer_passes(
    folded: FoldedModel,
    truth: Any,
    tokenizer: Tokenizer,
    tokenizer_folder: Path,
    write_gguf: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """It sets the BOS itself and has no place for a system's turn."""
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ '[' + m['role'] + ']' + m['content'] + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
    )

    def their_render(messages: list[dict[str, str]]) -> str:
        if messages[0]["role"] == "system":
            raise TemplateError("no system")
        return "<s>" + "".join(f"[{m['role']}]{m['content']}</s>" for m in messages) + "[assistant]"

    out = tmp_path / "m.gguf"
    write_gguf(folded, tokenizer_folder, template, out, "f16")
    prompts = [PROMPTS[0], PROMPTS[2]]
    report = verify_gguf(out, truth, tokenizer, template, their_render, prompts, 4, threads=1)
    assert report["template"]["roles"] == ["user", "assistant"]
    assert not report["template"]["different_strings"]


@pytest.mark.usefixtures("fewer_strings")
def test_prompts_are_never_quoted(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "zephyr_lite.export.check.llama_cpp.LlamaCppModel.tokenize", lambda *a, **k: [1, 290]
    )
    report = failed(verify, n_tokens=2)
    assert report["tokens"]["different_prompts"] == [0, 1, 2]
    assert "once upon" not in json.dumps(report)


def test_mistrals_own_tokenizer(
    shared_data: Path, write_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    folder = shared_data / "models/mistral-7b-v0.1-tokenizer"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(vocab_size=32000, num_attention_heads=2, num_key_value_heads=1, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    out = tmp_path / "m.gguf"
    model = FoldedModel(tmp_path / "base", None)
    report = write_gguf(model, folder, ZEPHYR_TEMPLATE, out, "q8_0")
    assert "4096" in report["notes"][0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    golden = json.loads((folder / "golden.json").read_text())
    with LlamaCppModel(out, n_ctx=64, threads=1) as running:
        for text, ids in golden.items():
            assert running.tokenize(text) == ids, text
        tokens = compare_tokens(running, tokenizer, [with_prompt(p) for p in PROMPTS])
        assert tokens.pop("compared") > 1000
        assert not any(tokens.values()), tokens
        template = compare_template(running, tokenizer, with_prompt, PROMPTS)
        assert template["roles"] == ["user", "system", "assistant"]
        assert template["compared"] > 600
        assert not template["different_strings"] + template["different_prompts"], template
        assert running.log_probs([1]).shape == (32000,)
