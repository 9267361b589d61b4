"""The step parts of the GPU suite: the roofline, the model, memory that runs out, a lost device."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def bench():
    from gpu.bench import Bench

    return Bench(torch.device("cpu"), toy=True, deadline=time.monotonic() + 60)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- the roofline


def test_a_task_is_counted_with_the_adapter_that_trains_and_those_beside_it() -> None:
    from gpu.rig import Task
    from zephyr_lite.recipe import Sft

    task = Task("dpo", "pairs", {"sft": 16, "dpo": 128}, Sft(), lambda setting: None)  # type: ignore[arg-type, return-value]
    assert (task.planned.stage, task.planned.trained, task.planned.frozen) == ("dpo", 128, 16)


# ---------------------------------------------------------------- model and data


def test_the_random_model_is_nf4_under_pefts_own_layers(bench) -> None:
    from bitsandbytes.nn.modules import Linear4bit
    from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit

    from gpu.model import TOY, build_model
    from zephyr_lite.model.adapters import activate, add_adapter
    from zephyr_lite.recipe import Lora

    model = add_adapter(build_model(bench, TOY), "sft", Lora(r=4), seed=0)
    wrapped = [m for m in model.modules() if isinstance(m, LoraLinear4bit)]
    bases = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(wrapped) == len(bases) == 7 * TOY.layers
    for linear in bases:
        state = linear.weight.quant_state
        assert linear.weight.dtype == torch.uint8 and state.nested and state.quant_type == "nf4"
    activate(model, ["sft"], "sft")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == TOY.adapter_weights(4)


def test_the_pairs_keep_the_truncation_rule() -> None:
    from gpu.questions.steps_dpo import LENGTHS

    assert len(LENGTHS) == 64
    for prompt, chosen, rejected in LENGTHS:
        assert min(prompt, chosen, rejected) > 0
        assert prompt + max(chosen, rejected) <= 1024
    assert sum(map(sum, LENGTHS)) / 64 == pytest.approx(780.7, abs=0.1)


def test_a_setting_reaches_the_model_it_shares(bench) -> None:
    """Dropout and checkpointing of one case are not the next one's."""
    from gpu.model import TOY
    from gpu.rig import Rig, Setting, Task
    from zephyr_lite.recipe import Sft

    task = Task("sft", "rows", {"sft": 4}, Sft.model_validate({}), lambda setting: None)  # type: ignore[arg-type, return-value]
    rig = Rig(bench, task, TOY)
    rates = lambda: {m.p for m in rig.model.modules() if isinstance(m, torch.nn.Dropout)}  # noqa: E731
    rig.policy(Setting(None, "hf", "full", 32, 0.05))
    assert rates() == {0.05}
    assert rig.model.get_base_model().is_gradient_checkpointing
    policy = rig.policy(Setting(None, "native", "offload", 32, 0.0))
    assert rates() == {0.0}
    assert not rig.model.get_base_model().is_gradient_checkpointing
    assert policy.engine.name == "native" and policy.gemm == "exact"
    assert rig.policy(Setting(None, "native", "none", 32, gemm="fp16acc")).gemm == "fp16acc"


def test_masters_on_the_host_are_one_cases(bench) -> None:
    """Parameters that were copies in the compute dtype are fp32 masters again in the next case."""
    from gpu.model import TOY
    from gpu.rig import Rig, Setting, Task
    from zephyr_lite.recipe import Sft
    from zephyr_lite.train.masters import DeviceMasters, HostMasters

    settings = Sft.model_validate({"optimizer": "adamw_8bit"})
    task = Task("sft", "rows", {"sft": 4}, settings, lambda setting: None)  # type: ignore[arg-type, return-value]
    rig = Rig(bench, task, TOY)
    there, here = Setting(None, "native", "none", 32, place="host"), Setting(None, "hf", "none", 32)
    policy = rig.policy(there)
    policy.dtype = torch.bfloat16
    assert isinstance(rig.masters(there, policy), HostMasters)
    weights = [p for n, p in rig.model.named_parameters() if ".lora_" in n]
    assert {p.dtype for p in weights} == {torch.bfloat16}
    assert all(p.grad is not None for p in weights)
    rig.release()
    assert {p.dtype for p in weights} == {torch.float32}
    assert not any(p.grad is not None for p in weights)
    assert isinstance(rig.masters(here, rig.policy(here)), DeviceMasters)
    assert (task.settings_for("host").optimizer, settings.optimizer) == ("adamw", "adamw_8bit")


# ---------------------------------------------------------------- what goes wrong


def test_an_arithmetic_that_is_refused_is_a_row(bench) -> None:
    from gpu.model import TOY
    from gpu.rig import Rig, Setting, Task
    from gpu.steps import step_cases
    from zephyr_lite.recipe import Sft

    task = Task("sft", "rows", {"sft": 4}, Sft.model_validate({}), lambda setting: None)  # type: ignore[arg-type, return-value]
    settings = [Setting(None, engine, "none", 32, gemm="fp16acc") for engine in ("native", "hf")]
    _, *cases = step_cases(bench, Rig(bench, task, TOY), settings)
    for case, why in zip(cases, ("it needs a GPU", "engine hf does not"), strict=True):
        assert case.shape["gemm"] == "fp16acc"
        (row,) = case.run()
        assert (row.metric, row.status) == ("step", "not available")
        assert row.note.startswith(f"gemm: fp16acc: {why}")


def test_out_of_memory_is_a_row_and_the_next_case_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_suite
    from gpu import steps as gpu_steps

    train = gpu_steps._train

    def starve(rig: Any, setting: Any) -> Any:
        if setting.cap_gib is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return train(rig, setting)

    monkeypatch.setattr(gpu_steps, "_train", starve)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--out", str(path), "--only", "steps_dpo"]
    assert gpu_suite.main(arguments) == 0
    rows = _rows(path)
    starved = [row for row in rows if row["case"].get("cap_gib")]
    assert [(row["metric"], row["status"]) for row in starved] == [("step", "not available")]
    assert "out of memory" in starved[0]["note"]
    assert rows[-1]["case"]["engine"] == "hf" and rows[-1]["metric"] == "peak_allocated"
    profiles = [row["derived"] for row in rows if row["metric"] == "profile"]
    assert len(profiles) == 1, "only a step of ours without recomputation is profiled"
    assert 1 <= len(profiles[0]["top"]) <= 12
    step = next(row["derived"] for row in rows if row["metric"] == "step")
    assert step["recomputed"] == "nothing" and step["optimizer"] == "adamw"
    assert step["percent_of_roofline"] > 0


def test_a_step_that_finds_no_memory_is_not_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training would go a notch down and on; a row is of the setting that it names."""
    import gpu_suite
    from gpu import steps as gpu_steps

    tried: list[int] = []

    def starve(job: Any, step: int, examples: Any) -> Any:
        tried.append(step)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(gpu_steps.Job, "_gradients", starve)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--out", str(path), "--only", "steps_dpo"]
    assert gpu_suite.main(arguments) == 0
    rows = [row for row in _rows(path) if row["metric"] == "step"]
    assert [row["status"] for row in rows] == ["not available"] * 4
    assert all("out of memory at step 1" in row["note"] for row in rows)
    assert tried == [0] * 4


def test_a_lost_device_ends_the_process_and_the_next_one_passes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_suite

    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--out", str(path), "--only", "kernels_gemm", "--worker"]
    with monkeypatch.context() as patch:
        patch.setattr(gpu_suite, "is_alive", lambda bench: False)
        assert gpu_suite.main(arguments) == gpu_suite.DEVICE_LOST
    rows = _rows(path)
    assert rows[-1]["status"] == "error" and "stopped answering" in rows[-1]["note"]
    tried = rows[0]["case"]
    assert all(row["case"] in (tried, {}) for row in rows)
    assert gpu_suite.main([*arguments, f"--since={rows[0]['date']}"]) == 0
    later = [row["case"] for row in _rows(path)[len(rows) :]]
    assert later and tried not in later


@pytest.mark.parametrize(("grows", "processes"), [(True, 3), (False, 1)])
def test_processes_follow_each_other_while_they_get_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grows: bool, processes: int
) -> None:
    import gpu_suite
    from gpu.rows import Ledger, describe_machine

    ledger = Ledger(tmp_path / "rows.jsonl", describe_machine(torch.device("cpu"), toy=True))
    dates: list[list[str]] = []

    def work(name: str, arguments: Any, ledger: Ledger, minutes: float, since: list[str]):
        dates.append(since)
        if grows:
            with ledger.path.open("a") as file:
                file.write("\n")
        return (0 if len(dates) == 3 else gpu_suite.DEVICE_LOST), "ended"

    monkeypatch.setattr(gpu_suite, "run_worker", work)
    arguments = argparse.Namespace(minutes=1.0, device="cpu")
    assert gpu_suite.run_apart("machine", arguments, ledger) is False
    assert len(dates) == processes
    assert dates[0] == [] and all(len(since) == 1 for since in dates[1:])


# ---------------------------------------------------------------- fp16 sums


def test_simulated_sums_round_as_they_say() -> None:
    """Nearest is unbiased, truncation only ever loses; what fp16 holds exactly is exact."""
    from gpu.questions.fp16acc import sum_in_fp16

    ones = torch.ones(3, 640, dtype=torch.float16)
    for truncate in (False, True):
        assert (sum_in_fp16(ones, ones, truncate=truncate) == 640).all()
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.rand(32, 2048, generator=generator).half() for _ in range(2))
    truth = x.double() @ weight.double().T
    nearest, truncated = (
        (sum_in_fp16(x, weight, truncate=truncate).double() - truth) / truth
        for truncate in (False, True)
    )
    assert (truncated < 0).all()
    assert abs(float(nearest.mean())) < 0.1 * abs(float(truncated.mean()))
    negated = sum_in_fp16(-x, weight, truncate=True)
    assert torch.equal(negated, -sum_in_fp16(x, weight, truncate=True))
