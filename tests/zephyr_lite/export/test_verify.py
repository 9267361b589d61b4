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
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.errors import VerificationError
from zephyr_lite.export import gguf as gguf_module
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.export.gguf import write_gguf
from zephyr_lite.export.llama_cpp import LlamaCppModel
from zephyr_lite.export.verify import (
    ODD_STRINGS,
    Drift,
    ExportMismatch,
    compare_tokens,
    verify_gguf,
)

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
    tmp_path: Path,
) -> Callable[..., dict[str, Any]]:
    """Write the folded model (or what monkeypatching made of it) and verify it."""

    def run(quant: str, template: str = ZEPHYR_TEMPLATE, **options: Any) -> dict[str, Any]:
        out = tmp_path / f"{quant}.gguf"
        write_gguf(folded, tokenizer_folder, template, out, quant, name="m")  # type: ignore[arg-type]
        arguments = {"prompts": PROMPTS, "n_tokens": 12, "threads": 1, **options}
        return verify_gguf(out, truth, tokenizer, ZEPHYR_TEMPLATE, with_prompt, **arguments)

    return run


@pytest.mark.parametrize(("quant", "bound"), [("f32", 1e-7), ("f16", 1e-4), ("q8_0", 1e-3)])
def test_what_was_trained_passes(
    quant: str, bound: float, verify: Callable[..., dict[str, Any]]
) -> None:
    report = verify(quant)
    drift = report["drift"]
    assert report["passed"] and not report["failures"]
    assert report["tokens"]["compared"] > len(ODD_STRINGS) + 3
    assert abs(drift["kl_mean"]) < bound
    assert 0 < drift["positions"] <= 36
    assert abs(drift["nll_truth"] - drift["nll_file"]) < 0.02
    json.dumps(report)
    if quant != "q8_0":
        assert drift["decided_top1"] == 1.0


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


def test_unpermuted_queries_and_keys_fail(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_module, "permute_rotary", lambda weight, heads: weight)
    report = failed(verify)
    assert report["drift"]["kl_mean"] > 1e-3
    assert not report["tokens"]["different_strings"]


def test_a_forgotten_adapter_fails(
    verify: Callable[..., dict[str, Any]],
    nf4_base: Path,
    monkeypatch: pytest.MonkeyPatch,
    folded: FoldedModel,
) -> None:
    monkeypatch.setattr(folded, "tensor", FoldedModel(nf4_base, None).tensor)
    assert failed(verify)["drift"]["kl_mean"] > 1e-3


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
    report = failed(verify, template=without_system, n_tokens=2)
    assert report["template"] == {
        "verbatim": False,
        "compared": 3,
        "different_prompts": [0, 2],
    }


def test_prompts_are_never_quoted(
    verify: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "zephyr_lite.export.llama_cpp.LlamaCppModel.tokenize", lambda *a, **k: [1, 290]
    )
    report = failed(verify, n_tokens=2)
    assert report["tokens"]["different_prompts"] == [0, 1, 2]
    assert "once upon" not in json.dumps(report)


def test_drift_by_hand() -> None:
    drift = Drift()
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]), torch.tensor([0.25, 0.5, 0.125, 0.125])
    drift.add(p.log(), q.log(), 1)
    drift.add(p.log(), p.log(), 0)
    figures = drift.figures()
    # KL = .5 ln 2 + .25 ln .5 + .25 ln 2 = .5 ln 2
    assert figures["kl_max"] == pytest.approx(0.5 * 0.6931472)
    assert figures["kl_mean"] == pytest.approx(0.25 * 0.6931472)
    assert figures["top1"] == figures["decided_top1"] == 0.5
    assert figures["nll_truth"] == pytest.approx((2 + 1) / 2 * 0.6931472)
    assert figures["nll_file"] == pytest.approx((1 + 1) / 2 * 0.6931472)


def test_mistrals_own_tokenizer(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "models/mistral-7b-v0.1-tokenizer"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(vocab_size=32000, num_attention_heads=2, num_key_value_heads=1, **shape)
    MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    out = tmp_path / "m.gguf"
    model = FoldedModel(tmp_path / "base", None)
    report = write_gguf(model, folder, ZEPHYR_TEMPLATE, out, "q8_0", name="m")
    assert "4096" in report["notes"][0]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    golden = json.loads((folder / "golden.json").read_text())
    with LlamaCppModel(out, n_ctx=64, threads=1) as running:
        for text, ids in golden.items():
            assert running.tokenize(text) == ids, text
        tokens = compare_tokens(running, tokenizer, [with_prompt(p) for p in PROMPTS])
        assert tokens.pop("compared") > 1000
        assert not any(tokens.values()), tokens
        assert running.log_probs([1]).shape == (32000,)
