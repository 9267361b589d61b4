"""The kernel parts of the GPU suite: a wrong kernel gets a row that says so, and is counted."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FP32 = torch.float32
# Parts whose rows say by which arithmetic a model, or its products, computed.
MODELS = ("kernels_gemm", "steps_sft", "steps_dpo", "plan_memory", "planned_runs")


@pytest.fixture
def bench():
    from gpu.bench import Bench

    return Bench(torch.device("cpu"), toy=True, deadline=time.monotonic() + 60)


def _spoiled(function: Callable[..., Any], spoil: Callable[[torch.Tensor], Any]):
    def call(*arguments: Any, **options: Any) -> Any:
        result = function(*arguments, **options)
        spoil(result[0] if isinstance(result, tuple) else result)
        return result

    return call


SPOILS = {
    "a percent off": lambda out: out.mul_(1.01),
    "the last row not written": lambda out: out[-1].fill_(math.nan),
    "two rows swapped": lambda out: out.copy_(out[torch.tensor([1, 0, 2, 3, 4, 5, 6])]),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_a_spoiled_output_is_wrong(bench, spoil, monkeypatch: pytest.MonkeyPatch) -> None:
    from zephyr_kernels import norm, swiglu

    from gpu.trials import operations as ops
    from gpu.trials.trial import examine

    builds = (
        lambda: ops.norm_forward(bench, FP32, 7, 96, True),
        lambda: ops.swiglu_forward(bench, FP32, 7, 96),
    )
    assert [examine(bench, build()).status for build in builds] == ["ok", "ok"]
    monkeypatch.setattr(norm, "add_rms_norm_", _spoiled(norm.add_rms_norm_, spoil))
    monkeypatch.setattr(swiglu, "swiglu", _spoiled(swiglu.swiglu, spoil))
    rows = [examine(bench, build()) for build in builds]
    assert [row.status for row in rows] == ["wrong", "wrong"]
    assert all("bound" in row.note for row in rows)


def test_a_kernel_that_writes_too_far_is_caught(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from zephyr_kernels import swiglu

    from gpu.trials import operations as ops
    from gpu.trials.trial import examine

    def spill(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
        wider = out.as_strided((len(out), out.shape[1] + 1), out.stride())
        wider.copy_(torch.zeros_like(wider))

    monkeypatch.setattr(swiglu, "swiglu", spill)
    with pytest.raises(RuntimeError, match="behind the end"):
        examine(bench, ops.swiglu_forward(bench, FP32, 7, 96))


def test_another_mask_than_the_seeds_is_wrong(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.trials import lora as lora_ops
    from gpu.trials.trial import examine

    names = ("shrink", "a_backward", "input_backward")
    trials = [getattr(lora_ops, name)(bench, FP32, 33, 64, 12, True) for name in names]
    assert all(examine(bench, trial).status == "ok" for trial in trials)
    masks = lora_ops.reference.dropout_mask

    def shifted(seed: int, *rest: Any) -> torch.Tensor:
        return masks(seed + 1, *rest)

    class Shifted:
        """The formula's view of the reference, one seed on."""

        pieces = staticmethod(lora_ops.reference.pieces)
        dropout_mask = staticmethod(shifted)

    monkeypatch.setattr(lora_ops, "reference", Shifted)
    assert all(examine(bench, trial).status == "wrong" for trial in trials)


@pytest.mark.parametrize("trimmed", [False, True])
def test_attention_that_forgets_the_prompt_is_wrong(bench, trimmed: bool, monkeypatch) -> None:
    from gpu.attention_race import Heads
    from gpu.trials import attention as attention_ops
    from gpu.trials.trial import examine

    heads = Heads(4, 2, 16)
    layout = attention_ops.pairs([(9, 5, 7), (4, 1, 3)])
    trial = attention_ops.attend(bench, FP32, layout, trimmed, heads)
    row = examine(bench, trial)
    assert row.status == "ok"
    assert set(row.derived["errors"]) == {"out", "lse", "dq", "dk", "dv"}
    plan_of = attention_ops.plan_of

    def forgetful(*arguments: Any) -> Any:
        plan = plan_of(*arguments)
        object.__setattr__(plan, "contexts", plan.contexts[:-1])
        return plan

    monkeypatch.setattr(attention_ops, "plan_of", forgetful)
    trial = attention_ops.attend(bench, FP32, layout, trimmed, heads)
    assert examine(bench, trial).status == "wrong"


def test_rows_scaled_by_another_power_are_wrong(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.trials import fp16acc as fp16_ops
    from gpu.trials.trial import examine

    def statuses() -> list[str]:
        trials = [fp16_ops.scale_rows(bench, FP32, 7, 96)]
        trials += [fp16_ops.unscale_rows(bench, FP32, 7, 96, pieces) for pieces in (1, 3)]
        return [examine(bench, trial).status for trial in trials]

    assert statuses() == ["ok"] * 3
    scale, unscale = fp16_ops.fp16acc.scale_rows, fp16_ops.fp16acc.unscale_rows

    def off(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x16, undo = scale(x)
        return x16 * 2, undo / 2  # what a product gives is the same, but its range is not

    monkeypatch.setattr(fp16_ops.fp16acc, "scale_rows", off)
    monkeypatch.setattr(
        fp16_ops.fp16acc, "unscale_rows", lambda sums, undo, dtype: unscale(sums, undo * 2, dtype)
    )
    assert statuses() == ["wrong"] * 3


def test_one_differing_value_of_nf4_is_wrong(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.trials import lora as lora_ops

    assert lora_ops.examine_nf4(bench, FP32, 33, 64, True).status == "ok"
    exact = lora_ops.nf4.dequantise

    def off(weight: Any, out: torch.Tensor) -> None:
        exact(weight, out)
        out[3, 5] = torch.nextafter(out[3, 5], torch.tensor(9.0))

    monkeypatch.setattr(lora_ops.nf4, "dequantise", off)
    row = lora_ops.examine_nf4(bench, FP32, 33, 64, True)
    assert row.status == "wrong"
    assert row.note.startswith("1 of 2112")


def test_failures_are_rows_and_the_summary_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One operation is wrong, another raises, a third is right: the part goes on and says 2."""
    import gpu_suite
    from gpu.questions import kernels_correct
    from gpu.rows import failed, figure

    def crash(dtype: torch.dtype) -> Any:
        raise RuntimeError("an illegal access, say")

    runs = {
        "right": lambda dtype: figure("relative_error", "1", 0.0),
        "crashes": crash,
        "wrong": lambda dtype: failed("relative_error", "off", status="wrong"),
    }
    monkeypatch.setattr(
        kernels_correct, "_operations", lambda bench: [({"op": k}, run) for k, run in runs.items()]
    )
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--out", str(path), "--only", "kernels_correct"]
    assert gpu_suite.main(arguments) == 1
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["status"] for row in rows] == ["ok", "error", "wrong", "wrong"]
    assert rows[-1]["case"] == {"op": "summary"}
    assert rows[-1]["note"].startswith("2: ")
    assert "right" not in rows[-1]["note"]


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "kernels_correct", "kernels_speed", "kernels_gemm", "steps_sft", "steps_dpo",
        "plan_memory", "planned_runs", "fp16acc",
    ],
)  # fmt: skip
def test_every_case_is_told_apart_and_costs_nothing_to_list(name: str, on_gpu: bool) -> None:
    """Listing a part's cases allocates nothing and touches no device: here there is no GPU."""
    from gpu.bench import Bench
    from gpu_suite import load_part

    device = torch.device("cuda" if on_gpu else "cpu")
    bench = Bench(device, toy=not on_gpu, deadline=math.inf)
    part, module = load_part(name)
    shapes = [json.dumps(case.shape) for case in module.cases(bench)]
    assert len(set(shapes)) == len(shapes) >= 3
    assert part.name == name
    if name in MODELS:
        assert all("gemm" in json.loads(shape) for shape in shapes)
    if on_gpu and name == "kernels_correct":
        operations = {json.loads(shape)["op"] for shape in shapes}
        assert len(operations) == 17 + 1  # and the summary
        for dtype in ("bfloat16", "float16"):
            assert sum(f'"{dtype}"' in shape for shape in shapes) == (len(shapes) - 1) / 2


def test_the_gemm_path_checks_its_output(bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter's term left out is wrong by more than rounding."""
    from gpu.questions import kernels_gemm

    group = kernels_gemm.adapted(
        bench, {"q_proj": (32, 64), "k_proj": (16, 64)}, 4, 0.05, quantised=False
    )
    x, weight = bench.randn(8, 64, dtype=FP32), group.frozen.weight()
    assert kernels_gemm._check(bench, group, x, weight).status == "ok"
    monkeypatch.setattr(
        kernels_gemm.projections, "forward", lambda rows, *_: ([rows @ weight.T], None)
    )
    assert kernels_gemm._check(bench, group, x, weight).status == "wrong"
