"""Estimated lengths: near those of real data, with neither rows nor a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.dialogues import load_dialogues
from zephyr_lite.data.encoded import truncate_pair
from zephyr_lite.data.feedback import load_pairs
from zephyr_lite.data.sources import resolve
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.plan.estimates import (
    ROWS,
    count_rows,
    estimate,
    estimated_documents,
    estimated_pairs,
    truncated,
)
from zephyr_lite.recipe import Dpo, Recipe, Sft, Source
from zephyr_lite.recipe_file import load


@pytest.mark.parametrize("seed", range(3))
def test_truncation_is_the_recipe_s(seed: int):
    sizes = np.random.default_rng(seed).integers(1, 60, (200, 3))
    settings = Dpo.model_validate({"max_length": 60, "max_prompt_length": 25})
    found = truncated(sizes, settings).tolist()
    for (p, c, r), cut in zip(sizes.tolist(), found, strict=True):
        pair = truncate_pair(*(np.zeros(n, np.int32) for n in (p, c, r)), 60, 25, 1)
        assert cut == [len(pair.prompt), len(pair.chosen), len(pair.rejected)]


def test_estimates_are_drawn_the_same_each_time():
    first, again = (estimated_pairs(500, Dpo()).lengths_E3 for _ in range(2))
    assert np.array_equal(first, again)
    assert estimated_documents(50, Sft()).rows == estimated_documents(50, Sft()).rows


def test_ultrachat_has_its_published_mean():
    found = estimated_documents(20_000, Sft())
    assert found.total_tokens / 20_000 == pytest.approx(1373, abs=1)
    assert found.is_estimate and "20,000 dialogues of 1,373 tokens" in found.source
    wrapped = estimated_documents(20_000, Sft.model_validate({"packing": "wrapped"}))
    assert wrapped.total_tokens == found.total_tokens + 20_000  # an end token between documents


def _recipe(root: Path, name: str, *changes: str) -> Recipe:
    return load(str(root / "recipes" / f"{name}.yaml"), changes)


def test_a_plan_of_zephyr_needs_nothing_but_the_recipe(root: Path):
    """Published counts, limits and weights; no connection, no file."""
    found = estimate(_recipe(root, "zephyr-7b"), "dpo")
    assert found.n_examples == 61_135
    assert estimate(_recipe(root, "zephyr-7b-weekend"), "dpo").n_examples == 30_000
    rows = estimate(_recipe(root, "zephyr-7b-weekend"), "sft")
    assert rows.total_tokens == pytest.approx(40_000 * 1373, rel=1e-3)
    halved = _recipe(root, "zephyr-7b", "data.feedback.train.weight=0.5")
    assert estimate(halved, "dpo").n_examples == round(61_135 / 2)


@pytest.mark.parametrize(
    ("fields", "n"),
    [
        ({"split": "train_sft"}, 207_865),
        ({"split": "test_sft", "limit": 100, "weight": 2}, 200),
        ({"split": "train_sft[:1000]"}, 1000),
        ({"split": "train_sft[207000:]", "weight": 0.2}, 173),
        ({"split": "train_gen", "limit": 70}, 70),
    ],
)
def test_hub_rows_are_counted_as_published(fields: dict[str, Any], n: int):
    assert count_rows(Source.model_validate({"path": "HuggingFaceH4/ultrachat_200k"} | fields)) == n


@pytest.mark.parametrize("fields", [{"split": "train_gen"}, {"split": "train_sft[:10%]"}])
def test_unknown_hub_rows_are_an_error_with_a_way_out(fields: dict[str, Any]):
    with pytest.raises(DataError, match="not known before it is read") as caught:
        count_rows(Source.model_validate({"path": "HuggingFaceH4/ultrachat_200k"} | fields))
    assert "limit" in (caught.value.hint or "")


def test_local_rows_are_counted(tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    (tmp_path / "b.json").write_text('[{"a": 1}, {"a": 2}, {"a": 3}]')
    pq.write_table(pa.table({"a": list(range(7))}), tmp_path / "c.parquet")
    counts = {name: count_rows(Source(path=str(tmp_path / name))) for name in _names(tmp_path)}
    assert counts == {"a.jsonl": 2, "b.json": 3, "c.parquet": 7}
    assert count_rows(Source(path=str(tmp_path))) == 12
    assert count_rows(Source(path=str(tmp_path), file="c.parquet", weight=2)) == 14
    assert count_rows(Source(path=str(tmp_path), limit=5, weight=0.5)) == 2
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="unsound parquet"):
        count_rows(Source(path=str(tmp_path)))


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.mark.parametrize(("stage", "exact"), [("sft", 0.02), ("dpo", 0.03)])
def test_local_data_is_measured_by_the_tokenizer_at_hand(
    root: Path, tmp_path: Path, stage: Any, exact: float
):
    recipe = _recipe(root, "tiny")
    assert recipe.base.build is not None
    (tmp_path / "tokenizer.json").write_bytes(resolve(recipe.base.build.tokenizer).read_bytes())
    truth = _tokens_of(recipe, load_tokenizer(tmp_path), stage)
    found = estimate(recipe, stage)
    assert found.is_estimate
    assert found.total_tokens == pytest.approx(truth, rel=exact)


def _tokens_of(recipe: Recipe, tokenizer: ChatTokenizer, stage: str) -> int:
    if stage == "sft":
        assert recipe.data.dialogues
        dialogues, _ = load_dialogues(recipe.data.dialogues.train)
        encoded = tokenizer.encode_dialogues([d.messages for d in dialogues])
        return sum(len(ids) for ids, _ in encoded)
    assert recipe.data.feedback and recipe.dpo
    pairs, _ = load_pairs(recipe.data.feedback.train, rule=recipe.data.feedback.rule)
    return sum(int(lengths.sum()) for lengths in _pair_lengths(tokenizer, pairs, recipe.dpo))


def _pair_lengths(tokenizer: ChatTokenizer, pairs: Any, settings: Dpo) -> np.ndarray:
    encoded = tokenizer.encode_pairs(
        [(p.prompt, p.chosen, p.rejected) for p in pairs],
        max_length=settings.max_length,
        max_prompt_length=settings.max_prompt_length,
    )
    return np.array([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in encoded])


@pytest.fixture(scope="module")
def mistral_tokenizer(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    source = shared_data / "models" / "mistral-7b-v0.1-tokenizer" / "tokenizer.json"
    shutil.copy(source, folder)
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return load_tokenizer(folder)


@pytest.mark.parametrize("limits", [(1024, 512), (512, 256), (2048, 1024)])
def test_ultrafeedback_is_estimated_within_a_tenth(
    shared_data: Path, mistral_tokenizer: ChatTokenizer, limits: tuple[int, int]
):
    """Means of each part, of the whole, and the long tail, under three truncations."""
    settings = Dpo.model_validate({"max_length": limits[0], "max_prompt_length": limits[1]})
    file = shared_data / "aif" / "ultrafeedback_pairs.jsonl"
    pairs, _ = load_pairs([Source(path=str(file))], rule="overall", ties="keep", on_fault="drop")
    truth = _pair_lengths(mistral_tokenizer, pairs, settings)
    found = estimated_pairs(ROWS["HuggingFaceH4/ultrafeedback_binarized", "train_prefs"], settings)
    assert found.lengths_E3.mean(0) == pytest.approx(truth.mean(0), rel=0.1)
    mean = found.total_tokens / found.n_examples
    assert mean == pytest.approx(truth.sum(1).mean(), rel=0.05)
    long = [np.percentile(sizes.sum(1), 95) for sizes in (found.lengths_E3, truth)]
    assert long[0] == pytest.approx(long[1], rel=0.1)


@pytest.mark.parametrize("name", ["moss_multiturn", "oasst_trees", "alpaca", "dolly_hhrlhf"])
def test_local_dialogues_without_a_tokenizer_are_estimated_by_their_bytes(
    shared_data: Path, mistral_tokenizer: ChatTokenizer, name: str, root: Path
):
    source = shared_data / "sft" / f"{name}.jsonl"
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "base": "somebody/else",
            "sft": {},
            "data": {"dialogues": {"train": str(source)}, "on_fault": "drop"},
        }
    )
    dialogues, _ = load_dialogues([Source(path=str(source))], on_fault="drop")
    encoded = mistral_tokenizer.encode_dialogues([d.messages for d in dialogues])
    truth = sum(len(ids) for ids, _ in encoded)
    assert estimate(recipe, "sft").total_tokens == pytest.approx(truth, rel=0.15)


def test_a_stage_that_does_not_train_has_no_lengths(root: Path):
    with pytest.raises(RecipeError, match="trains no dDPO"):
        estimate(_recipe(root, "ablations/dsft"), "dpo")
    given = _recipe(root, "zephyr-7b", "sft.from=HuggingFaceH4/mistral-7b-sft-beta")
    with pytest.raises(RecipeError, match="trains no dSFT"):
        estimate(given, "sft")
