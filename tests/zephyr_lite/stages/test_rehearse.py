"""A rehearsal goes through every stage, leaves nothing behind, and keeps what failed."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from zephyr_lite import recipe_file
from zephyr_lite.recipe import Recipe
from zephyr_lite.stages import rehearse

FOLDER = re.compile(r"each stage in (\S+) ")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One cache, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


def _rehearse(command, micro, home, folder, *options, **kill):
    status, text = command.run(
        "run", micro, "--run", str(folder), "--rehearse", *options, home=home, **kill
    )
    scratch = FOLDER.search(text)
    return status, text, Path(scratch[1]) if scratch else None


def test_every_stage_is_rehearsed_and_nothing_is_left(command, micro, home, tmp_path):
    real = tmp_path / "runs" / "real run"
    status, text, scratch = _rehearse(command, micro, home, real, "--set", "dpo.beta=0.3")
    assert status == 0, text
    lines = text.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("stage "))) + 1 :]
    stages = ["base", "aif", "sft", "reference", "dpo", "export", "chat"]
    assert [line.split()[0] for line in table[: len(stages)]] == stages
    assert all(re.search(r"\d+\.\d+ +\d+\.\d GiB", line) for line in table[: len(stages)])
    assert "sft: 20/20" in text and "dpo: 20/20" in text
    assert ": KL " in text and "chat: Hello!" in text
    assert lines[-2] == "every stage works on this machine; start the run:"
    assert lines[-1] == f"  zephyr-lite run {micro} --run '{real}' --set dpo.beta=0.3 --device cpu"
    assert max(map(len, table[: len(stages)])) <= 80
    assert scratch is not None and not scratch.exists()
    assert not real.parent.exists()
    # Log-probs under an adapter that was thrown away are of no use to anyone.
    assert list((home / "reference").iterdir()) == []

    # What was projected, and what the run then does.
    projected = {
        line.split()[0]: int(match[1])
        for line in table
        if (match := re.search(r"\((\d+) steps of", line))
    }
    assert command.run("dpo", micro, "--run", str(real), home=home)[0] == 0
    manifest = json.loads((real / "manifest.json").read_text())
    for stage in ("sft", "dpo"):
        steps = manifest["stages"][stage]["figures"]["steps"]
        assert projected[stage] == pytest.approx(steps, rel=0.35), stage


def test_a_fault_is_reported_and_its_folder_is_kept(command, micro, home, tmp_path):
    fault = ("--set", "export.verify_tokens=100000")
    status, text, scratch = _rehearse(command, micro, home, tmp_path / "real", *fault)
    assert status == 2
    assert "error: none of" in text and "hint: lower export.verify_tokens" in text
    assert f"the rehearsal failed; what it wrote is kept in {scratch}" in text
    assert "works on this machine" not in text and "Traceback" not in text
    assert scratch is not None and (scratch / "run" / "export" / "micro-Q8_0.gguf.part").exists()
    shutil.rmtree(scratch)
    assert not (tmp_path / "real").exists()


def test_a_stopped_rehearsal_leaves_nothing(command, micro, home, tmp_path):
    for delay in (1.0, 2.0, 4.0, 6.0):  # a busy machine may need longer to begin
        status, text, scratch = _rehearse(
            command, micro, home, tmp_path / "real", kill_after=delay, sig=signal.SIGINT
        )
        if scratch is not None:
            break
    assert status == 130, text
    assert "rehearsal stopped; nothing of it is kept" in text
    assert scratch is not None and not scratch.exists()


# ---------------------------------------------------------------- the recipe that is rehearsed


def _rows(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("name", recipe_file.built_in())
def test_what_is_cut_is_little_and_as_long_as_it_gets(name, tmp_path):
    whole = recipe_file.load(name)
    recipe = rehearse.cut(whole, tmp_path)
    assert recipe.base == whole.base and recipe.memory == whole.memory
    for stage, ours in ((recipe.sft, whole.sft), (recipe.dpo, whole.dpo)):
        if stage and ours:
            assert stage.max_steps == min(20, ours.max_steps or 20)
            assert stage.batch_size == ours.batch_size and stage.lora == ours.lora
    for split in (recipe.data.dialogues, recipe.data.feedback):
        for source in (*split.train[:-1], *split.eval) if split else ():
            assert source.limit is not None
    if recipe.dpo and recipe.data.feedback:
        pairs = _rows(recipe.data.feedback.train[-1].path)
        assert all(len(text.split()) * 2 >= recipe.dpo.max_length for text in pairs[0].values())
        assert len({pair["chosen"] for pair in pairs}) == len(pairs) > 1
    if recipe.sft and recipe.data.dialogues:
        rows = _rows(recipe.data.dialogues.train[-1].path)
        answers = [row["messages"][1]["content"] for row in rows]
        assert all(len(answer.split()) * 2 >= recipe.sft.max_length for answer in answers)


def test_a_limit_that_is_smaller_already_stays_and_sources_share(tmp_path):
    sources = [{"path": "a.jsonl", "limit": 3, "weight": 0.5}, {"path": "b.jsonl"}]
    tree = {"name": "x", "base": "m", "sft": {"batch_size": 40, "max_steps": 5}}
    data = {"dialogues": {"train": sources, "holdout": 0.1}}
    recipe = rehearse.cut(Recipe.model_validate(tree | {"data": data}), tmp_path)
    assert recipe.sft is not None and recipe.sft.max_steps == 5
    assert recipe.data.dialogues is not None
    first, second, own = recipe.data.dialogues.train
    assert (first.limit, first.weight, second.limit, own.limit) == (3, 0.5, 400, None)
    assert recipe.data.dialogues.holdout == 0.1


def test_counting_gives_up_rather_than_take_long(tmp_path, monkeypatch):
    rows = tmp_path / "d.jsonl"
    rows.write_text('{"messages": []}\n' * 2500)
    tree = {"name": "x", "base": "m", "data": {"dialogues": {"train": str(rows)}}}
    recipe = Recipe.model_validate(tree)
    assert rehearse.count_rows(recipe) == {"sft": [2500]}
    monkeypatch.setattr(rehearse, "COUNT_SECONDS", 0.0)
    assert rehearse.count_rows(recipe) == {"sft": None}
