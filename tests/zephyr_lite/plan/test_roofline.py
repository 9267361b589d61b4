"""The roofline: FLOPs worked out by hand, seconds that move the right way, in the right unit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.gpus import Gpu, gpu_named
from zephyr_lite.plan.roofline import (
    flops,
    least_seconds,
    micro_batch_seconds,
    moved_bytes,
    reference_flops,
    reference_seconds,
    step_seconds,
)
from zephyr_lite.plan.setting import Cut, Place, Setting
from zephyr_lite.plan.work import documents_work, pairs_work

MISTRAL_7B = Geometry("mistral", 32, 4096, 14336, 32, 8, 128, 32000)
# 1 layer, width 4, feed-forward 8, 2 heads of 2, 1 of keys and values, vocabulary 10:
# q 16, k 8, v 8, o 16, gate 32, up 32, down 32 weights; 8, 6, 6, 8, 12, 12, 12 of an adapter of r 1
SMALL = Geometry("mistral", 1, 4, 8, 2, 1, 2, 10)
SFT = Setting("sft", trained=16, frozen=0)
DPO = Setting("dpo", trained=128, frozen=0)
GPU = gpu_named("4090")
ROW = documents_work([2048])


# ---------------------------------------------------------------- FLOPs


@pytest.mark.parametrize(
    ("recomputed", "gigaflops"), [("nothing", 30.6), ("all but down_proj", 41.4), ("all", 45.1)]
)
def test_a_token_of_mistral_7b_costs_what_was_derived(recomputed, gigaflops: float) -> None:
    """r 16, 2048 tokens; what adapters do again, 0.1, was not in the derivation."""
    total = flops(MISTRAL_7B, SFT, ROW, recomputed).total / 2048
    assert total / 1e9 == pytest.approx(gigaflops, rel=0.003)


def test_flops_of_a_small_layer_by_hand() -> None:
    """3 tokens of one document: 2 of them scored, 6 pairs of a query and a key."""
    work, setting = documents_work([3]), Setting("dpo", trained=2, frozen=1)
    kept = flops(SMALL, setting, work)
    linears = 16 + 8 + 8 + 16 + 32 + 32 + 32
    adapter = 8 + 6 + 6 + 8 + 12 + 12 + 12
    assert kept.base == 3 * 4 * linears
    assert kept.rest == 3 * (6 * 2 * adapter + 4 * adapter) + 4 * 10 * 4 * 2
    assert kept.attention == 3.5 * 4 * 4 * 6  # 4 products of a FLOP pair, heads x width 4
    lean = flops(SMALL, setting, work, "all but down_proj")
    assert lean.base - kept.base == 3 * 2 * (linears - 32)
    assert lean.rest - kept.rest == 3 * 2 * 3 * (adapter - 12)
    assert lean.attention == 4.5 * 4 * 4 * 6
    full = flops(SMALL, setting, work, "all")
    assert full.base - kept.base == 3 * 2 * linears
    assert full.rest - kept.rest == 3 * 2 * 3 * adapter
    reference = reference_flops(SMALL, setting, work)
    assert reference.base == 3 * 2 * linears
    assert reference.rest == 3 * 2 * 3 * adapter + 2 * 10 * 4 * 2
    assert reference.attention == 4 * 4 * 6


def test_layers_that_keep_are_not_done_again() -> None:
    ends = [flops(MISTRAL_7B, SFT, ROW, "all but down_proj", n).total for n in (0, 8, 32)]
    assert ends[0] == flops(MISTRAL_7B, SFT, ROW).total
    assert ends[2] == flops(MISTRAL_7B, SFT, ROW, "all but down_proj").total
    assert ends[1] == pytest.approx(ends[0] + (ends[2] - ends[0]) / 4)


def test_targets_that_are_left_out_cost_nothing() -> None:
    few = flops(SMALL, Setting("sft", 1, 0, targets=("q_proj", "down_proj")), documents_work([3]))
    none = flops(SMALL, Setting("sft", 0, 0), documents_work([3]))
    assert few.rest - none.rest == 3 * 6 * (8 + 12)
    assert few.base == none.base


def test_attention_counts_heads_not_the_hidden_width() -> None:
    """Qwen3's heads are wider together than its hidden width."""
    wide = replace(SMALL, head_width=4)
    work = documents_work([3])
    assert flops(wide, SFT, work).attention == 2 * flops(SMALL, SFT, work).attention


# ---------------------------------------------------------------- bytes


def test_bytes_are_elementwise_passes_and_two_dequantisations() -> None:
    moved = moved_bytes(MISTRAL_7B, SFT, ROW)
    assert moved == pytest.approx(32 * 2048 * 840_000 + 2 * 17.56e9, rel=1e-3)
    assert moved_bytes(MISTRAL_7B, SFT, ROW, "all") - moved == 32 * 2048 * 245_000
    dropped = moved_bytes(MISTRAL_7B, replace(SFT, dropout=True), ROW)
    assert dropped - moved == pytest.approx(32 * 2048 * 130_000)
    plain = moved_bytes(MISTRAL_7B, replace(SFT, quantization="none"), ROW)
    assert plain == 32 * 2048 * 840_000
    assert moved_bytes(MISTRAL_7B, replace(SFT, double_quant=False), ROW) > moved


# ---------------------------------------------------------------- seconds


def _seconds(keep: int = 32, gpu: Gpu = GPU, setting: Setting = SFT, work=ROW, **cut) -> float:
    return micro_batch_seconds(MISTRAL_7B, setting, Cut(2048, keep, **cut), work, gpu)


def test_seconds_by_hand_at_round_rates() -> None:
    """1 TFLOP/s, 1000 GB/s."""
    gpu = Gpu("RTX 1", 2**30, 1.0, 1000 / 0.85, 1.0, "invented", efficiency=1.0)
    count, moved = flops(MISTRAL_7B, SFT, ROW), moved_bytes(MISTRAL_7B, SFT, ROW)
    products = (count.base + count.rest + count.attention / 0.7) / 1e12
    assert _seconds(gpu=gpu) == pytest.approx(products + moved / 1e12)
    rates = {"matmul_tflops": 1.0, "copy_gb_per_s": 1000.0}
    twice = least_seconds(MISTRAL_7B, SFT, [ROW, ROW], "nothing", **rates)
    assert twice == pytest.approx(2 * _seconds(gpu=gpu))


def test_each_layer_that_keeps_saves_time_and_every_token_costs_some() -> None:
    times = [_seconds(keep) for keep in range(0, 33, 4)]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)
    lengths = [_seconds(work=documents_work([n])) for n in (512, 1024, 2048, 4096)]
    assert lengths == sorted(lengths)
    per_token = [t / n for t, n in zip(lengths, (512, 1024, 2048, 4096), strict=True)]
    assert per_token[0] > per_token[1] > per_token[2], "dequantising weighs less in larger ones"


def test_a_shared_prompt_is_cheaper_than_two() -> None:
    shared = pairs_work([(500, 250, 250)] * 4)
    twice = documents_work([750, 750] * 4, scored=4 * 500)
    ratio = _seconds(setting=DPO, work=twice) / _seconds(setting=DPO, work=shared)
    assert 1.45 < ratio < 1.55


def test_fp16_sums_are_faster_on_a_geforce_alone_and_for_the_base_alone() -> None:
    half = replace(SFT, gemm="fp16acc")
    base = flops(MISTRAL_7B, SFT, ROW).base
    saved = _seconds() - _seconds(setting=half)
    assert saved == pytest.approx(base / 2 / (0.85 * 165.2e12))
    h200 = gpu_named("H200")
    assert _seconds(setting=half, gpu=h200) == _seconds(gpu=h200)


def test_an_offload_costs_only_what_the_bus_cannot_hide() -> None:
    assert _seconds(0, rest="offload") == _seconds(0), "16 kB a token and layer are hidden"
    slow = replace(GPU, pcie_gb_per_s=0.05)
    late = _seconds(0, gpu=slow, rest="offload") - _seconds(0, gpu=slow)
    bus = 32 * 2048 * 4096 * 2 / 0.05e9
    assert late + _seconds(0) == pytest.approx(2 * bus), "out and back, all products beside them"
    assert _seconds(32, gpu=slow, rest="offload") == _seconds(32), "no layer offloads"


def test_a_reference_pass_is_a_third_of_a_step_and_less() -> None:
    """14.8 GFLOP a token by derivation, and at most 9000 tokens/s on a 4090."""
    work = pairs_work([(150, 330, 330)] * 5)
    count = reference_flops(MISTRAL_7B, DPO, work).total / work.tokens
    assert count / 1e9 == pytest.approx(14.8, rel=0.015)
    seconds = reference_seconds(MISTRAL_7B, DPO, work, GPU)
    assert 8000 < work.tokens / seconds < 9000
    assert 0.4 < seconds / _seconds(setting=DPO, work=work) < 0.5


def test_the_optimizers_step_is_milliseconds_on_the_card_and_more_on_the_host() -> None:
    """335.5 M weights of r 128: 12 bytes of clipping and 16 of AdamW at 857 GB/s."""

    def step(place: Place = "device", **fields) -> float:
        return step_seconds(MISTRAL_7B, replace(DPO, **fields), Cut(2048, 32, place=place), GPU)

    assert step() == pytest.approx(335_544_320 * 28 / 857e9, rel=1e-3)
    assert step(optimizer="paged_adamw_8bit") == step()
    assert step(optimizer="adamw") == step(optimizer="paged_adamw_32bit") > step()
    host = step("host", optimizer="adamw")
    assert host == pytest.approx(335_544_320 * (12 / 857e9 + 6 / 25e9 + 34 / 20e9), rel=1e-3)
