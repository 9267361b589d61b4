"""What is planned is held against what benchmarks/plans/rig.py and plans/dry.py measure."""

from __future__ import annotations

import sys
from pathlib import Path

# `python benchmarks/plan_memory.py` has its folder on sys.path; so have these tests.
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
