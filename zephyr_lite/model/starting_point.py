"""What `sft.from` names: a finished SFT adapter, or a finished SFT model, in place of training.

    adapter    a PEFT folder, one of our run folders, or a hub repository with adapter_config.json
    model      a folder or hub repository with config.json: it is the base of everything after it

An adapter on the wrong base is the field's most reported failure, and nothing in its tensors shows
it. What can be told is told: a run of ours knows the hash of its base, another adapter its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.model.adapters import CONFIG, WEIGHTS, refuse_unsupported
from zephyr_lite.model.base import FILES, accept_model, find_folder
from zephyr_lite.recipe import Base
from zephyr_lite.storage import SEAL, digest, file_digest, open_sealed, read_json

KIND_HINT = "give a PEFT adapter, a run folder with a finished dSFT, or a model folder"


@dataclass(frozen=True)
class StartingPoint:
    """A finished dSFT, found on this machine.

    name: as the recipe has it. revision: commit of a hub repository.
    """

    name: str
    kind: Literal["adapter", "model"]
    folder: Path
    revision: str | None

    @property
    def key(self) -> str:
        """What its errors begin with."""
        return f"sft.from: {self.name}"

    def identity(self) -> dict[str, Any]:
        """Kind, and of an adapter one hash over its files; a model's is the base's."""
        if self.kind == "model":
            return {"kind": self.kind}
        files = {name: file_digest(self.folder / name) for name in (CONFIG, WEIGHTS)}
        return {"kind": self.kind, "sha256": digest(files)}


def find_start(name: str, *, offline: bool = False) -> StartingPoint:
    """Find what `sft.from` names; of a hub repository only the files that are read are fetched.

    Raises: RecipeError (exit 2) for what is not there or is not acceptable; MachineError when a hub
        id is asked for without a connection; StorageError for a damaged adapter of ours.
    """
    key = f"sft.from: {name}"
    folder, revision = find_folder(name, None, (CONFIG,), key, offline=offline)
    adapter = next((f for f in _adapter_folders(folder) if (f / CONFIG).is_file()), None)
    if revision is not None:
        files = FILES if adapter is None else (CONFIG, WEIGHTS)
        folder, _ = find_folder(name, revision, files, key, offline=offline)
    if adapter is not None:
        start = StartingPoint(name, "adapter", adapter, revision)
        _accept_adapter(start)
        return start
    if not (folder / "config.json").is_file():
        raise RecipeError(f"{key} holds neither {CONFIG} nor config.json", hint=KIND_HINT)
    accept_model(folder, key)
    return StartingPoint(name, "model", folder, revision)


def compare_bases(start: StartingPoint, base: Base, source: str) -> str | None:
    """Hold an adapter's base against the recipe's.

    Args: source: hash of this base's files, before quantisation.
    Returns: None when they are the same; a sentence for the user when that cannot be told.
    Raises: RecipeError when the adapter was trained on another base.
    """
    config = read_json(start.folder / CONFIG)
    named = config.get("base_model_name_or_path")
    trained = _base_of_run(start.folder)
    if trained is not None and trained["source"] != source:
        raise RecipeError(
            f"{start.key} was trained on {trained['model']}, whose files are not those of this "
            f"recipe's base {base.model}",
            hint="give the base that its run folder names in manifest.json",
        )
    if trained is not None or named == base.model or _same_folder(named, base.model):
        return None
    if not named or _is_path(named) or _is_path(base.model):
        return (
            f"{start.key} names its base {named or '(none)'}; whether {base.model} is the same "
            "cannot be told from here, only that its shapes fit"
        )
    raise RecipeError(
        f"{start.key} was trained on {named}, and this recipe's base is {base.model}",
        hint=f"set base to {named}; if both are the same weights, write this base's name into "
        f"base_model_name_or_path of a copy of the adapter's {CONFIG}",
    )


def quantised_again(start: StartingPoint, base: Base) -> str | None:
    """A sentence for the user where a merged model of ours is about to be quantised again.

    Its weights are NF4 values plus a small sum; back on NF4's grid most of that sum is gone.
    """
    if base.quantization == "none" or not (start.folder / SEAL).is_file():
        return None
    if open_sealed(start.folder).get("kind") != "merged model":
        return None
    return (
        f"{start.key} was merged from a quantised base: to quantise it again rounds most of its "
        "adapter away; give the run's adapter instead, or set base.quantization=none"
    )


def _adapter_folders(folder: Path) -> tuple[Path, ...]:
    """Where an adapter may lie: the folder itself, a run's stage, a run."""
    return folder, folder / "adapter", folder / "sft" / "adapter"


def _accept_adapter(start: StartingPoint) -> None:
    if not (start.folder / WEIGHTS).is_file():
        raise RecipeError(
            f"{start.key} has no {WEIGHTS}",
            hint="save the adapter as safetensors; pickled weights are never loaded",
        )
    if (start.folder / SEAL).is_file():
        open_sealed(start.folder)
    config = read_json(start.folder / CONFIG)
    if not isinstance(config, dict):
        raise RecipeError(f"{start.key}: {CONFIG} is not a JSON object")
    try:
        refuse_unsupported(config, start.folder)
    except DataError as error:
        raise RecipeError(
            f"sft.from: {error}", hint="only plain LoRA can be gone on with"
        ) from None


def _base_of_run(adapter: Path) -> dict[str, Any] | None:
    """`model` and `source` of the base in the manifest of the run that an adapter lies in."""
    manifest = adapter / ".." / ".." / "manifest.json"
    if not ((adapter / SEAL).is_file() and manifest.is_file()):
        return None
    try:
        base = read_json(manifest)["base"]
        return {"model": base["model"], "source": base["source"]}
    except (StorageError, KeyError, TypeError):
        return None  # not a run of ours


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()


def _same_folder(named: str | None, model: str) -> bool:
    if not named:
        return False
    one, two = Path(named).expanduser(), Path(model).expanduser()
    return one.is_dir() and two.is_dir() and one.samefile(two)
