"""tokenizer.json as llama.cpp's vocabulary, and the tokenizers that cannot be one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.gguf.sentencepiece import NEVER, SPACE
from zephyr_lite.export.gguf.vocabulary import read_vocabulary

Write = Callable[..., Path]


def test_ids_scores_and_types(tokenizer_folder: Path, spec: dict[str, Any]) -> None:
    vocabulary = read_vocabulary(tokenizer_folder, 512)
    ids = spec["model"]["vocab"]
    assert len(vocabulary.tokens) == len(vocabulary.scores) == len(vocabulary.types) == 512
    assert vocabulary.tokens[: len(ids)] == list(ids)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.unknown) == (1, 2, 0)
    assert vocabulary.padding is None
    assert vocabulary.add_space_prefix
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
    assert vocabulary.types[:4] == kinds
    assert vocabulary.types[ids["the"]] == TokenType.NORMAL
    assert vocabulary.types[-1] == TokenType.UNUSED
    first = spec["model"]["merges"].index(["t", "h"])
    assert vocabulary.scores[ids["th"]] == -first
    assert vocabulary.scores[ids["x"]] == NEVER


def test_a_score_orders_pieces_as_their_first_merges(shared_data: Path) -> None:
    folder = shared_data / "models" / "mistral-7b-v0.1-tokenizer"
    vocabulary = read_vocabulary(folder, 32000)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert vocabulary.scores[vocabulary.tokens.index(f"{SPACE}t")] == 0
    made = [vocabulary.scores[vocabulary.tokens.index(m.replace(" ", ""))] for m in merges[:300]]
    assert made == sorted(made, reverse=True)
    assert vocabulary.types.count(TokenType.BYTE) == 256
    assert len(vocabulary.tokens) == 32000


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"normalizer": REPLACE}, False),
        ({"normalizer": None, "pre_tokenizer": metaspace("always")}, True),
        ({"normalizer": None, "pre_tokenizer": metaspace("never")}, False),
    ],
    ids=["replace", "metaspace always", "metaspace never"],
)
def test_space_prefix_comes_from_the_tokenizer(
    change: dict[str, Any], expected: bool, spec: dict[str, Any], write_tokenizer: Write
) -> None:
    folder = write_tokenizer({**spec, **change})
    assert read_vocabulary(folder, 512).add_space_prefix is expected


def test_a_byte_level_tokenizer_is_not_taken_for_sentencepiece(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(["a b ab"], trainers.BpeTrainer(special_tokens=["<s>", "</s>"]))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="eos_token None"):  # "</s>" is no default of this kind
        read_vocabulary(tmp_path, 512)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert read_vocabulary(tmp_path, 512).model == "gpt2"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"type": "Unigram"}, "Unigram"),
        ({"byte_fallback": False}, "byte fallback"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_other_models_are_refused(
    model: dict[str, Any], message: str, spec: dict[str, Any], write_tokenizer: Write
) -> None:
    with pytest.raises(RecipeError, match=message):
        read_vocabulary(write_tokenizer({**spec, "model": {**spec["model"], **model}}), 512)


def test_metaspace_first_is_refused(spec: dict[str, Any], write_tokenizer: Write) -> None:
    folder = write_tokenizer({**spec, "normalizer": None, "pre_tokenizer": metaspace("first")})
    with pytest.raises(RecipeError, match="first"):
        read_vocabulary(folder, 512)


def test_an_incomplete_list_of_merges_is_refused(
    spec: dict[str, Any], write_tokenizer: Write
) -> None:
    spec["model"]["merges"].remove(["t", "h"])
    with pytest.raises(DataError, match=r"1 pairs this tokenizer does not, first 't' \+ 'h'"):
        read_vocabulary(write_tokenizer(spec), 512)


def test_a_tokenizer_without_bos_is_refused(spec: dict[str, Any], write_tokenizer: Write) -> None:
    spec["post_processor"] = None
    with pytest.raises(RecipeError, match="must begin with one 1"):
        read_vocabulary(write_tokenizer(spec), 512)


def test_contradictions_are_refused(spec: dict[str, Any], write_tokenizer: Write) -> None:
    with pytest.raises(DataError, match="the model 300 rows"):
        read_vocabulary(write_tokenizer(spec), 300)
    with pytest.raises(DataError, match="eos_token '<end>'"):
        read_vocabulary(write_tokenizer(spec, eos_token="<end>"), 512)
    spec["added_tokens"][2]["lstrip"] = True
    with pytest.raises(RecipeError, match="lstrip of '</s>'"):
        read_vocabulary(write_tokenizer(spec), 512)


def test_only_tokenizer_json_counts(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(StorageError, match=r"no tokenizer\.json"):
        read_vocabulary(tmp_path, 512)


def test_a_token_sought_in_normalised_text_is_refused(
    spec: dict[str, Any], write_tokenizer: Write
) -> None:
    """The default of `add_tokens`; llama.cpp finds it where this tokenizer does not."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
    token = {"id": len(spec["model"]["vocab"]), "content": "<x>", "special": False, **flags}
    spec["added_tokens"].append(token)
    with pytest.raises(RecipeError, match="normalized of '<x>'"):
        read_vocabulary(write_tokenizer(spec), 512)
    token["normalized"] = False
    assert read_vocabulary(write_tokenizer(spec), 512).types[token["id"]] == TokenType.USER_DEFINED
