"""race.py at toy size: its rows, and that no speed comes from a run that computes otherwise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason="the rival is not installed (extra `dev`)")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOY = ["--toy", "--threads", "1", "--rounds", "1", "--steps", "1", "--warmup", "1"]
SPEEDS = {"tokens_per_second", "pairs_per_second", "step_ms_p50", "seconds"}
OPTIONS: dict[str, dict[str, Any]] = {
    "ours": {"tokens_per_micro_batch": 256, "checkpointing": "none"},
    "plain": {"batch": 2, "checkpointing": True},
    "trl": {"batch": 1, "checkpointing": False, "precompute": True, "sorted": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What toy races of two steps work on, by task."""
    from races.prepare import find_base, prepare

    found, base = {}, None
    for task in ("dpo", "sft"):
        found[task] = tmp_path_factory.mktemp(task)
        base = base or find_base("toy", found[task], "cpu")
        prepare(task, "toy", found[task], 2, base)
    return found


def make_case(side: str, task: str, folders: dict[str, Path], **more: Any) -> Any:
    """A case of two steps, the first a warm-up."""
    from races.work import Case

    engine = "native" if side == "ours" else None
    base = str(folders["dpo"] / "base")  # one for both tasks
    case = Case(side, task, "best", OPTIONS[side], engine, 2, steps=2, warmup=1, base=base)
    return replace(case, **more)


def run_here(case: Any, folders: dict[str, Path]) -> list[dict[str, Any]]:
    """A case as its worker does it, in this process."""
    import importlib

    from races.meter import Meter

    worker, meter = importlib.import_module(f"races.side_{case.side}"), Meter(case)
    task = worker.preference if case.task == "dpo" else worker.language
    return [{"status": "ok", **task(case, folders[case.task], meter), **meter.report()}]


@pytest.fixture(scope="module")
def dpo(folders: dict[str, Path]) -> dict[Any, list[dict[str, Any]]]:
    """What ours and plain report of the same two DPO steps."""
    cases = [make_case(side, "dpo", folders) for side in ("ours", "plain", "trl")]
    return {case: run_here(case, folders) for case in cases}


def test_a_toy_race_judges_every_side_and_measures_those_that_agree(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    more = ["--settings", "best", "--rivals", "plain", "trl", "liger", "--out", str(out)]
    more += ["--more", 'trl={"config": {"beta": 0.2}}', "--rival-python", "liger=/no/python"]
    command = [sys.executable, str(BENCHMARKS / "race.py"), "dpo", *TOY, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["toy"] is True and row["benchmark"] == "race" for row in rows)
    native, hf, plain, trl, ratio, liger = rows
    assert [row["engine"] for row in (native, hf)] == ["native", "hf"]
    assert [row["status"] for row in (native, hf, plain)] == ["ok"] * 3
    for row in (native, hf, plain):
        assert row["pairs"] == 2  # one timed step
        assert row["pairs_per_second"] == pytest.approx(2 / row["seconds"], rel=1e-2)
        assert row["peak_memory_gib"] == row["peak_rss_above_imports_gib"] > 0
        assert row["versions"]["transformers"]
    assert native["tokens"] == plain["tokens"] > 0
    assert (trl["status"], SPEEDS & set(trl)) == ("disagrees", set())
    assert trl["loss"] != pytest.approx(trl["truth_loss"], rel=1e-3)
    assert "losses differ" in trl["reason"]
    assert (liger["status"], SPEEDS & set(liger)) == ("absent", set())
    assert "benchmarks/rivals/liger.txt" in liger["reason"]
    assert (ratio["rival"], ratio["rival_row"]) == ("plain", plain["row"])


def test_all_sides_see_the_same_ids_and_lose_the_same(dpo) -> None:
    from races.rows import judge

    verdicts = list(judge(dpo).values())
    assert [verdict.status for verdict in verdicts] == ["ok"] * 3
    assert max(verdict.worst or 0 for verdict in verdicts) < 1e-4
    first = next(iter(dpo.values()))[0]["losses"][0]
    assert abs(first - 0.6931) > 1e-2, "the first loss must hang on more than ln 2"


def test_packed_rows_agree_too(folders: dict[str, Path]) -> None:
    from races.rows import judge
    from races.work import read_work

    assert max(map(len, read_work(folders["sft"]).rows)) > 2, "nothing is packed"
    cases = [make_case(side, "sft", folders) for side in ("ours", "plain", "trl")]
    verdicts = judge({case: run_here(case, folders) for case in cases}).values()
    assert [verdict.status for verdict in verdicts] == ["ok"] * 3


def test_dropout_spares_the_first_step(folders: dict[str, Path]) -> None:
    case = make_case("ours", "sft", folders)
    (without,), (with_,) = (
        run_here(c, folders) for c in (case, replace(case, dropout=0.5, setting="default"))
    )
    assert with_["losses"][0] == without["losses"][0]
    assert with_["losses"][1] != without["losses"][1]


@pytest.mark.parametrize("change", ["digests", "first", "later", "nan", "steps"])
def test_whoever_computes_something_else_has_no_figure(dpo, folders, change: str) -> None:
    from races.rows import make_rows
    from races.work import read_work

    *_, rival = dpo
    run = dict(dpo[rival][0])
    first, later = run["losses"]
    run |= {
        "digests": {"digests": ["0" * 64]},
        "first": {"losses": [first * 1.001, later]},
        "later": {"losses": [first, later * 1.01]},
        "nan": {"losses": [first, float("nan")]},
        "steps": {"losses": [first]},
    }[change]
    rows = make_rows(dpo | {rival: [run]}, read_work(folders["dpo"]), {"toy": True})
    by_side = {row["side"]: row for row in rows if row["kind"] == "side"}
    assert by_side["trl"]["status"] == "disagrees"
    assert not SPEEDS & set(by_side["trl"])
    assert by_side["ours"]["status"] == by_side["plain"]["status"] == "ok"
    assert [row["rival"] for row in rows if row["kind"] == "ratio"] == ["plain"]
    json.dumps(rows, allow_nan=False)


def test_the_majority_is_the_truth_and_not_we(dpo) -> None:
    from races.rows import judge

    ours = next(iter(dpo))
    wrong = dict(dpo[ours][0], losses=[loss * 1.1 for loss in dpo[ours][0]["losses"]])
    statuses = [verdict.status for verdict in judge(dpo | {ours: [wrong]}).values()]
    assert statuses == ["disagrees", "ok", "ok"]


def test_nobody_to_agree_with_is_no_speed(dpo, folders) -> None:
    from races.rows import make_rows
    from races.work import read_work

    ours, plain, _ = dpo
    fallen = {"status": "out of memory", "reason": "too much"}
    results = {ours: dpo[ours], plain: [fallen]}
    rows = make_rows(results, read_work(folders["dpo"]), {})
    assert [row["status"] for row in rows] == ["unchecked", "out of memory"]
    assert not any(SPEEDS & set(row) for row in rows)


def test_figures_are_medians_of_rounds_over_timed_steps(dpo, folders) -> None:
    from races.rows import make_rows
    from races.work import read_work

    ours, plain, _ = dpo
    slow = [dict(dpo[ours][0], seconds=[9.0, s], energy_joules=4.0) for s in (2.0, 1.0, 8.0)]
    other = [dict(dpo[plain][0], seconds=[9.0, 3.0])]
    results = {ours: slow, plain: other}
    mine, theirs, ratio = make_rows(results, read_work(folders["dpo"]), {"toy": True})
    assert (mine["seconds"], mine["slowest_round_seconds"]) == (2.0, 8.0)
    assert mine["pairs_per_second"] == 1.0
    assert mine["step_ms_p20"] == mine["step_ms_p50"] == mine["step_ms_p80"] == 2000
    assert (mine["warmup_seconds"], mine["energy_joules"]) == (9.0, 4.0)
    assert (ratio["speed_ratio"], ratio["setting"]) == (1.5, "best")
    assert (ratio["ours_row"], ratio["rival_row"]) == (mine["row"], theirs["row"])


def test_ratios_name_the_fastest_rows_and_the_defaults() -> None:
    from races.rows import ratios

    def row(side: str, setting: str, speed: float, status: str = "ok") -> dict[str, Any]:
        name = f"{side} {setting} {speed}"
        found = {"kind": "side", "task": "sft", "side": side, "setting": setting, "row": name}
        if status == "ok":
            found |= {"seconds": 60 / speed, "cpu_seconds": 60 / speed, "peak_memory_gib": speed}
        return found | {"status": status}

    rows = [
        row("ours", "default", 30.0), row("ours", "best", 20.0),
        row("trl", "default", 10.0), row("trl", "best", 15.0), row("trl", "best", 12.0),
        row("plain", "default", 0.0, "out of memory"), row("plain", "best", 5.0),
        row("unsloth", "best", 99.0, "disagrees"),
    ]  # fmt: skip
    found = {(r["setting"], r["rival"]): r for r in ratios(rows)}
    assert {key: r["speed_ratio"] for key, r in found.items()} == {
        ("best", "trl"): 2.0, ("best", "plain"): 6.0, ("default", "trl"): 3.0,
    }  # fmt: skip
    assert found["best", "trl"]["rival_row"] == "trl best 15.0"
    assert found["best", "trl"]["ours_row"] == "ours default 30.0"
    assert found["default", "trl"]["memory_ratio"] == 3.0


def test_a_checkpoint_of_nf4_loads_as_it_was_written(tmp_path: Path) -> None:
    import torch
    from bitsandbytes.nn.modules import Linear4bit
    from transformers import AutoModelForCausalLM

    from races.model import GEOMETRIES, count_weights, write_checkpoint

    folder, toy = tmp_path / "base", GEOMETRIES["toy"]
    count = write_checkpoint(toy, folder, quantization="nf4", seed=1)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linears = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert len(linears) == 7 * toy.layers
    assert count == count_weights(folder)
    with torch.no_grad():
        logits = model(torch.arange(3, 20)[None]).logits
    assert 0.5 < logits.std().item() < 2


def test_our_side_plans_what_the_recipe_leaves_open(folders: dict[str, Path]) -> None:
    from races.plan import settled
    from races.work import read_work
    from zephyr_lite.data.encoded import EncodedPair
    from zephyr_lite.errors import MachineError
    from zephyr_lite.recipe import Memory

    case, work = make_case("ours", "dpo", folders), read_work(folders["dpo"])
    pairs = [EncodedPair(p.prompt, p.chosen, p.rejected) for p in work.pairs]
    memory = Memory.model_validate({})
    assert settled(case, work, memory, pairs) is memory
    planned = settled(case, work, memory, pairs, budget=10**9)
    assert planned.tokens_per_micro_batch != "auto"
    assert planned.keep_layers == 2
    with pytest.raises(MachineError, match="takes at least"):
        settled(case, work, memory, pairs, budget=10**5)


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_the_roofline_is_of_this_work_on_that_card(folders: dict[str, Path], task: str) -> None:
    from races.plan import least_seconds
    from races.work import read_work
    from zephyr_lite.plan.gpus import gpu_named

    case, work = make_case("ours", task, folders, device="cuda"), read_work(folders[task])
    fast, slow = (least_seconds(case, work, gpu_named(name)) for name in ("4090", "3090"))
    assert len(fast) == len(slow) == 2
    assert all(0 < a < b for a, b in zip(fast, slow, strict=True))


def test_lengths_are_numbers_within_the_recipes_limits() -> None:
    from lengths.real import dialogue_lengths, pair_lengths

    prompt, chosen, rejected = np.array(pair_lengths()).T
    assert len(prompt) > 800
    assert (prompt + np.maximum(chosen, rejected)).max() <= 1024
    assert min(prompt.min(), chosen.min(), rejected.min()) >= 1
    assert len(dialogue_lengths()) > 500


def test_a_race_that_was_stopped_goes_on(tmp_path, folders, monkeypatch) -> None:
    import race

    asked: list[str] = []

    def run_apart(case: Any, folder: Path, python: str) -> dict[str, Any]:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(case.side)
        status = "ok" if case.side == "ours" else "failed"
        return {"status": status, "reason": "", "losses": [1.0, 0.5]}

    monkeypatch.setattr(race, "run_apart", run_apart)
    cases = [make_case(side, "dpo", folders) for side in ("ours", "plain")]
    with pytest.raises(KeyboardInterrupt):
        race.race(cases, {}, tmp_path, 2)
    assert asked == ["ours", "plain"]
    asked.clear()
    results = race.race(cases, {}, tmp_path, 2)
    assert asked == ["ours"], "the second round of what did not fail"
    assert [len(runs) for runs in results.values()] == [2, 1]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", str(BENCHMARKS / "results" / "race.jsonl")], "toy rows are no results"),
        (["--settings", "worst"], "--settings"),
        (["--rival-python", "trl"], "--rival-python"),
        (["--more", "trl=x"], "not JSON"),
        (["--dropout", "0.1"], "--dropout"),
        (["--cap-gib", "8", "--device", "cpu"], "--cap-gib"),
    ],
)
def test_wrong_usage_is_refused(words: list[str], said: str, capsys) -> None:
    import race

    with pytest.raises(SystemExit) as exit_:
        race.parse(["dpo", *TOY, *words])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err
