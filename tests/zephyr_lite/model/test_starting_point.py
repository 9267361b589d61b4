"""Finding bases, finished adapters and finished models; what is refused, and by which name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from zephyr_lite.errors import MachineError, RecipeError, StorageError
from zephyr_lite.model.adapters import CONFIG, WEIGHTS
from zephyr_lite.model.base import locate, prepare
from zephyr_lite.model.starting_point import StartingPoint, compare_bases, find_start
from zephyr_lite.recipe import Base
from zephyr_lite.storage import seal, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def a_run(sft_adapter: Path, tmp_path: Path) -> Path:
    """A run folder of ours with a finished dSFT on a base whose files hash to "f00d"."""
    folder = tmp_path / "runs" / "a"
    shutil.copytree(sft_adapter, folder / "sft" / "adapter")
    seal(folder / "sft" / "adapter", {})
    write_json(folder / "manifest.json", {"base": {"model": "a/base", "source": "f00d"}})
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """`hub("owner/name", folder)`: the folder's files as a repository in the hub's local cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name: str, folder: Path) -> None:
        root = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, root / "snapshots" / COMMIT)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(COMMIT)

    return add


def edited(folder: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a folder with other fields in one of its JSON files."""
    shutil.copytree(folder, target)
    content = json.loads((target / file).read_text()) | changes
    (target / file).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("tail", [".", "sft", "sft/adapter"])
def test_a_run_folder_is_an_adapter(tail, a_run) -> None:
    start = find_start(str(a_run / tail))
    assert (start.kind, start.revision) == ("adapter", None)
    assert start.folder.samefile(a_run / "sft" / "adapter")


def test_a_model_folder_is_a_model_and_an_adapter_beside_it_comes_first(
    tiny_mistral, sft_adapter, tmp_path
) -> None:
    assert find_start(str(tiny_mistral)).kind == "model"
    both = shutil.copytree(tiny_mistral, tmp_path / "both")
    shutil.copytree(sft_adapter, both, dirs_exist_ok=True)
    assert find_start(str(both)).kind == "adapter", "the handbook's adapters have a config.json too"


def test_paths_may_be_relative_or_at_home(tiny_mistral, a_run, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny_mistral, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("base", "./base", "~/base", str(tmp_path / "base")):
        folder, revision = locate(Base(model=name))
        assert folder.resolve() == tmp_path / "base"
        assert revision is None
    for name in ("runs/a", "./runs/a", "~/runs/a"):
        assert find_start(name).kind == "adapter"


def test_hub_repositories_are_read_from_the_cache(hub, tiny_mistral, sft_adapter) -> None:
    hub("some/adapter", sft_adapter)
    hub("some/model", tiny_mistral)
    found = find_start("some/adapter", offline=True)
    assert (found.kind, found.revision) == ("adapter", COMMIT)
    assert found.identity() == find_start(str(sft_adapter)).identity()
    model = find_start("some/model", offline=True)
    assert (model.kind, model.revision) == ("model", COMMIT)
    folder, revision = locate(Base(model="some/model", revision=COMMIT), offline=True)
    assert (folder, revision) == (model.folder, COMMIT)


def test_what_is_not_there_is_said(hub, tmp_path) -> None:
    with pytest.raises(MachineError, match=r"sft\.from: no/where is not in the local cache"):
        find_start("no/where", offline=True)
    with pytest.raises(RecipeError, match=r"sft\.from: a/b/c is neither a folder nor a hub id"):
        find_start("a/b/c")
    with pytest.raises(RecipeError, match=r"sft\.from: ~/nowhere is not a folder"):
        find_start("~/nowhere")
    with pytest.raises(RecipeError, match="holds neither"):
        find_start(str(tmp_path))
    with pytest.raises(RecipeError, match=r"base\.model: \./nowhere is not a folder"):
        locate(Base(model="./nowhere"))


def test_pickled_and_foreign_adapters_are_refused(sft_adapter, tmp_path) -> None:
    pickled = shutil.copytree(sft_adapter, tmp_path / "pickled")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    wanted = r"^sft\.from: .* has no adapter_model\.safetensors"
    with pytest.raises(RecipeError, match=wanted) as caught:
        find_start(str(pickled))
    assert "never loaded" in (caught.value.hint or "")
    for number, change in enumerate(({"use_dora": True}, {"peft_type": "IA3"})):
        odd = edited(sft_adapter, tmp_path / str(number), CONFIG, **change)
        with pytest.raises(RecipeError, match=rf"^sft\.from: .*{next(iter(change))}"):
            find_start(str(odd))
    listed = shutil.copytree(sft_adapter, tmp_path / "listed")
    (listed / CONFIG).write_text("[]")
    with pytest.raises(RecipeError, match=r"^sft\.from: .* is not a JSON object"):
        find_start(str(listed))


def test_a_damaged_adapter_of_ours_is_seen(a_run) -> None:
    weights = a_run / "sft" / "adapter" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(StorageError, match="damaged"):
        find_start(str(a_run))


def an_adapter(folder: Path) -> StartingPoint:
    return StartingPoint(str(folder), "adapter", folder, None)


@pytest.mark.parametrize(
    ("named", "model", "verdict"),
    [
        ("some/base", "some/base", "same"),
        ("some/base", "other/base", "refused"),
        ("fernhollow", "other/base", "refused"),
        ("/home/them/base", "some/base", "open"),
        ("../base", "some/base", "open"),
        ("some/base", "./base", "open"),
        (None, "some/base", "open"),
        ("", "some/base", "open"),
    ],
)
def test_a_base_by_another_name(named, model, verdict, sft_adapter, tmp_path) -> None:
    folder = edited(sft_adapter, tmp_path / "x", CONFIG, base_model_name_or_path=named)
    if verdict == "refused":
        with pytest.raises(RecipeError, match=f"trained on {named}.* base is {model}") as caught:
            compare_bases(an_adapter(folder), Base(model=model), "hash")
        assert f"set base to {named}" in (caught.value.hint or "")
        return
    note = compare_bases(an_adapter(folder), Base(model=model), "hash")
    assert (note is None) == (verdict == "same")
    assert note is None or "cannot be told" in note


def test_one_folder_by_two_names_is_one_base(sft_adapter, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    named = str(tmp_path / "base")
    folder = edited(sft_adapter, tmp_path / "x", CONFIG, base_model_name_or_path=named)
    assert compare_bases(an_adapter(folder), Base(model="base"), "hash") is None


def test_a_run_of_ours_knows_its_base_by_its_files(a_run) -> None:
    start = find_start(str(a_run))
    assert compare_bases(start, Base(model="another/name"), "f00d") is None
    with pytest.raises(RecipeError, match="trained on a/base, whose files are not those"):
        compare_bases(start, Base(model="a/base"), "beef")


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes int8"),
    ],
)
@pytest.mark.parametrize("key", ["base.model", "sft.from"])
def test_other_quantisations_are_refused_by_name(stored, kind, key, tiny_mistral, tmp_path) -> None:
    folder = edited(tiny_mistral, tmp_path / "x", "config.json", quantization_config=stored)
    with pytest.raises(RecipeError, match=f"^{key}: .* is quantised as {kind};"):
        locate(Base(model=str(folder))) if key == "base.model" else find_start(str(folder))


def test_what_is_used_is_in_the_identity(tiny_mistral, tiny_nf4) -> None:
    base = Base(model=str(tiny_mistral))
    assert tiny_nf4.departure(base) is None
    plain = base.model_copy(update={"quantization": "none"})
    files = prepare(plain, torch.device("cpu"))
    assert files.identity["quantization"] == "none"
    assert files.departure(plain) is None
    ready = Base(model=str(tiny_nf4.folder), double_quant=True)
    found = prepare(ready, torch.device("cpu"))
    assert found.folder == tiny_nf4.folder, "what is quantised already is not quantised again"
    assert found.identity["quantization"] == {"type": "nf4", "double_quant": True, "as_found": True}
    assert found.departure(ready) is None
    single = ready.model_copy(update={"double_quant": False})
    note = found.departure(single) or ""
    assert "(nf4, double quant on): it is used as it is" in note
    assert "not as the recipe says (nf4, double quant off)" in note
