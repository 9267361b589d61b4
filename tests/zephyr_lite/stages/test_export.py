"""The export stage: several files of one pass, what stops it, and what the same command then does.

The micro recipe is trained once; every test exports a copy of its run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("ZEPHYR_LITE_EXPORT_KILLS", "8"))
CHAIN = 4  # kills before the run is let through to its end
TWO = ("--quant", "q4_k_m", "--quant", "q8_0")
Export = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, so that the base is built once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def trained(command: Any, micro: str, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the micro recipe up to dDPO."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    status, text = command.run("dpo", micro, "--run", str(folder), home=home)
    assert status == 0, text
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, of this test's own."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def export(command: Any, micro: str, home: Path, run: Path) -> Export:
    """`export("--quant", "q8_0")`: exit code and output of an export of `run`."""

    def call(*words: str, folder: Path = run, **options: Any) -> tuple[int, str]:
        status, text = command.run(
            "export", micro, "--run", str(folder), *words, home=home, **options
        )
        assert "Traceback" not in text
        return status, text

    return call


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-9] ^= 0x10
    path.write_bytes(content)


def journalled(folder: Path) -> int:
    """Lines of all journals of files in the making."""
    total = 0
    for journal in folder.glob("*.part.jsonl"):
        total += journal.read_bytes().count(b"\n")
    return total


# ---------------------------------------------------------------- several files of one pass

EVERYTHING = (*TWO, "--merged", "--w4a16", "--lora-gguf")


def test_one_pass_writes_every_file_and_says_what_it_is(export, run):
    status, text = export(*EVERYTHING)
    assert status == 0, text
    folder = run / "export"
    report, found = report_of(folder), hashes(folder)
    assert [f["quant"] for f in report["files"]] == ["q4_k_m", "q8_0", "lora"]
    assert [f["folder"] for f in report["folders"]] == ["merged", "w4a16"]
    listed = {f["file"]: f["sha256"] for f in report["files"]}
    for entry in report["folders"]:
        listed |= {f"{entry['folder']}/{n}": f["sha256"] for n, f in entry["files"].items()}
    assert listed.items() <= found.items()
    card = (folder / "README.md").read_text()
    assert all(name in card and sha256 in card for name, sha256 in listed.items())
    assert all(f["verify"]["passed"] for f in report["files"][:2])
    assert not list(folder.rglob("*.part*"))

    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, text = export(*EVERYTHING)
    assert (status, text) == (0, ""), "there is nothing to do"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps


@pytest.mark.parametrize("name", ["micro-Q8_0.gguf", "micro-lora.gguf", "merged/model.safetensors"])
def test_what_is_damaged_or_gone_is_made_again(export, run, name):
    words = ("--quant", "q8_0", "--merged", "--lora-gguf", "--no-verify")
    assert export(*words)[0] == 0
    found = hashes(run / "export")
    spoil(run / "export" / name)
    assert export(*words)[0] == 0
    assert hashes(run / "export") == found
    (run / "export" / name).unlink()
    assert export(*words)[0] == 0
    assert hashes(run / "export") == found


def test_the_sft_models_files_leave_the_others_alone(export, run):
    assert export("--quant", "q8_0")[0] == 0
    before, of_sft = hashes(run / "export"), hashes(run / "sft")
    status, text = export("--quant", "q8_0", "--stage", "sft")
    assert status == 0, text
    after = hashes(run / "export")
    assert hashes(run / "sft") == of_sft, "the stage's own report is not the export's"
    assert before.items() <= after.items()
    names = ("micro-Q8_0.gguf", "Modelfile", "README.md", "report.json")
    assert after.keys() - before.keys() == {f"sft/{name}" for name in names}
    assert after["sft/micro-Q8_0.gguf"] != before["micro-Q8_0.gguf"]
    assert report_of(run / "export" / "sft")["stage"] == "sft"
    assert "dpo adapter" not in (run / "export" / "sft" / "README.md").read_text()
    for words in (("--quant", "q8_0", "--stage", "sft"), ("--quant", "q8_0")):
        assert export(*words) == (0, ""), "each of them is done"


# ---------------------------------------------------------------- a file that is not the model


@pytest.fixture(scope="module")
def spiky(
    command: Any, micro: str, home: Path, spiky_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """dSFT on a base whose NF4 values are far from its own, and the words that name it."""
    folder = tmp_path_factory.mktemp("spiky") / "run"
    sets = [f"base.model={spiky_base}", "base.build=null", "dpo=null", "data.feedback=null"]
    sets += ["sft.max_steps=2", "export.quants=[f32]"]
    words = [part for value in sets for part in ("--set", value)]
    status, text = command.run("sft", micro, "--run", str(folder), *words, home=home)
    assert status == 0, text
    return folder, words


def test_a_failed_gate_keeps_the_part_and_what_was_there(export, spiky, tmp_path):
    folder = Path(shutil.copytree(spiky[0], tmp_path / "spiky"))
    made, words = folder / "export", spiky[1]
    assert export(*words, folder=folder)[0] == 0
    before = hashes(made)
    original = (*words, "--base-weights", "original")
    status, text = export(*original, folder=folder)
    assert status == 7
    assert "error: micro-F32.gguf is not the trained model: mean KL" in text
    report = report_of(made)
    assert report["failed"]["failures"]
    assert report["files"] == []
    after = hashes(made)
    for name in ("micro-F32.gguf", "README.md", "Modelfile"):
        assert after[name] == before[name], "what an earlier export left"
    assert (made / "micro-F32.gguf.part").exists()
    assert export(*original, folder=folder)[0] == 7, "it stays what it is"

    status, text = export(*original, "--no-verify", folder=folder)
    assert status == 0, text
    assert "failed" not in report_of(made)
    assert "not compared with the trained model" in (made / "README.md").read_text()
    assert export(*words, folder=folder)[0] == 0
    assert hashes(made) == before


# ---------------------------------------------------------------- stopped


def test_killed_exports_end_in_the_same_bytes(export, run, trained, tmp_path):
    assert export(*TWO)[0] == 0
    truth, lines, chance = hashes(run / "export"), 2 * (1 + 21), random.Random(5)
    kills, places, folder = 0, set(), tmp_path / "killed"
    made = folder / "export"
    while kills < KILLS:
        shutil.copytree(trained, folder)
        for enough in sorted(chance.randrange(2, lines + 8) for _ in range(CHAIN)):
            status, text = export(
                *TWO,
                folder=folder,
                kill_when=lambda enough=enough: journalled(made) >= min(enough, lines),
                kill_after=0.0 if enough < lines else chance.uniform(0.0, 0.9),
            )
            assert status in (0, -signal.SIGKILL), text
            kills += status != 0
            places.add("writing" if journalled(made) < lines else "comparing")
        assert export(*TWO, folder=folder)[0] == 0
        assert hashes(folder / "export") == truth, f"after {kills} kills"
        shutil.rmtree(folder)
    assert places == {"writing", "comparing"}


def test_a_kill_keeps_what_was_written_for_another_choice_of_files(export, run):
    made = run / "export"
    full = 1 + 21
    options = {"kill_when": lambda: journalled(made) >= full, "kill_after": 0.1}
    status, _ = export("--quant", "q8_0", **options)
    assert status == -signal.SIGKILL
    journal, seen = made / "micro-Q8_0.gguf.part.jsonl", [full]

    def watch() -> bool:
        with suppress(FileNotFoundError):
            seen.append(journal.read_bytes().count(b"\n"))
        return False

    assert export(*TWO, kill_when=watch)[0] == 0
    assert len(seen) > 10
    assert min(seen) == full, "no tensor was written again"


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("enough", [10, 44], ids=["writing", "comparing"])
def test_a_signal_stops_and_the_same_command_goes_on(export, run, sig, code, enough):
    made = run / "export"
    status, text = export(*TWO, kill_when=lambda: journalled(made) >= enough, sig=sig)
    assert status == code, text
    assert "same command again" in text
    assert not (made / "report.json").exists(), "nothing is said of files that are not there"
    status, text = export(*TWO)
    assert status == 0, text
    assert all(f["verify"]["passed"] for f in report_of(made)["files"])


# ---------------------------------------------------------------- without a comparison


def test_without_llama_cpp_weights_are_read_back_and_that_is_said(export, run):
    status, text = export(*TWO, without=["xllamacpp"])
    assert status == 0, text
    assert "weights are read back and compared; token ids" in text
    report = report_of(run / "export")
    assert all(f["verify"]["passed"] for f in report["files"])
    assert all("weights read back, at most" in f["summary"] for f in report["files"])
    assert "weights read back" in (run / "export" / "README.md").read_text()


def test_no_verify_says_so(export, run, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "One?", "accept": "one"}) + "\n")
    words = ("--quant", "q8_0", "--no-verify", "--set", f"export.questions={questions}")
    status, text = export(*words)
    assert status == 0, text
    assert "not verified" in text
    assert "questions are not asked: export.verify is off" in text
    assert "verify" not in report_of(run / "export")["files"][0]
    inode = (run / "export" / "micro-Q8_0.gguf").stat().st_ino
    status, text = export("--quant", "q8_0")
    assert status == 0, text
    assert report_of(run / "export")["files"][0]["verify"]["passed"]
    assert (run / "export" / "micro-Q8_0.gguf").stat().st_ino != inode


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quant", "q9_9"), ("q9_9", "q4_k_m")),
        (("--base-weights", "nonsense"), ("nonsense", "nf4", "original")),
        (("--stage", "base"), ("--stage base", "dpo, sft")),
        (("--merged", "--set", "export.merged_dtype=nf4"), ("merged 4-bit", "removes most of")),
    ],
    ids=["quant", "base weights", "stage", "bnb merged"],
)
def test_a_wrong_choice_names_the_right_ones(export, run, words, said):
    status, text = export(*words)
    assert status == 2, text
    assert all(part in text for part in said), text
    assert not (run / "export").exists()


def test_a_bnb_merged_model_is_refused_before_anything_is_trained(command, micro, home, tmp_path):
    words = ("run", micro, "--fresh", "--run", str(tmp_path / "run"))
    status, text = command.run(*words, "--set", "export.merged_dtype=nf4", home=home)
    assert status == 2
    assert "merged 4-bit" in text
    assert not (tmp_path / "run" / "aif").exists()


# ---------------------------------------------------------------- Ollama


def test_ollama_is_given_the_finished_export(export, run, tmp_path):
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nls "$PWD" > {tmp_path}/seen\necho "made: $*"\n')
    program.chmod(0o755)
    words = ("--quant", "q8_0", "--ollama")
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    for _ in range(2):  # the second time there is nothing else to do
        status, text = export(*words, env=path)
        assert status == 0, text
        assert "made: create micro -f Modelfile" in text
    assert {"micro-Q8_0.gguf", "Modelfile"} <= set((tmp_path / "seen").read_text().split())


def test_without_ollama_the_export_is_kept(export, run, tmp_path):
    words = ("--quant", "q8_0")
    status, text = export(*words, "--ollama", env={"PATH": str(tmp_path)})
    assert status == 3
    assert "Ollama is not installed" in text
    assert "hint: install it" in text
    assert report_of(run / "export")["files"][0]["verify"]["passed"]
    assert export(*words) == (0, "")
