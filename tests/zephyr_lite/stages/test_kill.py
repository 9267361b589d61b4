"""Killed at any moment, the same command ends in the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

KILLS = int(os.environ.get("ZEPHYR_LITE_KILLS", "20"))
OUTPUTS = (
    "sft/adapter/adapter_model.safetensors",
    "aif/pairs.parquet",
    "dpo/adapter/adapter_model.safetensors",
    "export/micro-Q8_0.gguf",
)


def _hashes(folder: Path) -> dict[str, str]:
    return {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in OUTPUTS}


def _stage(folder: Path, home: Path) -> str:
    """Which stage a killed run was in."""
    if not any((home / "built").glob("*/MANIFEST.json")):
        return "base"
    manifest = folder / "manifest.json"
    stages = json.loads(manifest.read_text())["stages"] if manifest.exists() else {}
    open_ones = [name for name, entry in stages.items() if "finished" not in entry]
    return open_ones[-1] if open_ones else "between"


def test_killed_runs_end_in_the_same_bytes(command, micro, tmp_path):
    whole = tmp_path / "whole"
    status, text = command.run("run", micro, "--fresh", "--run", str(whole), home=tmp_path / "home")
    assert status == 0, text
    truth = _hashes(whole)

    rng, kills, runs, stages = random.Random(20), 0, 0, Counter()
    while kills < KILLS:
        folder, home = tmp_path / "killed", tmp_path / "killed-home"
        status = None
        while status != 0:
            delay = rng.uniform(0.05, 2.5) if kills < KILLS else None
            status, text = command.run(
                "run", micro, "--fresh", "--run", str(folder), home=home, kill_after=delay
            )
            assert status in (0, -signal.SIGKILL), text
            if status:
                kills += 1
                stages[_stage(folder, home)] += 1
        assert _hashes(folder) == truth, f"after kills in {dict(stages)}"
        runs += 1
        shutil.rmtree(folder)
        shutil.rmtree(home)
    print(f"{kills} kills in {runs} runs, each run compared at its end: {dict(stages)}")
    assert len(stages) >= 4, f"the kills did not reach enough stages: {dict(stages)}"


def test_ctrl_c_saves_and_the_same_command_resumes(command, micro, tmp_path):
    whole, stopped, home = tmp_path / "whole", tmp_path / "stopped", tmp_path / "home"
    assert command.run("run", micro, "--fresh", "--run", str(whole), home=home)[0] == 0
    statuses = []
    for delay in (0.4, 0.8, 1.6, None):
        status, text = command.run(
            "run",
            micro,
            "--fresh",
            "--run",
            str(stopped),
            home=home,
            kill_after=delay,
            sig=signal.SIGINT,
        )
        statuses.append(status)
        assert status in (0, 130), text
        if status == 130:
            assert "same command again" in text
            assert "Traceback" not in text
    assert 130 in statuses
    assert statuses[-1] == 0
    assert _hashes(stopped) == _hashes(whole)
