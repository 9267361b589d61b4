"""The wheel ships the benchmark scripts, which `zephyr-lite bench` runs, and no results of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHIPPED = ("**/*.py", "rivals/*.txt", "lengths/*.json")


class BenchmarkScripts(BuildHookInterface):
    """Adds `benchmarks` to the share folder, file by file: shared-data takes whole folders only."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build. An editable install finds the scripts in the checkout."""
        if version == "editable":
            return
        root = Path(self.root)
        for pattern in SHIPPED:
            for file in sorted((root / "benchmarks").glob(pattern)):
                name = file.relative_to(root).as_posix()
                build_data["shared_data"][str(file)] = f"share/zephyr-lite/{name}"
