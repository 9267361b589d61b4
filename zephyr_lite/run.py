"""The run folder: its lock, its manifest, and which stage is done.

    runs/NAME/  recipe.yaml  manifest.json
      sft/adapter/ sft/metrics.jsonl sft/eval.json sft/report.json sft/checkpoints/
      aif/pairs.parquet aif/report.json
      reference/key.json
      dpo/adapter/ dpo/metrics.jsonl dpo/eval.json dpo/checkpoints/
      export/NAME-Q4_K_M.gguf export/Modelfile export/README.md export/report.json

A stage's *inputs* are the recipe fields it reads and the hashes of its parents' outputs. Their hash
is its fingerprint: the same command again does nothing when it matches, and is refused with a diff
when it does not, because half a run under one recipe and half under another is nobody's experiment.

A run beside this one (runs/*) that finished a stage from the same inputs, under the same version of
zephyr-lite, has done its work for this run too: its files are hard-linked here, verified, and the
manifest says `linked_from`. Deleting the other run later takes nothing away. Reference log-probs
need no link (their cache is shared), and an export is made anew: its files bear the run's name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from zephyr_lite import __version__
from zephyr_lite.errors import LockedError, RecipeError, StorageError
from zephyr_lite.recipe import Recipe, result_fields
from zephyr_lite.storage import (
    SEAL,
    digest,
    file_digest,
    open_sealed,
    read_json,
    seal_digest,
    sealed_folder,
    sweep,
    write_json,
    write_text,
)

STAGES = ("sft", "aif", "reference", "dpo", "export")
LINKED_STAGES = ("sft", "aif", "dpo")
CHECKPOINTS = "checkpoints"


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr)


@dataclass
class Run:
    """A run folder held by this process. Use `with Run(recipe, folder) as run:`.

    Args:
        writes: False looks only: no lock is taken and nothing is recorded.
        reuse: whether stages that a run beside this one finished are taken over.
        note: told what was taken over, and what could not be.
    """

    recipe: Recipe
    folder: Path
    offline: bool = False
    writes: bool = True
    reuse: bool = False
    note: Callable[[str], None] = _to_stderr
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
        """Whether a stage was finished from these inputs, here or in a run beside this one.

        Args:
            binding: False for a stage that is cheap: other inputs do it again.
        Raises: RecipeError with a diff when work done from other inputs is kept here: a result, or
            a checkpoint. What was stopped before that (a faulty row, say) binds nobody.
        """
        entry, fingerprint = self.manifest["stages"].get(stage), digest(inputs)
        if entry is None or not self._keeps_work(stage):
            return self._take_over(stage, fingerprint)
        if entry["fingerprint"] == fingerprint:
            return entry.get("finished") is not None
        if not binding:
            return False
        raise RecipeError(
            f"{self.folder}: stage {stage} was run with another recipe or other data:\n"
            + _diff(entry["inputs"], inputs),
            hint="--run NEW starts another run folder; what is unchanged is taken from this one",
        )

    def begin(self, stage: str, inputs: dict[str, Any]) -> None:
        """Note that a stage has begun; keeps the first start when it resumes.

        Figures that a stopped attempt from other inputs left behind are removed; not the journals
        of files in the making, which know themselves what still stands.
        """
        stages, fingerprint = self.manifest["stages"], digest(inputs)
        if stage in stages and stages[stage]["fingerprint"] != fingerprint:
            del stages[stage]
            for figures in self.path(stage).glob("*.json*"):
                if not figures.name.endswith(".part.jsonl"):
                    figures.unlink()
        entry = stages.setdefault(stage, {"started": _now()})
        entry |= {"fingerprint": fingerprint, "inputs": inputs}
        self._save()

    def finish(self, stage: str, *, seconds: float, **figures: Any) -> None:
        """Note that a stage is finished, with the hashes and figures that belong to it."""
        entry = self.manifest["stages"][stage]
        seconds += entry.get("seconds", 0.0)
        done = {"finished": _now(), "seconds": round(seconds, 3), "zephyr_lite": __version__}
        entry |= done | figures
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
        return finished or any(self.path(stage, CHECKPOINTS).glob("step-*"))

    def _take_over(self, stage: str, fingerprint: str) -> bool:
        """Link a stage that a run beside this one finished from the same inputs, if there is one.

        A run that is still at work may be one of them: a finished stage is never written again.
        """
        if not (self.reuse and self.writes and stage in LINKED_STAGES):
            return False
        beside = Path(os.path.normpath(self.folder / ".."))
        for manifest in sorted(beside.glob("*/manifest.json")):
            other = manifest.parent
            entry = _finished(manifest, stage, fingerprint)
            if entry is None or other.samefile(self.folder):
                continue
            try:
                _verify(other / stage, entry)
                with sealed_folder(self.path(stage)) as part:
                    _link(other / stage, part)
            except StorageError as error:
                self.note(f"{stage}: not taken from {other}: {error}")
                continue
            self.manifest["stages"][stage] = entry | {"linked_from": str(other)}
            self._save()
            self.note(f"{stage}: taken from {other} (same inputs)")
            return True
        return False

    def _save(self) -> None:
        """Save the manifest and the recipe beside it."""
        recipe = self.recipe.model_dump(mode="json")
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        write_text(self.path("recipe.yaml"), text)
        self.record(recipe=recipe)

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


def _finished(manifest: Path, stage: str, fingerprint: str) -> dict[str, Any] | None:
    """Another run's entry of a stage that it finished from these inputs under this version."""
    try:
        entry = read_json(manifest)["stages"][stage]
        wanted = {"fingerprint": fingerprint, "zephyr_lite": __version__}
        is_ours = entry.get("finished") and wanted.items() <= entry.items()
    except (StorageError, KeyError, TypeError, AttributeError):
        return None  # not a manifest, or none of ours: it lends nothing
    return entry if is_ours else None


def _link(source: Path, target: Path) -> None:
    """Hard links of a stage's files, copies where the file system has none; no checkpoints.

    Every writer of ours replaces files and never changes one in place, so links are safe.
    """
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if name.parts[0] == CHECKPOINTS or any(part.startswith(".") for part in name.parts):
            continue
        if path.is_dir():
            (target / name).mkdir()
            continue
        try:
            os.link(path, target / name, follow_symlinks=False)
        except OSError:
            shutil.copyfile(path, target / name, follow_symlinks=False)


def _verify(folder: Path, entry: dict[str, Any]) -> None:
    """Hold a stage's files against their seals and the hashes that its entry records.

    Raises: StorageError naming what is missing or damaged.
    """
    for found in folder.rglob(SEAL):
        open_sealed(found.parent)
    adapter, pairs = folder / "adapter", folder / "pairs.parquet"
    if "adapter" in entry and seal_digest(adapter) != entry["adapter"]:
        raise StorageError(f"{adapter}: not the one that its run's manifest names")
    if "pairs" in entry and (not pairs.exists() or file_digest(pairs) != entry["pairs"]):
        raise StorageError(f"{pairs}: missing, or not the one that its run's manifest names")


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
