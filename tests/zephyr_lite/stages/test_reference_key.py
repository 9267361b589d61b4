"""The key of a set of reference log-probs: what changes a log-prob misses, what does not hits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.model.adapters import CONFIG, WEIGHTS, add_adapter, save_adapter
from zephyr_lite.model.base import prepare
from zephyr_lite.recipe import Base, Lora, Recipe
from zephyr_lite.run import Run
from zephyr_lite.stages import reference
from zephyr_lite.stages.context import Context
from zephyr_lite.stopping import Stop
from zephyr_lite.storage import digest

CPU = torch.device("cpu")
Tree = dict[str, Any]


class Silent:
    """A listener that is not interested."""

    def start(self, label: str, total: int, done: int) -> None: ...
    def step(self, record: Tree) -> None: ...
    def note(self, text: str) -> None: ...
    def end(self) -> None: ...


@pytest.fixture(scope="module")
def adapter(load_tiny: Callable, shake: Callable, tmp_path_factory: Any) -> Path:
    model = add_adapter(load_tiny("none"), "sft", Lora(r=4, alpha=8), seed=0)
    shake(model, "sft")
    folder = tmp_path_factory.mktemp("sft")
    save_adapter(model, ["sft"], folder, "base")
    return folder


@pytest.fixture
def recipe(tiny_mistral: Path) -> Tree:
    """The fields of a recipe."""
    rows = {"train": "rows.jsonl"}
    return {
        "name": "key",
        "base": {"model": str(tiny_mistral)},
        "data": {"dialogues": dict(rows), "feedback": dict(rows)},
        "sft": {"lora": {"r": 4, "alpha": 8}},
        "dpo": {"lora": {"r": 4}},
    }


@pytest.fixture
def key_of(adapter: Path, tmp_path: Path) -> Iterator[Callable[..., str]]:
    """`key_of(recipe, folder, adapter, device)` is the set key of a run, through a real context."""

    def find(
        fields: Tree, folder: str = "run", sft: Path = adapter, device: torch.device = CPU
    ) -> str:
        with Run(Recipe.model_validate(fields), tmp_path / folder) as run:
            shutil.rmtree(run.path("sft"), ignore_errors=True)
            shutil.copytree(sft, run.path("sft", "adapter"))
            return digest(reference.set_key(Context(run, device, Silent(), Stop())))

    yield find


def put(fields: Tree, dotted: str, value: Any) -> Tree:
    """A copy of a recipe's fields with one of them changed."""
    changed = json.loads(json.dumps(fields))
    *path, last = dotted.split(".")
    place = changed
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    return changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dpo.learning_rate", 1e-3),
        ("dpo.beta", 0.7),
        ("dpo.epochs", 3),
        ("dpo.max_steps", 4),
        ("dpo.batch_size", 2),
        ("dpo.optimizer", "adamw"),
        ("dpo.loss", "ipo"),
        ("dpo.lora.r", 64),
        ("dpo.adapter", "continue"),
        ("dpo.log_every", 7),
        ("dpo.max_length", 2000),
        ("dpo.max_prompt_length", 9),
        ("seed", 7),
        ("name", "other"),
        ("memory.tokens_per_micro_batch", 64),
        ("memory.checkpointing", "full"),
        ("memory.head_rows", 3),
        ("kernels", "off"),  # on a CPU there are none
        ("export.quants", ["f16"]),
        ("data.feedback.rule", "worst"),
        ("sft.learning_rate", 1.0),
    ],
)
def test_what_changes_no_log_prob_keeps_the_key(recipe, key_of, field, value) -> None:
    """A changed `sft` gives another adapter, and that is in the key; the field itself is not."""
    assert key_of(put(recipe, field, value)) == key_of(recipe)


def test_the_run_folder_is_not_in_the_key(recipe, key_of) -> None:
    assert key_of(recipe, "one") == key_of(recipe, "two")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base.quantization", "none"),
        ("base.double_quant", False),
        ("base.dtype", "bfloat16"),
        ("engine", "hf"),
        ("gemm", "fp16acc"),
        ("attention", "xformers"),
        ("sft", None),
    ],
)
def test_another_recipe_that_matters_is_another_key(recipe, key_of, field, value) -> None:
    assert key_of(put(recipe, field, value)) != key_of(recipe)


def another_base(source: Path, folder: Path, change: Callable[[Path], None]) -> str:
    """A changed copy of a base model's folder."""
    shutil.copytree(source, folder)
    change(folder)
    return str(folder)


def _weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77.0
    (folder / "config.json").write_text(json.dumps(config))


def _eps(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.01}))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("change", [_weights, _rope, _eps])
def test_another_base_is_another_key(
    recipe, key_of, tiny_mistral, tmp_path, change, quantization
) -> None:
    recipe = put(recipe, "base.quantization", quantization)
    other = another_base(tiny_mistral, tmp_path / "base", change)
    assert key_of(put(recipe, "base.model", other)) != key_of(recipe)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_same_base_elsewhere_is_the_same_key(
    recipe, key_of, tiny_mistral, tmp_path, quantization
) -> None:
    recipe = put(recipe, "base.quantization", quantization)
    other = another_base(tiny_mistral, tmp_path / "moved", lambda _: None)
    assert key_of(put(recipe, "base.model", other)) == key_of(recipe)


def test_a_changed_tokenizer_is_not_taken_from_the_cache(tiny_mistral, tmp_path) -> None:
    """The same weights with another tokenizer are another base, in the cache too."""
    one = prepare(Base(model=str(tiny_mistral)), CPU)
    other = another_base(
        tiny_mistral,
        tmp_path / "base",
        lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "</s>"}'),
    )
    two = prepare(Base(model=other), CPU)
    assert (two.folder / "tokenizer_config.json").read_text() == '{"eos_token": "</s>"}'
    assert one.sha256 != two.sha256


@pytest.mark.parametrize(
    "change", [{"r": 5}, {"lora_alpha": 9}, {"use_rslora": True}, {"target_modules": ["q_proj"]}]
)
def test_another_scale_of_the_adapter_is_another_key(
    recipe, key_of, adapter, tmp_path, change
) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((adapter / CONFIG).read_text())
    (other / CONFIG).write_text(json.dumps(config | change))
    assert key_of(recipe, sft=other) != key_of(recipe)


def test_another_weight_of_the_adapter_is_another_key(recipe, key_of, adapter, tmp_path) -> None:
    other = shutil.copytree(adapter, tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1e-6
    save_file(tensors, other / WEIGHTS)
    assert key_of(recipe, sft=other) != key_of(recipe)


def test_another_template_version_or_device_is_another_key(recipe, key_of, monkeypatch) -> None:
    before = key_of(recipe)
    with monkeypatch.context() as patch:
        patch.setattr(reference, "template_hash", lambda: "another")
        assert key_of(recipe) != before
    with monkeypatch.context() as patch:
        patch.setattr(reference, "LOG_PROB_VERSION", reference.LOG_PROB_VERSION + 1)
        assert key_of(recipe) != before
    plain = put(put(recipe, "base.quantization", "none"), "base.dtype", "float32")
    assert key_of(plain, device=torch.device("meta")) != key_of(plain)


def test_every_field_of_the_key_is_one_of_these(recipe, adapter, tmp_path) -> None:
    """A new field empties every cache there is: raise LOG_PROB_VERSION and know why."""
    with Run(Recipe.model_validate(recipe), tmp_path / "run") as run:
        shutil.copytree(adapter, run.path("sft", "adapter"))
        key = reference.set_key(Context(run, CPU, Silent(), Stop()))
    names = {"version", "base", "adapter", "template", "dtype", "engine", "gemm", "device"}
    assert set(key) == names | {"kernels", "attention"}
