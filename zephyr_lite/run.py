"""The run folder: its lock, its manifest, and which stage is done.

    runs/NAME/  recipe.yaml  manifest.json
      sft/adapter/ sft/metrics.jsonl sft/eval.json sft/report.json sft/checkpoints/
      aif/pairs.parquet aif/report.json
      reference/key.json
      dpo/adapter/ dpo/metrics.jsonl dpo/eval.json dpo/checkpoints/
      export/NAME-Q8_0.gguf export/Modelfile export/report.json

A stage's *inputs* are the recipe fields it reads and the hashes of its parents' outputs. Their hash
is its fingerprint: the same command again does nothing when it matches, and is refused with a diff
when it does not, because half a run under one recipe and half under another is nobody's experiment.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zephyr_lite import __version__
from zephyr_lite.errors import LockedError, RecipeError, StorageError
from zephyr_lite.recipe import Recipe, result_fields
from zephyr_lite.storage import digest, read_json, sweep, write_json


@dataclass
class Run:
    """A run folder held by this process. Use `with Run(recipe, folder) as run:`."""

    recipe: Recipe
    folder: Path
    offline: bool = False
    manifest: dict[str, Any] = field(default_factory=dict)
    _lock: int | None = None

    def __enter__(self) -> Run:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be created: {error}") from None
        self._take_lock()
        for parent in (self.folder, *(self.folder / s for s in ("sft", "aif", "dpo", "export"))):
            sweep(parent)
        if self.path("manifest.json").exists():
            self.manifest = read_json(self.path("manifest.json"))
        self.manifest |= {"zephyr_lite": __version__, "name": self.recipe.name}
        self.manifest.setdefault("stages", {})
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, *parts: str) -> Path:
        """A path inside the run folder."""
        return self.folder.joinpath(*parts)

    def record(self, **entries: Any) -> None:
        """Put entries into the manifest and save it and the resolved recipe."""
        self.manifest |= entries
        self.manifest["recipe"] = self.recipe.model_dump(mode="json")
        write_json(self.path("manifest.json"), self.manifest)
        text = yaml.safe_dump(self.manifest["recipe"], sort_keys=False, allow_unicode=True)
        self.path("recipe.yaml").write_text(text, encoding="utf-8")

    def fields(self, *names: str) -> dict[str, Any]:
        """Fields of the recipe that affect results, below the given dotted names."""
        every = result_fields(self.recipe)
        return {
            k: v for k, v in every.items() if any(k == n or k.startswith(n + ".") for n in names)
        }

    def is_done(self, stage: str, inputs: dict[str, Any]) -> bool:
        """Whether a stage was finished from these inputs.

        Raises: RecipeError with a diff when it was begun from other inputs.
        """
        entry = self.manifest["stages"].get(stage)
        if entry is None:
            return False
        if entry["fingerprint"] != digest(inputs):
            raise RecipeError(
                f"{self.folder}: stage {stage} was run with another recipe or other data:\n"
                + _diff(entry["inputs"], inputs),
                hint="--run NEW starts another run folder; reference log-probs are shared",
            )
        return entry.get("finished") is not None

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Note that a stage has begun; keeps the first start when it resumes."""
        entry = self.manifest["stages"].setdefault(stage, {"started": _now()})
        entry |= {"fingerprint": digest(inputs), "inputs": inputs}
        self.record()

    def finish(self, stage: str, *, seconds: float, **figures: Any) -> None:
        """Note that a stage is finished, with the hashes and figures that belong to it."""
        entry = self.manifest["stages"][stage]
        seconds += entry.get("seconds", 0.0)
        entry |= {"finished": _now(), "seconds": round(seconds, 3), **figures}
        self.record()

    def add_seconds(self, stage: str, seconds: float) -> None:
        """Count time spent in a stage that was stopped before its end."""
        entry = self.manifest["stages"][stage]
        entry["seconds"] = round(entry.get("seconds", 0.0) + seconds, 3)
        self.record()

    def forget(self, stage: str) -> None:
        """Let a stage be done again from other inputs."""
        self.manifest["stages"].pop(stage, None)

    def output(self, stage: str, name: str) -> Any:
        """A figure or hash that a finished stage recorded."""
        return self.manifest["stages"][stage][name]

    def _take_lock(self) -> None:
        path = self.path(".lock")
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise LockedError(
                f"{self.folder} is in use by another zephyr-lite ({holder})",
                hint="wait for it, stop it, or give this run another folder with --run DIR",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} since {_now()}".encode(), 0)
        self._lock = descriptor


def default_folder(recipe: Recipe) -> Path:
    """Where a run goes unless told otherwise."""
    return Path("runs") / recipe.name


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _diff(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Lines `key: old -> new` of the inputs that differ."""
    flat_old, flat_new = _flat(old), _flat(new)
    keys = sorted(k for k in flat_old | flat_new if flat_old.get(k) != flat_new.get(k))
    shown = [f"  {k}: {_short(flat_old.get(k))} -> {_short(flat_new.get(k))}" for k in keys[:20]]
    return "\n".join(shown)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}: ")
        else:
            flat[prefix + key] = value
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
