"""`bench` around scripts of the test's own: where they are found, what they get, how they end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from zephyr_lite import __version__, cli
from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.stages import bench

REPORT = """
import json, os, sys
import neighbour
keys = ("PYTHONPATH", "ZEPHYR_LITE_COMMIT", "GIT_CEILING_DIRECTORIES")
seen = {"argv": sys.argv[1:], "cwd": os.getcwd(), **{k: os.environ.get(k) for k in keys}}
print(json.dumps(seen | {"safe_path": sys.flags.safe_path}))
print("progress", file=sys.stderr)
sys.exit(neighbour.CODE)
"""
SLEEPER = """
import pathlib, signal, sys, time
def leave(number, frame):
    pathlib.Path("told").write_text(str(number))
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, leave)
pathlib.Path("ready").touch()
time.sleep(60)
"""
DRIVER = """
import sys
from pathlib import Path
from zephyr_lite import cli
from zephyr_lite.stages import bench
bench.folders = lambda: [Path(sys.argv[1])]
cli.main([], lambda _: sys.exit(bench.run("export")))
"""


@pytest.fixture
def scripts(tmp_path, monkeypatch) -> Path:
    """A checkout's benchmarks with one script that reports what it got; the user stands beside."""
    folder = tmp_path / "checkout" / "benchmarks"
    folder.mkdir(parents=True)
    (folder.parent / "pyproject.toml").touch()
    for script in {subject.file for subject in bench.SUBJECTS.values()}:
        (folder / script).write_text(REPORT)
    (folder / "neighbour.py").write_text("CODE = 0")
    monkeypatch.setattr(bench, "folders", lambda: [folder])
    monkeypatch.setattr(bench, "_has_gpu", lambda: False)
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.chdir(user)
    return folder


def test_scripts_of_a_checkout_lie_beside_the_package(root):
    assert bench.folders() == [root / "benchmarks"]
    needed = {script.file for script in bench.SUBJECTS.values()}
    assert [name for name in needed if not (root / "benchmarks" / name).is_file()] == []


def test_installed_scripts_lie_in_the_share_folder(tmp_path, monkeypatch):
    package = tmp_path / "lib" / "site-packages"
    monkeypatch.setattr(bench, "__file__", str(package / "zephyr_lite/stages/bench.py"))
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    (package / "benchmarks").mkdir(parents=True)  # somebody else's
    (package / "benchmarks" / "race.py").touch()
    assert bench.folders() == []
    with pytest.raises(MachineError, match="there is no race"):
        bench.command_of("sft", [])
    share = tmp_path / "share/zephyr-lite/benchmarks"
    share.mkdir(parents=True)
    (share / "race.py").touch()
    assert bench.folders() == [share]
    assert bench.command_of("sft", [])[1] == str(share / "race.py")


def test_an_installed_copy_names_its_release_and_no_repository_above_it(
    scripts, monkeypatch, capfd
):
    """The environment may lie in the user's own project: its commit is not ours."""
    monkeypatch.delenv("ZEPHYR_LITE_COMMIT", raising=False)
    assert bench.run("export") == 0
    assert json.loads(capfd.readouterr().out)["ZEPHYR_LITE_COMMIT"] is None
    (scripts.parent / "pyproject.toml").unlink()
    assert bench.run("export") == 0
    seen = json.loads(capfd.readouterr().out)
    assert seen["ZEPHYR_LITE_COMMIT"] == f"v{__version__}"
    project = scripts.parent.parent
    subprocess.run(["git", "init", "-q", str(project)], check=True)
    asked = ["git", "-C", str(scripts.parent), "rev-parse", "--git-dir"]
    assert subprocess.run(asked, capture_output=True).returncode == 0
    ceiling = {**os.environ, "GIT_CEILING_DIRECTORIES": seen["GIT_CEILING_DIRECTORIES"]}
    assert subprocess.run(asked, capture_output=True, env=ceiling).returncode != 0


@pytest.mark.parametrize(
    ("subject", "before", "after"),
    [
        ("sft", ["sft"], ["--steps", "3"]),
        ("dpo", ["dpo"], ["--rival-python", "trl=/opt/trl/bin/python"]),
        ("kernels", ["--only", "kernels_correct", "kernels_speed"], ["--minutes", "2"]),
        ("export", [], ["--tokenizer", "."]),
        ("page", [], ["other.jsonl"]),
        ("submit", [], []),
    ],
)
def test_a_script_gets_its_words_the_user_s_and_where_rows_go(
    scripts, capfd, subject, before, after
):
    assert bench.run(subject, after) == 0
    out, err = capfd.readouterr()
    seen = json.loads(out)
    name = {"page": "bench.md", "submit": None}.get(subject, "bench.jsonl")
    where = ["--out", str(Path.cwd() / name)] if name else []
    assert seen["argv"] == [*before, *where, *after]
    assert seen["cwd"] == os.getcwd()
    assert "progress" in err
    assert ("toy sizes" in err) == (subject == "kernels")


def test_rows_go_where_the_user_says(scripts, capfd):
    assert bench.run("sft", out=Path("rows/mine.jsonl")) == 0
    argv = json.loads(capfd.readouterr().out)["argv"]
    assert argv == ["sft", "--out", str(Path.cwd() / "rows/mine.jsonl")]


def test_scripts_import_each_other_and_the_user_s_path_stays(scripts, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # Python then leaves the script's folder out
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert bench.run("export") == 0
    seen = json.loads(capfd.readouterr().out)
    assert seen["safe_path"]
    assert seen["PYTHONPATH"] == os.pathsep.join([str(scripts), "/somewhere"])


@pytest.mark.parametrize(
    ("code", "expected"), [("0", 0), ("7", 7), ("130", 130), ("None", 0), ("'words'", 1)]
)
def test_the_exit_code_is_the_script_s(scripts, code, expected):
    (scripts / "neighbour.py").write_text(f"CODE = {code}")
    assert bench.run("export") == expected


def test_a_script_that_a_signal_ended(scripts):
    (scripts / "export_cost.py").write_text("import os; os.kill(os.getpid(), 9)")
    assert bench.run("export") == 128 + 9


def test_an_unknown_subject_is_refused_with_the_nearest(scripts):
    with pytest.raises(RecipeError, match="must be one of sft, dpo") as error:
        bench.run("kernel")
    assert (error.value.exit_code, error.value.hint) == (2, "did you mean kernels?")
    with pytest.raises(RecipeError, match="writes no file"):
        bench.run("submit", out=Path("x"))


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGINT, True), (signal.SIGTERM, False)])
def test_a_signal_stops_the_script_first(tmp_path, number, to_all):
    """Ctrl-C reaches the whole group, `kill` this process alone: the script is told either way."""
    (tmp_path / "export_cost.py").write_text(SLEEPER)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    child = subprocess.Popen(
        command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and child.poll() is None
            time.sleep(0.02)
        (os.killpg if to_all else os.kill)(child.pid, number)
        _, err = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 128 + number
    assert (tmp_path / "told").read_text() == str(int(number))
    assert err.splitlines() == ["stopped: stopped", "hint: rows that were written are kept"]


def test_help_stays_light(root):
    code = "import zephyr_lite.stages.bench, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pydantic", "yaml"} & set(done.stdout.split())
    assert callable(cli.main)


def test_the_wheel_ships_the_scripts_and_no_results(root, tmp_path):
    pytest.importorskip("hatchling", reason="the build backend is not installed here")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        parts = [name.partition("/data/share/zephyr-lite/") for name in archive.namelist()]
    shipped = {inside for _, is_shared, inside in parts if is_shared}
    scripts = {f.relative_to(root).as_posix() for f in (root / "benchmarks").rglob("*.py")}
    assert scripts <= shipped
    assert {script.file for script in bench.SUBJECTS.values()} <= {Path(x).name for x in shipped}
    assert {"benchmarks/rivals/trl.txt", "benchmarks/lengths/pairs.json"} <= shipped
    assert "recipes/zephyr-7b.yaml" in shipped
    assert not [name for name in shipped if "results" in name or "pycache" in name]
