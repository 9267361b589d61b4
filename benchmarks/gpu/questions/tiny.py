"""Does the self-contained example run end to end on this device, and how long does a stage take?

`zephyr-lite run tiny` in a fresh run folder: from text to a GGUF file, through the same code as a
7B model.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.bench import Bench, Case
from gpu.rows import Measure, Part, absent, failed, figure
from rows.provenance import REPO

PART = Part(
    "tiny", 1, "Does `zephyr-lite run tiny` finish here, seconds per stage?", by_commit=True
)


def cases(bench: Bench) -> Iterator[Case]:
    """The built-in recipe `tiny`; at toy size the tests' micro recipe."""
    recipe = bench.pick("tiny", "tests/recipes/micro.yaml")
    yield Case({"recipe": recipe}, lambda: _measure(bench, recipe))


def _measure(bench: Bench, recipe: str) -> Iterator[Measure]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "zephyr_lite.cli", "run", recipe, "--run", str(run)]
        done = bench.run_limited(command, cwd=REPO)
        if done.code != 0:
            state = "killed at the time limit" if done.code is None else f"exit {done.code}"
            yield failed("run", f"{state}: {done.output[-1800:]}")
            return
        yield figure("total", "s", done.seconds)
        yield from stage_seconds(run / "manifest.json")


def stage_seconds(path: Path) -> Iterator[Measure]:
    """A row per stage of a run's manifest that says how many seconds it took."""
    if not path.exists():
        yield failed("manifest", "the run left no manifest.json", status="wrong")
        return
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    stages = manifest.get("stages") or {}
    timed = {
        name: stage["seconds"]
        for name, stage in stages.items()
        if isinstance(stage, dict) and isinstance(stage.get("seconds"), int | float)
    }
    if not timed:
        yield absent("stage_seconds", "manifest.json holds no seconds per stage")
    for name, seconds in timed.items():
        yield figure(f"{name}_seconds", "s", seconds)
