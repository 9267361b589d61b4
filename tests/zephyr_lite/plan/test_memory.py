"""The plan's bytes against the peak of live tensor bytes of the same trainings, run on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from zephyr_kernels import attention, fp16acc, linear_logprob, lora, reference

from plans.cases import CASES, Case
from plans.live_bytes import LiveBytes, tensors_in
from zephyr_lite.model import frozen_weights, group
from zephyr_lite.plan import attention as planned_attention
from zephyr_lite.plan import groups, memory, products
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.memory import host, peak
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.work import documents_work, pairs_work

ERROR = 0.05  # of all bytes, and of those alone that pass
MISTRAL = Geometry("mistral", 32, 4096, 14336, 32, 8, 128, 32000)
SFT, DPO = Setting("sft", trained=16, frozen=0), Setting("dpo", trained=128, frozen=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the bases of all cases are built once."""
    return tmp_path_factory.mktemp("planned")


# ---------------------------------------------------------------- plan and measurement


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_plan_is_the_peak_of_live_bytes(case: Case, models: Path, one_thread: None):
    from plans.rig import run

    outcome = run(case, models)
    passing = outcome.parts.activations + outcome.parts.workspace
    assert abs(outcome.error) <= ERROR, (outcome.planned, outcome.live, outcome.parts)
    assert abs(outcome.planned - outcome.live) <= ERROR * passing, (outcome.error, outcome.parts)


def test_another_policy_is_another_plan(models: Path, one_thread: None):
    """The comparison sees what it is there to see: bytes of the wrong policy are far off."""
    from plans.rig import cut_of, run, setting_of
    from plans.rig import geometry as of

    case = CASES[0]
    outcome, geometry = run(case, models), of(case)
    wrong = replace(cut_of(case, geometry), keep=1)
    work = documents_work(case.rows[0])
    planned = peak(geometry, setting_of(case), wrong, work).live
    assert abs(planned / outcome.live - 1) > 2 * ERROR


# ---------------------------------------------------------------- the tracker


def test_a_storage_is_counted_once_until_it_dies():
    base = torch.zeros(1000)
    with LiveBytes([base, base[:10]]) as tracker:
        assert tracker.now == 4000
        other = base + 1
        view = other.view(10, 100)
        del other
        assert tracker.now == 8000  # the view holds it
        view.mul_(2)
        torch.mm(view, view.T, out=(out := torch.empty(10, 10)))
        assert tracker.now == 8400
        del view, out
        assert (tracker.now, tracker.peak) == (4000, 8400)


def test_the_inside_of_functions_and_backwards_is_seen():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            torch.zeros(5000)
            return 2 * x

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            torch.zeros(7000)
            return 2 * grads[0]

    x = torch.zeros(100, requires_grad=True)
    with LiveBytes([x]) as tracker:
        total = Double.apply(x).sum()  # pyright: ignore[reportAttributeAccessIssue]
        assert tracker.peak == 400 + 20000
        tracker.reset()
        total.backward()
        assert tracker.peak >= 400 + 28000
        del total
        assert tracker.now == 800  # x and its gradient


def test_results_of_the_cpu_attention_are_seen():
    q = torch.zeros(1, 2, 64, 16)
    with LiveBytes([q]) as tracker:
        before = tracker.now
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q, 0.0, True)
        assert tracker.now - before == 4 * (out.numel() + lse.numel())


def test_tensors_are_found_wherever_they_hang():
    module = torch.nn.Linear(3, 5)
    module.weight.grad = torch.zeros(5, 3)
    module.weight.state = {"scale": [torch.zeros(7)]}  # pyright: ignore[reportAttributeAccessIssue]
    assert sum(x.numel() for x in tensors_in({"a": module})) == 15 + 5 + 15 + 7


# ---------------------------------------------------------------- a 7B on a GPU, by derivation


def test_standing_parts_of_a_7b():
    parts = peak(MISTRAL, SFT, Cut(2048, 32), documents_work([2048]))
    weights = 218_103_808 * 32
    assert parts.weights == pytest.approx(3.60e9, rel=0.01)
    assert parts.weights == pytest.approx(weights * (1 / 2 + 1 / 64 + 4 / 64 / 256), rel=1e-4)
    assert parts.embeddings == pytest.approx(0.524e9, rel=0.01)
    assert parts.adapters + parts.gradients == pytest.approx(0.34e9, rel=0.03)
    assert parts.optimizer == pytest.approx(0.085e9, rel=0.05)


@pytest.mark.parametrize("rank", [8, 16, 128])
def test_bytes_kept_of_a_token_in_a_layer(rank: int):
    """`keep` 94,344 bytes and 14 of a rank; `lean` the input alone, 8,192."""
    tokens, setting, half = 4096, replace(SFT, trained=rank), replace(MISTRAL, layers=16)
    work = documents_work([tokens])

    def activations(geometry: Geometry, keep: int) -> int:
        return peak(geometry, setting, Cut(tokens, keep), work).activations

    full, mixed, shallow = (activations(*x) for x in ((MISTRAL, 32), (MISTRAL, 16), (half, 16)))
    assert full - mixed == 16 * tokens * (94_344 - 8_192 + 14 * rank)
    assert mixed - shallow == 16 * tokens * 8_192


@pytest.mark.parametrize(
    ("tokens", "keep", "published"), [(2048, 0, 5.7e9), (2048, 32, 11.4e9), (4096, 32, 17.9e9)]
)
def test_totals_near_those_derived_by_hand(tokens: int, keep: int, published: float):
    """Those have one dense weight for all groups."""
    parts = peak(MISTRAL, SFT, Cut(tokens, keep), documents_work([2048] * (tokens // 2048)))
    assert parts.live == pytest.approx(published, rel=0.1)


def test_more_of_anything_is_more():
    def total(setting: Setting = DPO, keep: int = 8, scale: int = 1, **cut: Any) -> int:
        work = pairs_work([(200 * scale, 150 * scale, 150 * scale)] * 4)
        return peak(MISTRAL, setting, Cut(2000 * scale, keep, **cut), work).total

    assert [total(scale=n) for n in (1, 2, 4)] == sorted({total(scale=n) for n in (1, 2, 4)})
    assert total(keep=0) < total(keep=16) < total(keep=32)
    ranks = [replace(DPO, trained=r) for r in (8, 64, 128)]
    assert total(ranks[0]) < total(ranks[1]) < total(ranks[2])
    assert total(replace(DPO, frozen=0)) < total(DPO)
    assert total(keep=4, rest="offload", scale=4) < total(keep=4, scale=4)
    adamw = replace(DPO, optimizer="adamw")
    assert total(adamw, place="host") < total(DPO) < total(adamw)
    assert total(replace(DPO, double_quant=False)) > total(DPO)
    assert total(keep=32, head_rows=4096) >= total(keep=32, head_rows=256)


def test_a_first_micro_batch_has_no_gradients_yet():
    work, cut = documents_work([2048]), Cut(2048, 32)
    first, later = (peak(MISTRAL, DPO, cut, work, first=is_first) for is_first in (True, False))
    assert first.gradients < later.gradients == 4 * MISTRAL.adapter_weights(128)
    assert first.total < later.total


def test_what_waits_in_host_memory():
    """train/masters.py: 18 bytes a weight, 10 of them pinned; torch pins powers of two."""
    work, weights = documents_work([2048]), MISTRAL.adapter_weights(128)
    setting = replace(DPO, optimizer="adamw")
    waits = host(MISTRAL, setting, Cut(2048, 32, place="host"), work)
    assert waits.pinned == 2 * 2**31 + 2**30 > 10 * weights
    on_cpu = host(
        MISTRAL, replace(setting, device="cpu", element=4), Cut(2048, 32, place="host"), work
    )
    assert on_cpu.pinned == 8 * weights, "fp32 masters are their own copy"
    assert waits.ordinary == pytest.approx(8 * weights, rel=1e-4)
    parts = peak(MISTRAL, setting, Cut(2048, 32, place="host"), work)
    assert (parts.optimizer, parts.gradients) == (0, 4 * weights)
    offload = host(MISTRAL, setting, Cut(2048, 20, rest="offload"), work)
    assert (offload.pinned, offload.ordinary) == (12 * 2048 * 8192, 0)
    assert host(MISTRAL, setting, Cut(2048, 0), work).total == 0


def test_paged_states_may_leave_the_device():
    for kind, states in (("paged_adamw_32bit", 8), ("paged_adamw_8bit", 2)):
        setting = replace(DPO, optimizer=kind)
        parts = peak(MISTRAL, setting, Cut(2048, 32), documents_work([2048]))
        assert parts.may_leave == states * MISTRAL.adapter_weights(128)
        assert parts.may_leave <= parts.optimizer
        on_cpu = replace(setting, device="cpu", element=4)
        assert peak(MISTRAL, on_cpu, Cut(512, 32), documents_work([512])).may_leave == 0


def test_what_a_gpu_takes_beside_tensors():
    work = documents_work([2048])
    parts = peak(MISTRAL, SFT, Cut(2048, 32), work)
    assert parts.context > 0 and parts.slack > 0
    assert parts.live == parts.total - parts.context - parts.slack
    on_cpu = peak(MISTRAL, replace(SFT, device="cpu", element=4), Cut(2048, 32), work)
    assert (on_cpu.context, on_cpu.slack) == (0, 0)
    assert on_cpu.weights > 7 * parts.weights  # a CPU keeps what it dequantised


def test_sizes_are_those_of_the_kernels():
    assert (planned_attention.SHORT, planned_attention.LENGTH_STEP) == (
        attention.SHORT,
        attention.LENGTH_STEP,
    )
    assert (memory.TILE_ROWS, memory.TILE_VOCAB) == (
        linear_logprob.TILE_ROWS,
        linear_logprob.TILE_VOCAB,
    )
    assert {lora.RANK_BLOCK_N, lora.RANK_CHUNK_T} == {products.RANK_TILE}
    assert (products.RANKS_AT_MOST, products.A_CHUNK) == (lora.MAX_BLOCK_R, lora.A_CHUNK_T)
    assert (products.PIECE_K, products.K_ALIGNMENT) == (fp16acc.PIECE_K, fp16acc.ALIGNMENT)
    assert reference._recent_mask.cache_parameters()["maxsize"] == products.MASKS
    assert (groups.MOST_WASTED, groups.ROW_STEP) == (group.MOST_WASTED, frozen_weights.ROW_STEP)
    for width in (64, 4096, 4160, 14336, 28672):
        assert products._pieces(width) == len(fp16acc.pieces_of(width))
