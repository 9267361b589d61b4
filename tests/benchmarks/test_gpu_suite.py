"""The GPU suite at toy size: its rows, what it skips, and that a wrong answer gets no speed."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
BENCHMARKS = REPO / "benchmarks"
# All but `suite` and `tiny`, which start this project's own commands.
STAND_ALONE = [
    "machine",
    "kernels_correct",
    "kernels_speed",
    "kernels_gemm",
    "steps_sft",
    "steps_dpo",
    "plan_memory",
    "planned_runs",
    "fp16acc",
    "augmented_k",
    "attention_packed",
    "attention_shared",
    "nf4",
    "head",
    "gqa_memory",
    "fragmentation",
]


@pytest.fixture
def bench():
    from gpu.bench import Bench

    return Bench(torch.device("cpu"), toy=True, deadline=time.monotonic() + 60)


@pytest.fixture(scope="module")
def toy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of one toy run of all stand-alone parts, by the command a person types."""
    path = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--device", "cpu"]
    command += ["--out", str(path), "--only", *STAND_ALONE]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _run(path: Path, *arguments: str) -> int:
    import gpu_suite

    return gpu_suite.main(["--device", "cpu", "--out", str(path), *arguments])


def test_every_row_says_where_it_comes_from(toy_file: Path) -> None:
    for row in _rows(toy_file):
        assert row["toy"] is True
        assert row["device"] == "cpu"
        for key in ("question", "commit", "date", "torch", "python", "driver", "gpu", "case"):
            assert row[key], f"{row['part']}: {key} is empty"
        if row["status"] == "ok":
            assert row["p20"] <= row["p50"] <= row["p80"]
            assert row["n"] >= 1
        else:
            assert row["status"] == "not available"
            assert row["note"], f"{row['part']} {row['metric']}: no reason"


def test_every_part_measures_something_on_a_cpu(toy_file: Path) -> None:
    measured = {row["part"] for row in _rows(toy_file) if row["status"] == "ok"}
    assert measured == set(STAND_ALONE)


def test_a_second_run_measures_nothing(toy_file: Path) -> None:
    before = toy_file.read_bytes()
    assert _run(toy_file, "--only", "head", "augmented_k", "machine") == 0
    assert toy_file.read_bytes() == before


def test_a_run_cut_short_measures_what_is_missing(toy_file: Path, tmp_path: Path) -> None:
    lines = toy_file.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["part"] == "machine"]
    # Killed while writing: the last case has lost a row, and half of the one before it is there.
    cut = tmp_path / "rows.jsonl"
    cut.write_text("".join(kept[:-2]) + kept[-2][:40], encoding="utf-8")
    assert _run(cut, "--only", "machine") == 0
    rows = _rows(cut)
    cases = [json.dumps(row["case"]) for row in rows]
    assert set(cases) == {json.dumps(json.loads(line)["case"]) for line in kept}
    torn = json.loads(kept[-3])
    assert torn["case"] == json.loads(kept[-2])["case"] and torn["rows"] == 2
    assert cases.count(json.dumps(torn["case"])) == 1 + 2, "half a case counted as measured"
    untouched = json.dumps(rows[0]["case"])
    assert cases.count(untouched) == rows[0]["rows"], "a case that was whole ran again"


def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path) -> None:
    from gpu.rows import load_rows

    path = tmp_path / "rows.jsonl"
    path.write_text('{"part": "head"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1"):
        load_rows(path)


def test_out_of_time_is_a_failure_with_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(path, "--only", "head", "machine", "--minutes", "0") == 1
    rows = _rows(path)
    assert [row["part"] for row in rows] == ["head", "machine"], "the suite must go on"
    assert all(row["status"] == "error" and "time" in row["note"] for row in rows)


@pytest.mark.parametrize(("minutes", "went_well"), [(1.0, True), (-1.0, False)])
def test_a_part_in_its_own_process(tmp_path: Path, minutes: float, went_well: bool) -> None:
    """As on a GPU. With a limit that has passed before it starts, it is killed and has a row."""
    import gpu_suite
    from gpu.rows import Ledger, describe_machine

    path = tmp_path / "rows.jsonl"
    arguments = argparse.Namespace(minutes=minutes, device="cpu")
    ledger = Ledger(path, describe_machine(torch.device("cpu"), toy=True))
    assert gpu_suite.run_apart("machine", arguments, ledger) is went_well
    statuses = {row["status"] for row in _rows(path)}
    assert ("ok" in statuses) is went_well
    assert ("error" in statuses) is not went_well


def test_toy_rows_are_kept_out_of_the_results() -> None:
    path = BENCHMARKS / "results" / "toy.jsonl"
    with pytest.raises(SystemExit) as stop:
        _run(path, "--only", "machine")
    assert stop.value.code == 2
    assert not path.exists()


def test_a_case_that_raises_becomes_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpu.questions import head

    monkeypatch.setattr(head, "log_probs", lambda logits, target: logits[0, 10**9])
    path = tmp_path / "rows.jsonl"
    assert _run(path, "--only", "head", "machine") == 1
    rows = _rows(path)
    assert "IndexError" in rows[0]["note"]
    assert rows[-1]["part"] == "machine", "the suite must go on"


def test_a_wrong_case_is_not_present_and_a_later_right_one_is(tmp_path: Path) -> None:
    from gpu.rows import Ledger, Part, describe_machine, failed, figure

    machine = describe_machine(torch.device("cpu"), toy=True)
    path, part, case = tmp_path / "rows.jsonl", Part("p", 1, "?"), {"pairs": [(1, 2)]}
    good, bad = figure("time", "ms", 1.0), failed("time", "NaN", status="wrong")
    Ledger(path, machine).append(part, case, [good, bad])
    assert not Ledger(path, machine).has(part, case)
    ledger = Ledger(path, {**machine, "torch": "another"})
    ledger.append(part, case, [good])
    assert ledger.has(part, case)
    assert not Ledger(path, machine).has(part, case), "another torch is another answer"
    assert not ledger.has(Part("p", 2, "?"), case), "a new version of the part measures again"


def test_parts_that_run_our_code_count_for_a_clean_commit_only(tmp_path: Path) -> None:
    from gpu.rows import Ledger, Part, describe_machine, figure

    machine = describe_machine(torch.device("cpu"), toy=True)
    part = Part("suite", 1, "?", by_commit=True)
    for commit, expected in (("abc", True), ("abc+dirty", False), ("unknown", False)):
        path = tmp_path / f"{commit}.jsonl"
        Ledger(path, {**machine, "commit": commit}).append(part, {}, [figure("n", "tests", 1)])
        assert Ledger(path, {**machine, "commit": commit}).has(part, {}) is expected
        assert not Ledger(path, {**machine, "commit": "def"}).has(part, {})


def test_a_backend_that_misaligns_the_shared_prompt_is_wrong_and_gets_no_speed(
    bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.nn.functional import scaled_dot_product_attention

    from gpu import attention_race as race
    from gpu.attention import Layout, pack_pairs

    def build_top_left(layout: Layout):
        """The classic mistake: the causal triangle starts at the first key of the prompt."""

        def attend(q, k, v):
            spans = (
                q.split(layout.q_lengths),
                layout.keys(k).split(layout.k_lengths),
                layout.keys(v).split(layout.k_lengths),
            )
            outs = []
            for parts in zip(*spans, strict=True):
                q_i, k_i, v_i = (x.transpose(0, 1)[None] for x in parts)
                out = scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, enable_gqa=True)
                outs.append(out[0].transpose(0, 1))
            return torch.cat(outs)

        return attend

    backends = {"top_left": build_top_left, "sdpa_segments": race.BACKENDS["sdpa_segments"]}
    monkeypatch.setattr(race, "BACKENDS", backends)
    small = pack_pairs([(5, 7, 6), (0, 3, 2)], bench.device)
    rows = list(race.race_backends(bench, small, {"shared_": small}, race.TOY))
    by_metric = {row.metric: row for row in rows}
    assert by_metric["top_left_out_relative_error"].status == "wrong"
    assert "shared_top_left_forward" not in by_metric
    assert by_metric["shared_sdpa_segments_both"].status == "ok"


def test_the_shared_layout_is_two_sequences_exactly() -> None:
    from gpu.attention import attend_plainly, build_sdpa_segments, pack_pairs

    layout = pack_pairs([(4, 5, 3), (0, 2, 6), (3, 1, 1)], torch.device("cpu"))
    q = torch.randn(layout.tokens, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(layout.tokens, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    upstream = torch.randn_like(q)
    outs = attend_plainly(q, k, v, layout), build_sdpa_segments(layout)(q, k, v)
    grads = [torch.autograd.grad(out, (q, k, v), upstream) for out in outs]
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-12, atol=1e-12)
    for plain, segments in zip(*grads, strict=True):
        torch.testing.assert_close(plain, segments, rtol=1e-12, atol=1e-12)
    assert layout.cu_q.tolist() == [0, 9, 12, 14, 20, 24, 25]
    assert layout.cu_k.tolist() == [0, 9, 16, 18, 24, 28, 32]
    # Unmasked scores, counted another way: position i of a sequence sees i + 1 keys.
    counted = sum(i + 1 for s in layout.sequences for i in range(s.kept, len(s.index)))
    assert layout.scores == counted


def test_torchs_varlen_function_takes_the_arguments_we_pass() -> None:
    """On the meta device, where shapes and argument names are checked and nothing is computed."""
    from gpu.attention import build_varlen, pack_pairs

    with torch.device("meta"):
        q, k, v = torch.empty(18, 4, 8), torch.empty(18, 2, 8), torch.empty(18, 2, 8)
    layout = pack_pairs([(5, 7, 6)], torch.device("cpu"))
    layout.gather = None  # indices live on the CPU; the call is what is asked for
    layout.cu_q, layout.cu_k = layout.cu_q.to("meta"), layout.cu_k.to("meta")
    assert build_varlen(layout)(q, k, v).shape == q.shape


@pytest.mark.parametrize("spoil", [lambda out: out * 1.1, lambda out: out * math.nan])
def test_the_judge_refuses(bench, spoil) -> None:
    truth = torch.randn(64, dtype=torch.float64)
    plain = truth.bfloat16()
    assert bench.judge(plain, truth, plain).is_right
    assert bench.judge(spoil(plain), truth, plain).measure().status == "wrong"


def test_a_command_over_its_limit_is_killed_with_its_children(bench, tmp_path: Path) -> None:
    bench.deadline = time.monotonic()
    mark = tmp_path / "mark"
    done = bench.run_limited(["sh", "-c", f"(sleep 2; touch {mark}) & wait"], cwd=tmp_path)
    assert done.code is None
    time.sleep(1.5)
    assert not mark.exists(), "a grandchild outlived the limit"


def test_memory_plan_of_the_allocator_run_adds_up() -> None:
    from gpu.allocator import SAVED, Plan

    assert sum(SAVED) == 94_336  # bytes per token and layer that `keep` saves
    assert 4000 < Plan(cap_bytes=int(22.5 * 2**30), fill=0.95).max_tokens < 7000


@pytest.mark.skipif(
    not (REPO / "tests" / "test_architecture.py").exists(), reason="no tests/test_architecture.py"
)
def test_the_suite_part_counts_tests(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert _run(path, "--only", "suite") == 0
    rows = {row["metric"]: row["p50"] for row in _rows(path)}
    assert rows["passed"] > 0
    assert rows["failed"] == 0


def test_stage_seconds_come_from_the_manifest(tmp_path: Path) -> None:
    from gpu.questions.tiny import stage_seconds

    path = tmp_path / "manifest.json"
    path.write_text('{"stages": {"sft": {"seconds": 1.5}, "aif": {"started": "x"}}}')
    assert [(m.metric, m.p50) for m in stage_seconds(path)] == [("sft_seconds", 1.5)]
    path.write_text("{}")
    assert [m.status for m in stage_seconds(path)] == ["not available"]
    assert [m.status for m in stage_seconds(tmp_path / "none")] == ["wrong"]
