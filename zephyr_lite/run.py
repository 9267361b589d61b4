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
from zephyr_lite.storage import digest, read_json, sweep, write_json, write_text

STAGES = ("sft", "aif", "reference", "dpo", "export")


@dataclass
class Run:
    """A run folder held by this process. Use `with Run(recipe, folder) as run:`."""

    recipe: Recipe
    folder: Path
    offline: bool = False
    writes: bool = True  # False: look only; no lock is taken and nothing is recorded
    manifest: dict[str, Any] = field(default_factory=dict)
    _lock: int | None = None

    def __enter__(self) -> Run:
        if not self.writes:
            self._read_manifest()
            return self
        self._take_lock()
        try:
            for parent in (self.folder, *(self.folder / stage for stage in STAGES)):
                sweep(parent)
            self._read_manifest()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, *parts: str) -> Path:
        """A path inside the run folder."""
        return self.folder.joinpath(*parts)

    def record(self, **entries: Any) -> None:
        """Put entries into the manifest and save it."""
        self.manifest |= entries
        if self.writes:
            write_json(self.path("manifest.json"), self.manifest)

    def fields(self, *names: str) -> dict[str, Any]:
        """Fields of the recipe that affect results, below the given dotted names."""
        every = result_fields(self.recipe)
        return {
            k: v for k, v in every.items() if any(k == n or k.startswith(n + ".") for n in names)
        }

    def is_done(self, stage: str, inputs: dict[str, Any], *, binding: bool = True) -> bool:
        """Whether a stage was finished from these inputs.

        Args:
            binding: False for a stage that is cheap: other inputs do it again.
        Raises: RecipeError with a diff when work done from other inputs is kept here: a result, or
            a checkpoint. What was stopped before that (a faulty row, say) binds nobody.
        """
        entry = self.manifest["stages"].get(stage)
        if entry is None:
            return False
        if entry["fingerprint"] != digest(inputs):
            if not (binding and self._keeps_work(stage)):
                return False
            raise RecipeError(
                f"{self.folder}: stage {stage} was run with another recipe or other data:\n"
                + _diff(entry["inputs"], inputs),
                hint="--run NEW starts another run folder; reference log-probs are shared",
            )
        return entry.get("finished") is not None

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Note that a stage has begun; keeps the first start when it resumes.

        Figures that a stopped attempt from other inputs left behind are removed.
        """
        stages, fingerprint = self.manifest["stages"], digest(inputs)
        if stage in stages and stages[stage]["fingerprint"] != fingerprint:
            del stages[stage]
            for figures in self.path(stage).glob("*.json*"):
                figures.unlink()
        entry = stages.setdefault(stage, {"started": _now()})
        entry |= {"fingerprint": fingerprint, "inputs": inputs}
        recipe = self.recipe.model_dump(mode="json")
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        write_text(self.path("recipe.yaml"), text)
        self.record(recipe=recipe)

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

    def output(self, stage: str, name: str) -> Any:
        """A figure or hash that a finished stage recorded."""
        return self.manifest["stages"][stage][name]

    def _keeps_work(self, stage: str) -> bool:
        """Whether a stage is finished or has a checkpoint."""
        finished = self.manifest["stages"][stage].get("finished") is not None
        return finished or any(self.path(stage, "checkpoints").glob("step-*"))

    def _read_manifest(self) -> None:
        path = self.path("manifest.json")
        if path.exists():
            self.manifest = read_json(path)
            if not isinstance(self.manifest, dict):
                raise StorageError(f"{path}: damaged: it is not a manifest of ours")
        self.manifest |= {"zephyr_lite": __version__, "name": self.recipe.name}
        self.manifest.setdefault("stages", {})

    def _take_lock(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(
                f"{self.folder}: no run folder can be kept here: {error.strerror or error}",
                hint="give this run a folder that can be written with --run DIR",
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} since {_now()}".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise LockedError(
                f"{self.folder} is in use by another zephyr-lite ({holder})",
                hint="wait for it, stop it, or give this run another folder with --run DIR",
            ) from None
        except OSError as error:
            os.close(descriptor)
            raise StorageError(f"{self.folder}: cannot be locked: {error.strerror}") from None
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
