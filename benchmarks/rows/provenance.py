"""Where a row comes from: commit, versions, machine. Nothing but the standard library."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]


def read_smi(*fields: str) -> list[str] | None:
    """Values of `nvidia-smi --query-gpu=fields` for the first GPU; None where it cannot be run."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.strip().splitlines()
    return [value.strip() for value in lines[0].split(",")] if lines else None


def installed_version(name: str) -> str:
    """Version of a distribution, `absent` where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def read_commit() -> str:
    """Commit of this checkout, with `+dirty` for changes outside benchmarks/results.

    A copy that travels without its .git names its commit in ZEPHYR_LITE_COMMIT; else `unknown`.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPO), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("ZEPHYR_LITE_COMMIT", "unknown")
    return commit + ("+dirty" if changes else "")


def cpu_name() -> str:
    """The CPU's name as the kernel gives it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()
