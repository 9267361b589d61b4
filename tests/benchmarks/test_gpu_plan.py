"""The plan parts of the GPU suite: a plan that is off, what fits nowhere, memory that runs out."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

GIB = 2**30


@pytest.fixture(scope="module")
def shared():
    """A toy base that these tests share, as the cases of a part do."""
    from gpu.bench import Bench
    from gpu.model import TOY
    from gpu.rig import Shared

    bench = Bench(torch.device("cpu"), toy=True, deadline=time.monotonic() + 300)
    return Shared(bench, TOY)


def _starve(monkeypatch: pytest.MonkeyPatch, name: str, starved: set[int]) -> list[int]:
    """Make these calls of a method of the loop, counted from 0, run out of memory."""
    from zephyr_lite.train.loop import Job

    calls: list[int] = []
    real = getattr(Job, name)

    def call(job: Any, *arguments: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] in starved:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(job, *arguments)

    monkeypatch.setattr(Job, name, call)
    return calls


def _planned_run(shared: Any, cap_gib: float = 22.5, stage: Any = "dpo") -> dict[str, Any]:
    from gpu.planned_run import PlannedRun, measure

    run = PlannedRun(cap_gib, "zephyr-7b", stage, steps=3)
    return {row.metric: row for row in measure(shared, run)}


# ---------------------------------------------------------------- the base that cases share


def test_adapters_of_one_case_are_gone_in_the_next(shared) -> None:
    from gpu.model import TOY

    def ranks(model: Any) -> set[tuple[str, int]]:
        weights = model.named_parameters()
        return {(n.split(".")[-2], p.shape[0]) for n, p in weights if ".lora_A." in n}

    def rates(model: Any) -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}

    first = shared.adapted({"frozen": 4, "trained": 8}, 0.05)
    assert ranks(first) == {("frozen", 4), ("trained", 8)} and rates(first) == {0.05}
    second = shared.adapted({"trained": 2}, 0.0)
    assert ranks(second) == {("trained", 2)} and not rates(second)
    count = sum(p.numel() for n, p in second.named_parameters() if ".lora_" in n)
    assert count == TOY.adapter_weights(2)
    assert all(p.any() for n, p in second.named_parameters() if ".lora_B." in n)
    assert second.get_base_model() is shared.base


# ---------------------------------------------------------------- plan_memory


def test_the_configurations_cover_what_a_peak_hangs_on() -> None:
    from gpu.questions.plan_memory import configurations

    found = configurations()
    assert len(found) >= 20
    assert len({json.dumps(case.shape) for case in found}) == len(found)
    for stage in ("sft", "dpo"):
        own = [case for case in found if case.stage == stage]
        assert {case.rank for case in own} >= {16, 64, 128}
        assert {case.budget for case in own} >= {1024, 2048, 4096, 8192}
        assert {0, 16, None} <= {case.keep for case in own}
        assert {case.rest for case in own} == {"lean", "offload"}
        assert {case.optimizer for case in own} == {"adamw", "adamw_8bit"}
        assert {case.place for case in own} == {"device", "host"}
        assert {case.dropout for case in own} == {False, True}
        assert {bool(case.frozen) for case in own} == {False, True}
    for case in found:
        longest = 1024 if case.stage == "dpo" else min(case.budget, 2048)
        for row in case.rows:
            size = row[0] + max(row[1:]) if case.stage == "dpo" else sum(row)
            assert size <= longest
    assert not any(case.optimizer.startswith("paged") for case in found)
    head = [(case.stage, case.place) for case in found[:3]]
    assert ("dpo", "host") in head, "a lease may end: the extremes come first"


def test_a_plan_that_is_off_is_wrong_and_says_by_how_much(shared, monkeypatch) -> None:
    from gpu import plan as gpu_plan
    from gpu.questions.plan_memory import toys

    case = toys()[0]
    row, *others = gpu_plan.measure(shared, case)
    assert row.metric == "peak_allocated" and row.status == "ok"
    assert abs(row.derived["error_percent"]) <= gpu_plan.OVER_ON_CPU
    assert row.derived["before_bytes"] < row.derived["allocated_bytes"]
    step = next(other for other in others if other.metric == "step")
    assert step.derived["micro_batches"] == 2 and step.derived["projected_ms"] > 0
    planned = gpu_plan.planned

    def without_activations(*arguments: Any) -> Any:
        parts, there = planned(*arguments)
        return replace(parts, activations=0), there

    monkeypatch.setattr(gpu_plan, "planned", without_activations)
    row, *_ = gpu_plan.measure(shared, case)
    assert row.status == "wrong" and "% off" in row.note
    assert row.derived["error_percent"] < -gpu_plan.OVER_ON_CPU


def test_what_cublas_takes_is_the_contexts(shared) -> None:
    """The plan has it there; the allocator has it among what it handed out."""
    from gpu.plan import Peaks, _allocated
    from zephyr_lite.plan.ledger import HostParts, Parts

    parts = Parts(1000, 0, 0, 0, 0, 0, 0, context=500)
    peaks = Peaks(shared.bench, None, before=0, allocated=1060)
    for workspaces, status in ((60, "ok"), (0, "wrong")):
        row = _allocated(shared.bench, parts, HostParts(0, 0), peaks, workspaces)
        assert row.status == status
        assert row.derived["error_percent"] == pytest.approx(-100 * 60 / 1060)


# ---------------------------------------------------------------- as on a GPU


@pytest.fixture
def pretended(shared, monkeypatch: pytest.MonkeyPatch):
    """A base on a GPU whose allocator gives figures of our own; limits and figures are kept."""
    from gpu.rig import Shared

    _ = shared.base  # the ceilings are measured, and go with the copy
    figures = {"allocated": 3000, "requested": 2900, "reserved": 3400, "free": 5000, "total": 9000}
    caps: list[float] = []
    bench = copy.copy(shared.bench)
    bench.on_gpu = True
    stats = lambda *_: {f"{kind}_bytes.all.peak": n for kind, n in figures.items()}  # noqa: E731
    pretences: dict[str, Any] = {
        "memory_stats": stats,
        "memory_allocated": lambda *_: 1000,
        "memory_reserved": lambda *_: figures["reserved"],
        "mem_get_info": lambda *_: (figures["free"], figures["total"]),
        "get_device_name": lambda *_: "NVIDIA H200",
        "get_device_properties": lambda *_: SimpleNamespace(total_memory=2 * GIB),
        "set_per_process_memory_fraction": caps.append,
        **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats"), lambda *_: None),
    }
    for name, pretence in pretences.items():
        monkeypatch.setattr(torch.cuda, name, pretence)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return Shared(bench, shared.geometry), figures, caps


def test_the_allocator_is_asked_on_a_gpu(pretended) -> None:
    from gpu import plan as gpu_plan
    from gpu.questions.plan_memory import toys

    on_gpu, figures, _ = pretended
    rows = {row.metric: row for row in gpu_plan.measure(on_gpu, toys()[0])}
    assert rows["peak_allocated"].status == "wrong", "the figures are none of a toy"
    found = rows["peak_allocated"].derived
    assert (found["before_bytes"], found["allocated_bytes"]) == (1000, figures["allocated"])
    assert found["planned_bytes"]["context"] > 0 < found["planned_bytes"]["slack"]
    assert rows["peak_reserved"].derived["slack_bytes"] == 400
    assert rows["outside_allocator"].p50 == pytest.approx(600 / GIB)


def test_a_planned_run_is_held_to_the_cards_budget_less_its_context(pretended) -> None:
    from zephyr_lite.plan.memory import CONTEXT_BYTES

    on_gpu, _, caps = pretended
    rows = _planned_run(on_gpu, cap_gib=1.0)
    assert caps == [(GIB - CONTEXT_BYTES) / (2 * GIB), 1.0], "and let go of behind it"
    assert rows["peak_allocated"].derived["rehearsal_gib"] == pytest.approx(3000 / GIB)
    assert rows["fits"].derived["bytes"]["context"] == CONTEXT_BYTES


# ---------------------------------------------------------------- planned_runs


def test_a_planned_run_says_what_was_planned_and_what_came(shared) -> None:
    rows = _planned_run(shared, stage="sft")
    assert {row.status for row in rows.values()} == {"ok", "not available"}
    planned = rows["fits"].derived
    assert planned["cut"]["keep"] == 2 and planned["bytes"]["activations"] > 0
    assert isinstance(planned["alternatives"], list)
    step = rows["step"].derived
    assert step["steps"] == 3 and step["projected_ms"] > 0 and step["optimizer"] == "adamw_8bit"
    assert rows["notches"].p50 == 0


def test_the_recipes_are_the_cards(shared) -> None:
    from gpu.planned_run import PlannedRun, recipe_of
    from gpu.questions.planned_runs import RECIPES

    assert sorted(RECIPES) == [7.0, 10.8, 14.5, 22.5]
    for cap, name in RECIPES.items():
        recipe = recipe_of(shared.bench, PlannedRun(cap, name, "dpo", 2))
        assert recipe.sft and recipe.dpo and recipe.gemm == "exact"
        for settings in (recipe.sft, recipe.dpo):
            assert not settings.optimizer.startswith("paged"), name


def test_a_notch_in_the_rehearsal_is_told(shared, monkeypatch: pytest.MonkeyPatch) -> None:
    _starve(monkeypatch, "_backward", {0})
    row = _planned_run(shared)["notches"]
    assert (row.status, row.p50) == ("ok", 1.0)
    assert "in the rehearsal" in row.derived["in_rehearsal"][0]


def test_memory_that_runs_out_late_is_wrong_though_the_training_goes_on(
    shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    _starve(monkeypatch, "_gradients", {1})
    rows = _planned_run(shared)
    assert rows["step"].derived["steps"] == 3
    assert rows["notches"].status == "wrong"
    assert "at step 2" in rows["notches"].note and "fewer layers" in rows["notches"].note


def test_a_run_with_nothing_left_to_give_up_is_wrong(shared, monkeypatch) -> None:
    from zephyr_lite.train.fitting import PolicyLadder

    with monkeypatch.context() as patch:
        patch.setattr(PolicyLadder, "down", lambda ladder: None)
        _starve(patch, "_gradients", {1})
        rows = _planned_run(shared)
    assert rows["run"].status == "wrong" and "step" not in rows
    assert "after 1 steps" in rows["run"].note and "nothing is left" in rows["run"].note
    assert _planned_run(shared)["step"].status == "ok", "the next case runs"


def test_what_no_cut_fits_is_wrong(shared) -> None:
    rows = _planned_run(shared, cap_gib=1e-4)
    assert [row.status for row in rows.values()] == ["wrong"]
    assert "at least" in rows["fits"].note
