"""The run folder: one writer, refusals that say what changed, and times that add up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zephyr_lite import recipe_file
from zephyr_lite.errors import LockedError, RecipeError, StorageError
from zephyr_lite.recipe import Recipe
from zephyr_lite.run import Run, default_folder
from zephyr_lite.storage import seal_digest, sealed_folder

HOLD = """
import sys, time
from pathlib import Path
from zephyr_lite.recipe import Recipe
from zephyr_lite.run import Run
with Run(Recipe(name="x", base="m"), Path(sys.argv[1])) as run:
    print("held", flush=True)
    time.sleep(60)
"""


def _recipe(**changes) -> Recipe:
    tree = {
        "name": "x",
        "base": "some/model",
        "data": {"dialogues": {"train": "d.jsonl"}},
        "sft": {"epochs": 2},
    }
    return Recipe.model_validate(tree | changes)


def _inputs(run: Run) -> dict:
    return {"recipe": run.fields("seed", "sft"), "data": {"d.jsonl": "aaaa"}}


@pytest.fixture
def holder(tmp_path):
    """A process that holds the run folder `tmp_path / "run"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


# ---------------------------------------------------------------- the lock


def test_the_second_process_is_refused_by_name_until_the_first_is_killed(tmp_path, holder):
    folder = tmp_path / "run"
    with (
        pytest.raises(LockedError, match=f"pid {holder.pid} since 20") as caught,
        Run(_recipe(), folder),
    ):
        pass
    assert caught.value.exit_code == 6
    assert "--run DIR" in caught.value.hint
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with Run(_recipe(), folder) as run:  # at once: the kernel freed it
        assert f"pid {os.getpid()} " in run.path(".lock").read_text()


def test_a_refused_process_touches_nothing(tmp_path, holder):
    part = tmp_path / "run" / ".manifest.json.1.part"
    part.write_text("the other process is writing this")
    with pytest.raises(LockedError), Run(_recipe(), tmp_path / "run"):
        pass
    assert part.exists()


def test_of_five_starts_at_once_one_wins(tmp_path):
    for _ in range(10):
        (go, start), (results, tell), (end, finish) = os.pipe(), os.pipe(), os.pipe()
        pids = []
        for _ in range(5):
            pid = os.fork()
            if pid == 0:
                os.close(start)
                os.close(finish)
                os.read(go, 1)  # returns when the parent closes the other end
                _try_to_hold(tmp_path / "run", tell, end)
                os._exit(0)
            pids.append(pid)
        os.close(start)
        said = b""
        while len(said) < 5:
            said += os.read(results, 5)
        os.close(finish)
        for pid in pids:
            os.waitpid(pid, 0)
        for descriptor in (go, results, tell, end):
            os.close(descriptor)
        assert bytes(sorted(said)) == b"06666"


def _try_to_hold(folder: Path, tell: int, end: int) -> None:
    try:
        with Run(_recipe(), folder):
            os.write(tell, b"0")
            os.read(end, 1)
    except LockedError as error:
        os.write(tell, str(error.exit_code).encode())
    except BaseException:
        os.write(tell, b"1")


def test_a_failed_start_frees_the_lock(tmp_path):
    (tmp_path / "manifest.json").write_text("{")
    for _ in range(2):  # the second time it must not be "in use by another"
        with pytest.raises(StorageError, match=r"manifest\.json"), Run(_recipe(), tmp_path):
            pass
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(StorageError, match="damaged"), Run(_recipe(), tmp_path):
        pass


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_place_that_is_no_folder_is_an_io_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="no run folder can be kept here") as caught:
        Run(_recipe(), tmp_path / place).__enter__()
    assert "--run DIR" in caught.value.hint


def test_a_folder_that_may_not_be_written_is_an_io_error(tmp_path, monkeypatch):
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root may write everywhere: chmod is no test
    with pytest.raises(StorageError, match="Permission denied"), Run(_recipe(), tmp_path):
        pass


# ---------------------------------------------------------------- fingerprints


def test_the_same_inputs_are_done_once(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        assert not run.is_done("sft", _inputs(run))
        run.begin("sft", _inputs(run))
        assert not run.is_done("sft", _inputs(run))
        run.finish("sft", seconds=1, adapter="hash")
    with Run(_recipe(), tmp_path) as run:
        assert run.is_done("sft", _inputs(run))
        assert run.output("sft", "adapter") == "hash"


def test_other_inputs_are_refused_with_what_changed(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.finish("sft", seconds=1)
    before = _files(tmp_path)
    changed = _recipe(sft={"epochs": 3, "lora": {"r": 8}})
    with Run(changed, tmp_path) as run, pytest.raises(RecipeError) as caught:
        run.is_done("sft", _inputs(run) | {"data": {"d.jsonl": "bbbb"}})
    assert str(caught.value).splitlines()[1:] == [
        '  data: d.jsonl: "aaaa" -> "bbbb"',
        "  recipe: sft.epochs: 2.0 -> 3.0",
        "  recipe: sft.lora.r: 16 -> 8",
    ]
    assert "--run NEW" in caught.value.hint
    assert _files(tmp_path) == before  # a refused command leaves no trace in recipe and manifest


def test_what_only_changes_how_it_runs_is_accepted(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.finish("sft", seconds=1)
    how = {"epochs": 2, "log_every": 9, "checkpoint_minutes": 1, "eval_every": 3}
    changed = _recipe(sft=how, memory={"tokens_per_micro_batch": 99, "checkpointing": "full"})
    with Run(changed, tmp_path) as run:
        assert run.is_done("sft", _inputs(run))
    with Run(_recipe(seed=1), tmp_path) as run, pytest.raises(RecipeError, match="seed: 42 -> 1"):
        run.is_done("sft", _inputs(run))


def test_a_begun_stage_with_a_checkpoint_binds(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.path("sft", "checkpoints", "step-0000001").mkdir(parents=True)
    with Run(_recipe(sft={"epochs": 3}), tmp_path) as run, pytest.raises(RecipeError):
        run.is_done("sft", _inputs(run))


def test_a_begun_stage_without_a_checkpoint_binds_nobody(tmp_path):
    """Who repairs the row that stopped the run must not be told to start another run."""
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.add_seconds("sft", 5)
        run.path("sft").mkdir()
        run.path("sft", "parent.json").write_text('{"eval_loss": 1}')
    with Run(_recipe(sft={"epochs": 3}), tmp_path) as run:
        assert not run.is_done("sft", _inputs(run))
        run.begin("sft", _inputs(run))
        # Figures over the old inputs would be taken for figures over the new ones.
        assert not run.path("sft", "parent.json").exists()
        run.finish("sft", seconds=1)
        assert run.output("sft", "seconds") == 1
        assert run.is_done("sft", _inputs(run))


def test_a_resumed_stage_keeps_its_figures(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.path("sft").mkdir()
        run.path("sft", "parent.json").write_text("{}")
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        assert run.path("sft", "parent.json").exists()


def test_a_stage_that_binds_nobody_is_done_again(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("export", {"a": 1})
        run.finish("export", seconds=1)
        assert run.is_done("export", {"a": 1}, binding=False)
        assert not run.is_done("export", {"a": 2}, binding=False)
        with pytest.raises(RecipeError, match="a: 1 -> 2"):
            run.is_done("export", {"a": 2})


def test_a_run_that_only_looks_takes_no_lock_and_writes_nothing(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", {"a": 1})
        before = (tmp_path / "manifest.json").read_bytes()
        with Run(_recipe(), tmp_path, writes=False) as looker:
            looker.record(base="another")
            assert looker.manifest["stages"]["sft"]["inputs"] == {"a": 1}
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_long_and_missing_values_in_a_diff_stay_short(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", {"data": "x" * 500, "gone": 1} | {f"k{i}": 0 for i in range(50)})
        run.finish("sft", seconds=0)
        with pytest.raises(RecipeError) as caught:
            run.is_done("sft", {"data": "y" * 500, "new": 2} | {f"k{i}": 1 for i in range(50)})
    lines = str(caught.value).splitlines()
    assert len(lines) <= 22
    assert max(map(len, lines[1:])) < 140
    assert "  gone: 1 -> null" in lines


# ---------------------------------------------------------------- the manifest


def test_seconds_add_up_over_stops(tmp_path):
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        started = run.output("sft", "started")
        run.add_seconds("sft", 1.25)
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.add_seconds("sft", 2.5)
    with Run(_recipe(), tmp_path) as run:
        run.begin("sft", _inputs(run))
        run.finish("sft", seconds=4)
        assert run.output("sft", "seconds") == 7.75
        assert run.output("sft", "started") == started


def test_the_saved_recipe_is_the_resolved_one_and_loads(tmp_path):
    recipe = _recipe(description="naïve & 中文", sft={"learning_rate": 5e-6})
    with Run(recipe, tmp_path) as run:
        run.begin("sft", _inputs(run))
    assert recipe_file.load(tmp_path / "recipe.yaml") == recipe
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["recipe"] == yaml.safe_load((tmp_path / "recipe.yaml").read_text())


def test_leavings_of_a_killed_writer_are_swept_in_every_stage(tmp_path):
    places = ["", "sft", "aif", "reference", "dpo", "export"]
    for place in places:
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / ".report.json.77.part").write_text("{")
    (tmp_path / "sft" / ".adapter.abc.old").mkdir()
    with Run(_recipe(), tmp_path) as run:
        assert list(tmp_path.rglob("*.part")) == []
        assert run.path("sft", "adapter").is_dir()


def test_names_cannot_leave_the_runs_folder():
    assert default_folder(_recipe()) == Path("runs/x")
    for name in ("../x", "a/b", ".hidden", "", "x" * 97):
        with pytest.raises(ValueError, match="name"):
            _recipe(name=name)


def _files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.*") if p.name != ".lock"}


# ---------------------------------------------------------------- stages of runs beside this one


def _lend(folder: Path, **changes) -> Path:
    """A run that finished dSFT; its adapter is one sealed file."""
    with Run(_recipe(), folder) as run:
        run.begin("sft", _inputs(run))
        with sealed_folder(run.path("sft", "adapter")) as part:
            (part / "weights").write_text("trained")
        run.path("sft", "metrics.jsonl").write_text("{}\n")
        run.finish("sft", seconds=3, adapter=seal_digest(run.path("sft", "adapter")))
        run.manifest["stages"]["sft"] |= changes
        run.record()
    return folder


def _take(folder: Path, stage: str = "sft", **options) -> tuple[bool, list[str]]:
    """Whether a new run finds the stage done, and what it said."""
    said: list[str] = []
    with Run(_recipe(), folder, reuse=True, note=said.append, **options) as run:
        return run.is_done(stage, _inputs(run)), said


def test_a_finished_stage_beside_is_taken_over_once(tmp_path):
    lender = _lend(tmp_path / "a")
    assert _take(tmp_path / "b") == (True, [f"sft: taken from {lender} (same inputs)"])
    assert _take(tmp_path / "b") == (True, [])
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["stages"]["sft"]["linked_from"] == str(lender)
    assert manifest["stages"]["sft"]["seconds"] == 3
    assert recipe_file.load(tmp_path / "b" / "recipe.yaml") == _recipe()
    assert (tmp_path / "b" / "sft" / "metrics.jsonl").stat().st_nlink == 2


def test_a_run_that_is_still_at_work_lends_what_it_finished(tmp_path):
    """Two cards, two runs of a sweep: the second need not wait for the first one's dDPO."""
    with Run(_recipe(), _lend(tmp_path / "a")) as other:
        other.begin("dpo", {"beta": 1})
        assert _take(tmp_path / "b")[0] is True


@pytest.mark.parametrize(
    "changes",
    [
        {"finished": None},
        {"fingerprint": "other"},
        {"zephyr_lite": "0.0.0"},
        {"adapter": "not the hash of the adapter"},
    ],
    ids=["unfinished", "other inputs", "other version", "other adapter"],
)
def test_what_is_not_the_same_is_not_taken(tmp_path, changes):
    _lend(tmp_path / "a", **changes)
    assert _take(tmp_path / "b")[0] is False
    assert not (tmp_path / "b" / "sft").exists()


def test_a_run_is_no_parent_of_itself_and_looks_only_when_told(tmp_path):
    _lend(tmp_path / "a")
    assert _take(tmp_path / "b", writes=False)[0] is False
    with Run(_recipe(), tmp_path / "c") as run:
        assert not run.is_done("sft", _inputs(run))
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert _take(tmp_path / "b")[0] is True
    (tmp_path / "b" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "a")
    assert _take(tmp_path / "b")[0] is False


def test_faulty_manifests_beside_lend_nothing(tmp_path):
    for name, text in (("a", "{"), ("b", "[]"), ("c", '{"stages": {"sft": 3}}'), ("d", "null")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    assert _take(tmp_path / "e") == (False, [])


def test_the_second_best_parent_serves_when_the_first_is_damaged(tmp_path):
    (_lend(tmp_path / "a") / "sft" / "adapter" / "weights").write_text("damaged")
    _lend(tmp_path / "b")
    done, said = _take(tmp_path / "c")
    assert done
    assert "not taken from" in said[0] and str(tmp_path / "a") in said[0]
    assert said[1] == f"sft: taken from {tmp_path / 'b'} (same inputs)"


def test_a_file_system_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    _lend(tmp_path / "a")
    monkeypatch.setattr(os, "link", refuse)
    assert _take(tmp_path / "b")[0] is True
    assert (tmp_path / "b" / "sft" / "adapter" / "weights").read_text() == "trained"
    assert (tmp_path / "b" / "sft" / "metrics.jsonl").stat().st_nlink == 1


def test_killed_while_taking_over_the_next_start_begins_again(tmp_path, monkeypatch):
    """Between the links and the manifest: the folder stands, and nothing vouches for it."""
    _lend(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", lambda *_, **__: os._exit(9))
        pid = os.fork()
        if pid == 0:
            _take(tmp_path / "b")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert (tmp_path / "b" / "sft" / "adapter").is_dir()
    (tmp_path / "b" / ".sft.abc.part").mkdir()  # and one that was killed earlier
    assert _take(tmp_path / "b")[0] is True
    assert list((tmp_path / "b").glob(".sft*")) == []


def test_a_stage_begun_here_with_work_is_not_replaced(tmp_path):
    _lend(tmp_path / "a")
    with Run(_recipe(), tmp_path / "b", reuse=True) as run:
        run.begin("sft", _inputs(run))
        run.path("sft", "checkpoints", "step-0000001").mkdir(parents=True)
        assert not run.is_done("sft", _inputs(run))
        assert run.path("sft", "checkpoints", "step-0000001").exists()
