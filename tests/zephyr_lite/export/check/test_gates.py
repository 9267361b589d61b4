"""Each type's gate, on a model that was really trained: what is sound passes, damage does not.

stories260K: 64 wide, so that its blocks are short and its rounding coarse. No chat template.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.export.check import verify as verify_module
from zephyr_lite.export.check.drift import GATES
from zephyr_lite.export.check.verify import ExportMismatch, summary, verify_gguf
from zephyr_lite.export.gguf.mixture import FILE_TYPES
from zephyr_lite.export.weights.fold import FoldedModel

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.usefixtures("fewer_strings")

TEMPLATE_KEY = "tokenizer.chat_template"
BEGINNINGS = ("Once upon a time, there was a", "Lily and Ben went to the", "The big dog", "One day")


def as_written(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Path, FoldedModel]:
    folder = shared_data / "models/stories260k-mistral"
    return folder, FoldedModel(folder, None)


@pytest.fixture(scope="module")
def told(stories: tuple[Path, FoldedModel], folded_model: Any, as_truth: Any) -> Any:
    return as_truth(folded_model(stories[1]))


@pytest.fixture(scope="module")
def sound(
    stories: tuple[Path, FoldedModel],
    write_gguf: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`sound("q4_k_m")`: stories260K as that type, without a chat template."""
    made = tmp_path_factory.mktemp("sound")

    def file(quant: str) -> Path:
        out = made / f"{quant}.gguf"
        if not out.exists():
            whole = made / f"{quant}-with-template.gguf"
            write_gguf(stories[1], stories[0], ZEPHYR_TEMPLATE, whole, quant)
            rewritten(whole, out, metadata={TEMPLATE_KEY: None})
        return out

    return file


@pytest.fixture(scope="module")
def continued(stories: tuple[Path, FoldedModel], told: Any) -> list[list[int]]:
    """What the model itself tells behind each beginning: 40 tokens, drawn by chance."""
    tokenizer = Tokenizer.from_file(str(stories[0] / "tokenizer.json"))
    chance, answers = torch.Generator().manual_seed(0), []
    for text in BEGINNINGS:
        ids = tokenizer.encode(text).ids
        start = len(ids)
        while len(ids) < start + 40:
            ids += torch.multinomial(told(ids)[-1].exp(), 1, generator=chance).tolist()
        answers.append(ids[start:])
    return answers


@pytest.fixture
def check(
    stories: tuple[Path, FoldedModel], told: Any, continued: list[list[int]]
) -> Callable[..., dict[str, Any]]:
    """Verify a file of the stories."""

    def run(path: Path, **options: Any) -> dict[str, Any]:
        tokenizer = Tokenizer.from_file(str(stories[0] / "tokenizer.json"))
        prompts = [[{"role": "user", "content": text}] for text in BEGINNINGS]
        arguments = {"n_tokens": 40, "threads": 1, "answers": continued, **options}
        return verify_gguf(path, told, tokenizer, None, as_written, prompts, **arguments)

    return run


def rewritten(
    source: Path,
    out: Path,
    tensors: Callable[[str, np.ndarray], np.ndarray] = lambda name, data: data,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A copy of a GGUF with other bytes of tensors, other values of keys; None drops a key."""
    reader, changed = gguf.GGUFReader(source), dict(metadata or {})
    writer = gguf.GGUFWriter(str(out), "llama")
    for key, field in reader.fields.items():
        value = changed.pop(key, field.contents())
        if not key.startswith("GGUF.") and key != "general.architecture" and value is not None:
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, value, field.types[0], inner)
    assert not changed, f"the file has no {changed}"
    for tensor in reader.tensors:
        data = np.array(tensor.data)
        writer.add_tensor(tensor.name, tensors(tensor.name, data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def half_turned(name: str, data: np.ndarray) -> np.ndarray:
    """Rows of every query in the order transformers has them: 8 heads of 8."""
    if "attn_q" not in name:
        return data
    return data.reshape(8, 4, 2, -1).swapaxes(1, 2).reshape(data.shape)


def one_layer_half_turned(name: str, data: np.ndarray) -> np.ndarray:
    return half_turned(name, data) if name.startswith("blk.2.") else data


def rows_reversed(name: str, data: np.ndarray) -> np.ndarray:
    return data[::-1].copy() if name == "blk.3.ffn_up.weight" else data


def silent(name: str, data: np.ndarray) -> np.ndarray:
    return np.zeros_like(data) if name == "blk.1.attn_output.weight" else data


def coarser(name: str, data: np.ndarray) -> np.ndarray:
    """One matrix of an F16 file at the precision of Q4_0."""
    if name != "blk.2.ffn_up.weight":
        return data
    kind = gguf.GGMLQuantizationType.Q4_0
    values = gguf.quants.quantize(data.astype(np.float32), kind)
    return gguf.quants.dequantize(values, kind).astype(np.float16)


@pytest.mark.parametrize("quant", FILE_TYPES)
def test_every_type_has_a_gate_that_a_trained_model_passes(
    quant: str,
    sound: Callable[[str], Path],
    check: Callable[..., dict[str, Any]],
) -> None:
    report = check(sound(quant))
    assert report["type"] == FILE_TYPES[quant].name
    assert report["passed"]
    assert report["drift"]["positions"] >= verify_module.MIN_POSITIONS
    assert report["template"] == {"verbatim": True}  # none is stored, none was trained with
    assert summary(report).startswith(f"{quant.upper()}: KL ")


@pytest.mark.parametrize(
    ("quant", "damage"),
    [
        *((quant, half_turned) for quant in FILE_TYPES),
        *((quant, one_layer_half_turned) for quant in ("f16", "q4_k_m", "q3_k_m", "q4_0")),
        *((quant, silent) for quant in ("q5_k_m", "q4_k_s", "q3_k_m")),
    ],
)
def test_every_gate_refuses_wrong_weights(
    quant: str,
    damage: Any,
    sound: Callable[[str], Path],
    check: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = rewritten(sound(quant), tmp_path / "x.gguf.part", damage)
    with pytest.raises(ExportMismatch, match=r"^x.gguf is not .* model: mean KL") as caught:
        check(path, n_tokens=10)
    assert caught.value.exit_code == 7
    assert caught.value.report["drift"]["kl_mean"] > GATES[FILE_TYPES[quant].name].mean_kl
    assert path.exists()


@pytest.mark.parametrize(
    ("quant", "damage", "metadata", "why"),
    [
        ("q4_k_m", rows_reversed, {}, "mean KL"),
        ("f16", coarser, {}, "mean KL"),
        ("q4_k_m", None, {"llama.rope.freq_base": 1e6}, "mean KL"),
        ("f16", None, {"llama.attention.layer_norm_rms_epsilon": 1e-2}, "mean KL"),
        ("q4_k_m", None, {"tokenizer.ggml.scores": [0.0] * 512}, "tokenised differently"),
        ("q4_k_m", None, {"tokenizer.ggml.eos_token_id": 300}, "would end a turn at"),
        ("q4_k_m", None, {"tokenizer.ggml.add_bos_token": False}, "tokenised differently"),
    ],
)
def test_other_damage_is_refused(
    quant: str,
    damage: Any,
    metadata: dict[str, Any],
    why: str,
    sound: Callable[[str], Path],
    check: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    path = rewritten(sound(quant), tmp_path / "x.gguf", damage or (lambda _, data: data), metadata)
    with pytest.raises(ExportMismatch, match=why):
        check(path, n_tokens=10)


def test_two_tokens_exchanged_are_found(
    sound: Callable[[str], Path], check: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tokens = gguf.GGUFReader(sound("f16")).fields["tokenizer.ggml.tokens"].contents()
    tokens[300], tokens[301] = tokens[301], tokens[300]
    path = rewritten(sound("f16"), tmp_path / "x.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(ExportMismatch, match="tokenised differently"):
        check(path, n_tokens=1)


def test_a_template_nobody_trained_with_is_found(
    stories: tuple[Path, FoldedModel],
    check: Callable[..., dict[str, Any]],
    write_gguf: Callable[..., Any],
    tmp_path: Path,
) -> None:
    out = tmp_path / "x.gguf"
    write_gguf(stories[1], stories[0], ZEPHYR_TEMPLATE, out, "f16")
    with pytest.raises(ExportMismatch, match="the chat template is not the training template"):
        check(out, n_tokens=1)


def test_a_missing_template_is_found(
    stories: tuple[Path, FoldedModel],
    told: Any,
    continued: list[list[int]],
    sound: Callable[[str], Path],
) -> None:
    tokenizer = Tokenizer.from_file(str(stories[0] / "tokenizer.json"))
    prompts = [[{"role": "user", "content": text}] for text in BEGINNINGS]
    with pytest.raises(ExportMismatch, match="not the training template; 4 prompts") as caught:
        verify_gguf(
            sound("f16"),
            told,
            tokenizer,
            ZEPHYR_TEMPLATE,
            lambda messages: render(messages, True),
            prompts,
            1,
            answers=continued,
            threads=1,
        )
    assert caught.value.report["template"]["different_prompts"] == [0, 1, 2, 3]  # it took ChatML


def test_allowances_widen_the_gate_and_are_told(
    sound: Callable[[str], Path], check: Callable[..., dict[str, Any]]
) -> None:
    report = check(sound("f16"), n_tokens=10, base_weights="original", truth_dtype=torch.bfloat16)
    assert report["gate"]["mean_kl"] == pytest.approx(1e-4 + 0.06 + 2e-3)
    assert len(report["gate"]["allowances"]) == 2
    line = summary(report)
    assert f"nll {report['drift']['nll_file']:.4f}" in line
    assert f"as trained {report['drift']['nll_truth']:.4f}" in line


def test_a_large_vocabulary_is_compared_over_fewer_positions(
    sound: Callable[[str], Path],
    check: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify_module, "MAX_PROBABILITIES", 40 * 512)
    assert check(sound("f16"))["drift"]["positions_per_prompt"] == 10
    monkeypatch.setattr(verify_module, "MAX_PROBABILITIES", 1)
    drift = check(sound("f16"))["drift"]
    assert drift["positions"] == verify_module.MIN_POSITIONS
    assert "which is few" in summary(check(sound("f16"), n_tokens=2))
