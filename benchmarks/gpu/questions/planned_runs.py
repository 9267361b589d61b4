"""Does what the plan promises for a card of 24, 16, 12 or 8 GB hold: no memory that runs out late?

Each card's recipe, dSFT and dDPO, planned by the rates of this process and run for 50 steps behind
the rehearsal of the longest micro-batch. A step that runs out of memory after that is `wrong`,
although the training goes on a notch lower; so is a recipe that the plan finds no cut for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from gpu.bench import Bench, Case
from gpu.planned_run import PlannedRun, measure
from gpu.rig import Shared, geometry_of
from gpu.rows import Part

PART = Part("planned_runs", 1, "Do planned trainings run under the caps of cards?", by_commit=True)
# The largest card and the smallest first.
RECIPES = {
    22.5: "zephyr-7b",
    7.0: "zephyr-7b-8gb",
    10.8: "zephyr-7b-12gb",
    14.5: "zephyr-7b-16gb",
}


def cases(bench: Bench) -> Iterator[Case]:
    """Both trainings under each cap, over one base."""
    shared = Shared(bench, geometry_of(bench))
    for cap, recipe in RECIPES.items():
        for stage in ("dpo", "sft"):
            run = PlannedRun(cap, recipe, stage, bench.pick(50, 2))
            yield Case(asdict(run), lambda r=run: measure(shared, r))
