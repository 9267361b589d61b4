"""Byte-level BPE in llama.cpp: the same ids as the tokenizer, or a refusal by name."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import TokenType
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.check.texts import odd_strings
from zephyr_lite.export.gguf import byte_level
from zephyr_lite.export.gguf.architecture import read_architecture
from zephyr_lite.export.gguf.vocabulary import read_vocabulary

SIZE = 1600  # rows of the embedding; the tokenizers use fewer
MakeTokenizer = Callable[..., Path]


def words_only() -> pre_tokenizers.PreTokenizer:
    """A cut that llama.cpp has no name for."""
    cut = pre_tokenizers.Split(Regex(r"\w+"), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])


@contextmanager
def running(folder: Path, size: int, out: Path) -> Iterator[LlamaCppModel]:
    """llama.cpp with the vocabulary of a folder, on a model of next to nothing."""
    pytest.importorskip("xllamacpp")
    rng = np.random.default_rng(0)
    config = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": size, "hidden_size": 32,
        "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    layer = {f"model.layers.0.{name}.weight": (32, 32) for name in linears}
    norms = ["layers.0.input_layernorm", "layers.0.post_attention_layernorm", "norm"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (size, 32), **layer}
    shapes |= {f"model.{name}.weight": (32,) for name in norms}
    architecture = read_architecture(config, shapes)
    writer = gguf.GGUFWriter(out, architecture.name)
    architecture.add_metadata(writer)
    read_vocabulary(folder, size).add_to(writer)
    for name, shape in shapes.items():
        writer.add_tensor(architecture.rename(name), rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with LlamaCppModel(out, n_ctx=64, threads=1) as model:
        yield model


def differing(folder: Path, model: LlamaCppModel, texts: list[str]) -> list[str]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [
        text
        for text in texts
        for add in (True, False)
        if model.tokenize(text, add_special=add)
        != tokenizer.encode(text, add_special_tokens=add).ids
    ]


@pytest.mark.parametrize("name", byte_level.NAMES.values())
def test_llama_cpp_has_the_same_ids(
    name: str, byte_level_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    folder = byte_level_tokenizer(name)
    added = Tokenizer.from_file(str(folder / "tokenizer.json")).get_added_tokens_decoder().values()
    texts = [*odd_strings(tuple(token.content for token in added))]
    if name == "qwen2":
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert len(texts) >= 200
    with running(folder, SIZE, tmp_path / "m.gguf") as model:
        assert differing(folder, model, texts) == []


def test_the_comparison_sees_a_wrong_name(
    byte_level_tokenizer: MakeTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = byte_level_tokenizer("qwen2")
    monkeypatch.setattr(byte_level, "pre_tokenizer", lambda *_: "gpt-2")
    with running(folder, SIZE, tmp_path / "m.gguf") as model:
        assert len(differing(folder, model, list(odd_strings()))) > 10


def test_decomposed_accents_differ_and_are_told(
    byte_level_tokenizer: MakeTokenizer, tmp_path: Path
) -> None:
    """llama.cpp never normalises: a limit of its own, not of the file."""
    folder = byte_level_tokenizer("qwen2")
    text = "cafe\u0301"
    with running(folder, SIZE, tmp_path / "m.gguf") as model:
        assert differing(folder, model, [text])
        assert differing(folder, model, [unicodedata.normalize("NFC", text)]) == []
    assert "NFC" in read_vocabulary(folder, SIZE).notes[0]
    assert read_vocabulary(byte_level_tokenizer("smollm"), SIZE).notes == ()


def test_ids_types_and_ends(byte_level_tokenizer: MakeTokenizer) -> None:
    folder = byte_level_tokenizer("llama-bpe")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    vocabulary = read_vocabulary(folder, SIZE)
    assert (vocabulary.model, vocabulary.pre, vocabulary.scores) == ("gpt2", "llama-bpe", [])
    assert vocabulary.add_bos and vocabulary.bos == ids["<|begin_of_text|>"]
    assert vocabulary.eos == ids["<|eot_id|>"] and vocabulary.unknown is None
    assert vocabulary.types[vocabulary.eos] == TokenType.CONTROL
    assert vocabulary.types[ids["<tool_call>"]] == TokenType.USER_DEFINED
    assert vocabulary.types[ids["Ġthe"]] == TokenType.NORMAL
    assert vocabulary.types[-1] == TokenType.UNUSED and vocabulary.tokens[-1] == f"[PAD{SIZE - 1}]"
    assert all(merge.count(" ") == 1 for merge in vocabulary.merges)


def test_without_bos_llama_cpp_is_given_the_padding(byte_level_tokenizer: MakeTokenizer) -> None:
    """It takes token 11 for BOS else, whatever that is, and hands its text to templates."""
    folder = byte_level_tokenizer("qwen2")
    vocabulary = read_vocabulary(folder, SIZE)
    assert vocabulary.bos is None and not vocabulary.add_bos
    writer = gguf.GGUFWriter(None, "llama")
    vocabulary.add_to(writer)
    keys = writer.kv_data[0]
    assert keys["tokenizer.ggml.bos_token_id"].value == vocabulary.padding
    assert keys["tokenizer.ggml.add_bos_token"].value is False


def test_bytes_without_a_token_are_told(byte_level_tokenizer: MakeTokenizer) -> None:
    folder = byte_level_tokenizer("gpt-2")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    del spec["model"]["vocab"]["\u00ff"]  # the byte FF, of no UTF-8
    path.write_text(json.dumps(spec))
    assert read_vocabulary(folder, SIZE).notes == ()
    spec["model"]["vocab"]["\u00ff"] = spec["model"]["vocab"].pop("\u00e7")
    spec["model"]["merges"] = [m for m in spec["model"]["merges"] if "\u00e7" not in "".join(m)]
    path.write_text(json.dumps(spec))
    assert "no token for 1 bytes" in read_vocabulary(folder, SIZE).notes[0]


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("pre_tokenizer", words_only(), "pre-tokenizer we know for"),
        ("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True), "add_prefix_space"),
        ("normalizer", normalizers.NFKC(), "NFKC"),
        ("model", {"ignore_merges": True}, "ignore_merges True"),
        ("model", {"dropout": 0.1}, "dropout"),
        ("model", {"type": "Unigram"}, "Unigram"),
    ],
)
def test_others_are_refused(
    section: str, change: Any, message: str, byte_level_tokenizer: MakeTokenizer
) -> None:
    folder = byte_level_tokenizer("qwen2")
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    part = change if isinstance(change, dict) else json.loads(change.__getstate__())
    spec[section] = {**spec[section], **part} if section == "model" else part
    path.write_text(json.dumps(spec))
    with pytest.raises(RecipeError, match=message):
        read_vocabulary(folder, SIZE)


def test_contradictions_are_refused(byte_level_tokenizer: MakeTokenizer) -> None:
    folder = byte_level_tokenizer("qwen2")
    path = folder / "tokenizer.json"
    with pytest.raises(DataError, match="the model 900 rows"):
        read_vocabulary(folder, 900)
    spec = json.loads(path.read_text())
    path.write_text(json.dumps({**spec, "model": {**spec["model"], "merges": []}}))
    with pytest.raises(DataError, match="has no merges"):
        read_vocabulary(folder, SIZE)
    spec["added_tokens"][0]["id"] = spec["model"]["vocab"]["a"]
    path.write_text(json.dumps(spec))
    with pytest.raises(DataError, match="gives id"):
        read_vocabulary(folder, SIZE)


SENTENCEPIECE = {"stories260k": 512, "mistral-7b-v0.1-tokenizer": 32000}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_published_sentencepiece_has_the_same_ids(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    folder = shared_data / "models" / name
    with running(folder, SENTENCEPIECE[name], tmp_path / "m.gguf") as model:
        assert differing(folder, model, list(odd_strings())) == []


def test_the_tiny_tokenizer_has_the_same_ids(root: Path, tmp_path: Path) -> None:
    folder = root / "zephyr_lite" / "tiny" / "data"
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    with running(folder, size, tmp_path / "m.gguf") as model:
        assert differing(folder, model, list(odd_strings())) == []
