"""The ablations' judge, tables and figure, one toy run of the real thing, and the docs' figures."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from zephyr_lite import recipe_file
from zephyr_lite.data.sources import resolve
from zephyr_lite.recipe import Recipe
from zephyr_lite.tiny.world import STYLES, TOPICS, VALUES, answer

REPO = Path(__file__).resolve().parents[2]
TOY = (
    *(f"{part}.max_steps=1" for part in ("base.build", "sft", "dpo")),
    *("base.build.hidden_size=64", "base.build.layers=1", "base.build.limit=20"),
    *("data.dialogues.train.limit=20", "data.dialogues.eval.limit=5"),
    *("data.feedback.train.limit=10", "data.feedback.eval.limit=5", "export.questions=null"),
)


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules."""
    import ablations
    from ablation import judge, tables
    from pages import svg_chart

    return SimpleNamespace(main=ablations, judge=judge, tables=tables, chart=svg_chart)


def package_rows(name: str) -> list[dict[str, Any]]:
    """Rows of one of the example's files."""
    text = resolve(f"package:{name}").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


# ---------------------------------------------------------------- the judge


def test_the_judge_gives_what_the_feedback_gave(bench):
    rows = package_rows("feedback.eval.jsonl")
    assert bench.judge.held_out_prompts() == [row["instruction"] for row in rows]
    given = [(row["instruction"], c) for row in rows for c in row["completions"]]
    assert len(given) == 960
    for prompt, completion in given:
        judged = bench.judge.judge(prompt, completion["response"])
        assert judged.score == completion["overall_score"], judged


def test_the_judge_agrees_with_the_example_s_exam(bench):
    """Every form of every value: right exactly where the exam's own rule accepts it."""
    facts = bench.judge._world().facts
    for row in package_rows("questions.jsonl"):
        asked = bench.judge._held_out()[row["prompt"]]
        for style in STYLES:
            for value in VALUES[asked.topic]:
                said = answer(Random(0), style, asked.topic, asked.animal, value)
                accepted = re.fullmatch(row["accept"], said, re.IGNORECASE) is not None
                judged = bench.judge.judge(row["prompt"], f" {said}\n")
                assert (judged.verdict == "right") == accepted, (row["prompt"], said)
                assert (judged.verdict in ("right", "off_form")) == (
                    value == facts[asked.animal, asked.topic]
                )


def test_what_is_no_answer_scores_least(bench):
    prompt = next(
        p for p in bench.judge.held_out_prompts() if bench.judge._held_out()[p].style == "sentence"
    )
    asked = bench.judge._held_out()[prompt]
    right = bench.judge._world().facts[asked.animal, asked.topic]
    wrong = next(v for v in VALUES[asked.topic] if v != right)
    elsewhere = next(t for t in TOPICS if t != asked.topic)
    said = answer(Random(0), "sentence", asked.topic, asked.animal, right)
    other = "cow" if asked.animal != "cow" else "pig"
    verdicts = {
        said: "right",
        said.upper().removesuffix("."): "right",
        f"The {asked.animal}: {right}.": "off_form",
        f"With pleasure! {said}": "off_form",
        answer(Random(0), "sentence", asked.topic, other, right): "wrong",
        answer(Random(0), "sentence", asked.topic, asked.animal, wrong): "wrong",
        answer(Random(0), "sentence", elsewhere, asked.animal, VALUES[elsewhere][0]): "wrong",
        f"The {asked.animal}: {wrong}.": "neither",
        f"{said} {said}": "neither",
        f"{said} And more": "neither",
        f"<|assistant|> {said}": "neither",
        "": "neither",
    }
    assert {a: bench.judge.judge(prompt, a).verdict for a in verdicts} == verdicts
    assert bench.judge.judge(prompt, "").score == min(bench.judge.SCORES.values())
    with pytest.raises(KeyError):
        bench.judge.judge("Where does the wolf live?", said)


def test_wins_are_counted_with_ties_as_halves(bench):
    def judged(*verdicts: str) -> list[Any]:
        return [bench.judge.Judged(str(i), "", v) for i, v in enumerate(verdicts)]

    ours, theirs = judged("right", "wrong", "neither", "right"), judged(*["off_form"] * 3, "right")
    assert bench.judge.win_rate(ours, theirs) == 100 * (1 + 0 + 0 + 0.5) / 4
    assert bench.judge.win_rate(theirs, theirs) == 50
    with pytest.raises(ValueError, match="same prompts"):
        bench.judge.win_rate(ours, theirs[::-1])


# ---------------------------------------------------------------- which runs


def test_every_experiment_is_a_recipe_and_the_baseline_comes_first(bench):
    found = bench.main.experiments(None, ("seed=7",))
    assert found[0].name == bench.main.BASELINE
    assert len({each.name for each in found}) == len(found) == 4 + 2 + 3 * 4
    for each in found:
        overrides = (*each.overrides, *bench.main.EXPORT, *each.watched)
        recipe = recipe_file.load(each.recipe, overrides)
        assert isinstance(recipe, Recipe) and recipe.seed == 7
        if each.name.startswith("sft"):
            epochs = recipe.sft.epochs, recipe.dpo.epochs if recipe.dpo else 0
            assert each.name == "sft{:.0f}-dpo{:.0f}".format(*epochs)
    watched = [each for each in found if each.watched]
    assert [each.name for each in watched] == [bench.main.FIGURE_RUN]
    names = [each.name for each in bench.main.experiments("ablations", ())]
    assert set(names) == {*bench.tables.PAPER, "dsft-ddpo-pure", "ddpo-pure"}
    assert bench.main.experiments("grid", ())[0].name == bench.main.BASELINE


def test_a_toy_run_becomes_a_row_once(bench, tmp_path, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = bench.main.Experiment("dsft", "ablations/tiny-dsft-ddpo", TOY)
    out = tmp_path / "out" / "rows.jsonl"
    row = bench.main.row(run, tmp_path / "runs", out)
    assert row["prompts"] == sum(row["verdicts"].values()) == 240
    assert (row["wins"], row["overrides"]) == (50.0, list(TOY))
    assert 1 <= row["score"] <= 9 and row["sft_eval_loss"] > 0
    assert 0 <= row["logps_accuracy"] <= 1 and row["stage_seconds"].keys() >= {"sft", "dpo"}
    assert [json.loads(line) for line in out.read_text().splitlines()] == [row]

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(bench.main, "train", refuse)
    assert bench.main.row(run, tmp_path / "runs", out) == row
    assert len(out.read_text().splitlines()) == 1
    other = bench.main.Experiment("dsft", "ablations/tiny-dsft-ddpo", (*TOY, "seed=1"))
    with pytest.raises(AssertionError, match="trained again"):
        bench.main.row(other, tmp_path / "runs", out)


# ---------------------------------------------------------------- tables and figure


def metrics(steps: int = 60, every: int = 20) -> list[dict[str, float]]:
    """Lines of a training of three epochs that ends with an evaluation."""
    lines: list[dict[str, float]] = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": 3 * step / steps, "loss": 1.0}
        line["rewards/accuracies"] = min(1.0, 0.5 + step / steps)
        if step % every == 0 and step < steps:
            line["eval_rewards/accuracies"] = 0.75
        lines.append(line)
    return [*lines, {"step": steps, "eval_rewards/accuracies": 0.875}]


def test_the_figure_is_small_svg_with_both_curves(bench):
    text = bench.tables.figure(metrics())
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    circles = root.findall(f"{space}circle")
    assert len(circles) == 3  # two evaluations on the way, and the last
    ends = float(circles[-1].get("cx", "")), float(circles[-1].get("cy", ""))
    assert ends[0] == bench.chart.WIDTH - bench.chart.RIGHT  # three epochs is the right edge
    assert ends[1] < float(circles[0].get("cy", ""))
    curves = [
        p.get("d", "") for p in root.findall(f"{space}path") if "key" not in p.get("class", "")
    ]
    assert max(d.count("L") for d in curves) == 60 - bench.tables.SMOOTHED
    labels = {t.text for t in root.findall(f"{space}text")}
    assert {"epochs of dDPO", "held-out pairs"} <= labels
    assert "path { fill: none }" in text  # else the axes' corner is a black triangle
    assert "prefers-color-scheme: dark" in text and len(text) < 60_000


def test_the_figure_wants_every_step_and_evaluations(bench):
    with pytest.raises(ValueError, match="log_every"):
        bench.tables.figure(metrics()[::2])
    with pytest.raises(ValueError, match="eval_every"):
        bench.tables.figure(metrics(every=100))


def test_a_chart_draws_nothing_outside_its_axes(bench):
    axis = bench.chart.Axis("x & y", [0, 1])
    line = bench.chart.Line("a < b", [(0, 0), (1, 1)])
    text = bench.chart.line_chart("<t>", axis, axis, [line])
    assert ElementTree.fromstring(text).findtext("{http://www.w3.org/2000/svg}title") == "<t>"
    with pytest.raises(ValueError, match=r"the point \(2, 0\) is outside"):
        bench.chart.line_chart("t", axis, axis, [bench.chart.Line("a", [(2, 0)])])
    with pytest.raises(ValueError, match="colours for two"):
        bench.chart.line_chart("t", axis, axis, [line] * 3)


def test_the_docs_show_the_rows(bench):
    """The newest row of each run, as the command prints them, for each seed that was run."""
    seeds: dict[str, dict[str, Any]] = {}
    for row in bench.main.read_lines(bench.main.RESULTS):
        seed = next((o for o in row["overrides"] if o.startswith("seed=")), "")
        seeds.setdefault(seed, {})[row["name"]] = row
    docs = (REPO / "docs/ablations.md").read_text(encoding="utf-8")
    assert len(bench.tables.everything([*seeds[""].values()]).split("\n\n")) == 4
    for named in seeds.values():
        for table in bench.tables.everything([*named.values()]).split("\n\n"):
            assert table and table in docs
    figures = re.findall(r"\(([\w-]+\.svg)\)", docs)
    assert figures
    for name in figures:
        text = (REPO / "docs" / name).read_text(encoding="utf-8")
        ElementTree.fromstring(text)
        assert len(text) < 60_000
