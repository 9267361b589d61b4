"""The benchmarks' modules, named from their folder as they name each other."""

from __future__ import annotations

import sys
from pathlib import Path

# `python benchmarks/race.py` has its folder on sys.path; so have these tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
