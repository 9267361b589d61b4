"""The command line as a new user meets it: help, hints, exit codes, and never a traceback."""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from zephyr_lite import __version__, recipe_file
from zephyr_lite.cli import main
from zephyr_lite.recipe import Recipe
from zephyr_lite.recipe.training import SMALL_BYTES

DIALOGUES = [
    {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": "ok"}]}
    for i in range(6)
]
PAIRS = [{"prompt": f"Say {i}.", "chosen": "yes", "rejected": "no way"} for i in range(6)]

SMALL = """
name: small
base: {model: BASE, quantization: none}
data:
  dialogues: {train: d.jsonl}
  feedback: {train: p.jsonl}
sft:
  max_length: 128
  max_steps: 1
  batch_size: 2
  optimizer: adamw
  lora: {r: 2}
dpo: {max_length: 128, max_prompt_length: 64, max_steps: 1, batch_size: 2, optimizer: adamw}
memory: {tokens_per_micro_batch: 256}
export: {quants: [f32], verify_prompts: 1, verify_tokens: 4}
"""


@pytest.fixture(autouse=True)
def _calm(monkeypatch, tmp_path):
    """Commands work in their own folder, at 80 columns, and leave no variable behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.delenv("ZEPHYR_LITE_DEBUG", raising=False)


@pytest.fixture
def zl(capfd):
    """`zl("run", "tiny")` -> (exit code, stdout, stderr), in this process."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(list(arguments))
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def recipe(tmp_path, tiny_mistral) -> str:
    """A recipe file over hand-written rows that trains for a step in a blink."""
    _write_rows(tmp_path / "d.jsonl", DIALOGUES)
    _write_rows(tmp_path / "p.jsonl", PAIRS)
    (tmp_path / "small.yaml").write_text(SMALL.replace("BASE", str(tiny_mistral)))
    return "small.yaml"


def _write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ---------------------------------------------------------------- help


def test_help_is_quick(root):
    """<= 0.4 s of processor, median of three; the wall is not ours on a busy machine."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "zephyr_lite.cli", "--help"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert "export" in done.stdout
    assert statistics.median(seconds) <= 0.4, seconds


COMMANDS = ("run", "sft", "aif", "ref", "dpo", "export", "chat", "recipes", "version")


def test_help_lists_every_command_in_whole_sentences(zl):
    status, out, err = zl("--help")
    assert (status, err) == (0, "")
    assert zl("-h") == (status, out, err)
    listed = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ")}
    for command in COMMANDS:
        assert command in listed
        assert not listed[command].endswith("..."), f"cut at 80 columns: {listed[command]}"
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", [*COMMANDS, "recipes show", "recipes copy", "recipes schema"])
def test_every_command_has_help(zl, command):
    status, out, _ = zl(*command.split(), "--help")
    assert status == 0
    assert f"{command} [" in out or command == "version" or command == "recipes schema"
    assert max(map(len, out.splitlines())) <= 80


def test_every_option_is_explained(zl):
    for command in ("run", "sft", "aif", "ref", "dpo", "export", "chat"):
        out = zl(command, "--help")[1]
        options = [line for line in out.splitlines() if line.startswith("  -")]
        assert len(options) >= 5
        assert all(len(line.split("  ")) > 2 for line in options), options


def test_no_arguments_shows_help_and_is_a_usage_error(zl):
    status, out, err = zl()
    assert status == 2
    assert "Usage: " in out + err and "Commands:" in out + err


def test_version(zl):
    assert zl("--version") == (0, f"{__version__}\n", "")
    assert zl("version") == (0, f"{__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("fly",),
        ("run", "--nope"),
        ("run", "a", "b"),
        ("-x",),
        ("chat", "--temperature", "-1"),
        ("chat", "--max-tokens", "0"),
    ],
)
def test_usage_errors_exit_2(zl, arguments):
    status, out, err = zl(*arguments)
    assert (status, out) == (2, "")
    assert "help" in err


# ---------------------------------------------------------------- recipes


def test_recipes_are_listed(zl):
    status, out, _ = zl("recipes")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(recipe_file.built_in())
    assert all(len(line.split()) > 3 for line in out.splitlines())


def test_show_prints_the_file_and_resolved_every_value(zl):
    status, out, _ = zl("recipes", "show", "zephyr-7b")
    assert status == 0
    assert out == recipe_file.find("zephyr-7b").read_text()
    status, out, _ = zl("recipes", "show", "zephyr-7b", "--resolved", "--set", "dpo.beta=0.05")
    shown = Recipe.model_validate(yaml.safe_load(out))
    assert shown == recipe_file.load("zephyr-7b", ("dpo.beta=0.05",))


def test_copy_writes_once_and_where_it_is_told(zl, tmp_path):
    status, out, _ = zl("recipes", "copy", "zephyr-7b")
    assert status == 0 and "zephyr-lite run zephyr-7b.yaml" in out
    original = recipe_file.find("zephyr-7b").read_bytes()
    assert (tmp_path / "zephyr-7b.yaml").read_bytes() == original
    (tmp_path / "zephyr-7b.yaml").write_text("mine")
    status, _, err = zl("recipes", "copy", "zephyr-7b")
    assert status == 2 and "exists already" in err and "hint: " in err
    assert (tmp_path / "zephyr-7b.yaml").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    assert zl("recipes", "copy", "zephyr-7b", "folder")[0] == 0
    assert (tmp_path / "folder" / "zephyr-7b.yaml").read_bytes() == original
    status, _, err = zl("recipes", "copy", "zephyr-7b", "absent/x.yaml")
    assert status == 5 and "absent/x.yaml: cannot be written" in err


def test_schema_is_json(zl):
    status, out, _ = zl("recipes", "schema")
    assert status == 0
    assert json.loads(out)["title"] == "zephyr-lite recipe"


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("run", "zephyr-7c"), "no recipe named 'zephyr-7c'", "did you mean zephyr-7b?"),
        (("run", "none.yaml"), "recipe file none.yaml does not exist", "zephyr-lite recipes"),
        (("recipes", "show", "qq"), "no recipe named 'qq'", "built-in: "),
        (("run", "--set", "dpo.bta=1"), "--set dpo.bta=1: unknown key", "did you mean dpo.beta?"),
        (("run", "--set", "dpo.beta"), "--set dpo.beta: not of the form", "--set dpo.beta=0.05"),
        (("run", "--device", "tpu"), "--device tpu: must be one of auto, cuda, cpu", None),
        (("export", "--stage", "base"), "--stage base: must be one of dpo, sft", None),
        (("chat", "--stage", "x"), "--stage x: must be one of dpo, sft, base", None),
        (("export",), "runs/zephyr-7b does not exist", "zephyr-lite run zephyr-7b"),
        (("chat", "-p", "hi"), "runs/zephyr-7b does not exist", "zephyr-lite run zephyr-7b"),
        (("sft", "--set", "sft=null"), "zephyr-7b has no section sft", None),
        (("run", "--set", "sft=null", "--set", "dpo=null"), "no section sft or dpo", None),
        (("aif", "--set", "data.feedback=null", "--set", "dpo=null"), "data.feedback", None),
    ],
)
def test_a_mistake_exits_2_with_what_and_how(zl, tmp_path, arguments, message, hint):
    status, out, err = zl(*arguments)
    assert (status, out) == (2, "")
    lines = err.splitlines()
    assert lines[0].startswith("error: ") and message in lines[0]
    if hint:
        assert lines[1].startswith("hint: ") and hint in lines[1]
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run folder"


def test_a_wrong_key_names_file_and_line(zl, recipe, tmp_path):
    text = Path(recipe).read_text().replace("  max_length: 128\n", "  max_lenght: 128\n", 1)
    Path(recipe).write_text(text)
    line = text.splitlines().index("  max_lenght: 128") + 1
    status, _, err = zl("run", recipe)
    assert status == 2
    assert err.splitlines() == [
        f"error: small.yaml:{line}: unknown key sft.max_lenght",
        "hint: did you mean sft.max_length?",
    ]


def test_no_gpu_exits_3_and_names_what_runs(zl, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = zl("run")
    assert (status, out) == (3, "")
    assert "hint: zephyr-lite run tiny" in err
    status, _, err = zl("run", "--device", "cuda")
    assert status == 3 and "no CUDA GPU" in err
    status, _, err = zl("run", "--rehearse")  # it looks at the run folder only, and trains
    assert status == 3 and "hint: zephyr-lite run tiny" in err


def test_a_large_local_model_needs_a_gpu_too(zl, monkeypatch, recipe, tmp_path):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "large").mkdir()
    with (tmp_path / "large" / "model.safetensors").open("wb") as file:
        file.truncate(SMALL_BYTES + 1)  # a hole: no disk is used
    status, _, err = zl("sft", recipe, "--set", "base=large")
    assert status == 3 and "full-size model" in err


@pytest.mark.parametrize(
    ("stage", "file", "row", "where"),
    [
        ("sft", "d.jsonl", '{"messages": [{"role": "user"', "d.jsonl:7: the last row is cut off"),
        ("sft", "d.jsonl", '{"messages": 3}\n', "d.jsonl:7: "),
        (
            "sft",
            "d.jsonl",
            '{"messages": [{"role": "user", "content": "secret"}, '
            '{"role": "assistant", "content": " "}]}\n',
            "d.jsonl:7: empty_answer",
        ),
        ("aif", "p.jsonl", '{"prompt": "secret", "chosen": "a"}\n', "p.jsonl:7: "),
        (
            "aif",
            "p.jsonl",
            '{"prompt": "secret", "chosen": "a", "rejected": ""}\n',
            "p.jsonl:7: ",
        ),
        (
            "aif",
            "p.jsonl",
            '{"prompt": "secret", "chosen": "a", "rejected": "a"}\n',
            "p.jsonl:7: ",
        ),
    ],
    ids=["cut", "no list", "empty answer", "no rejected", "empty rejected", "equal"],
)
def test_a_bad_row_exits_2_with_file_and_line_and_can_be_repaired(
    zl, recipe, tmp_path, stage, file, row, where
):
    whole = (tmp_path / file).read_text()
    (tmp_path / file).write_text(whole + row)
    status, out, err = zl(stage, recipe)
    assert (status, out) == (2, "")
    assert err.splitlines()[0].startswith(f"error: {where}")
    assert "secret" not in err, "row contents do not belong into logs"
    (tmp_path / file).write_text(whole)
    status, _, err = zl(stage, recipe)  # the same command, now that the row is gone
    assert status == 0, err


def test_a_missing_data_file_exits_2(zl, recipe, tmp_path):
    (tmp_path / "d.jsonl").unlink()
    status, _, err = zl("run", recipe)
    assert status == 2
    assert "error: d.jsonl: no such file" in err.splitlines()
    assert "Traceback" not in err


def test_places_that_cannot_hold_a_run_exit_5(zl, recipe, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    status, _, err = zl("sft", recipe)
    assert status == 5 and "hint: " in err and "--run DIR" in err
    status, _, err = zl("sft", recipe, "--run", "/proc/nowhere")
    assert status == 5 and "/proc/nowhere" in err


def test_export_and_chat_before_training(zl, recipe):
    assert zl("aif", recipe)[0] == 0  # the run folder is there, no adapter is
    for arguments in (("export", recipe), ("chat", recipe, "-p", "hi")):
        status, _, err = zl(*arguments)
        assert status == 2
        assert "small" in err and "train" in err and "hint: " in err


# ---------------------------------------------------------------- a run


def test_a_whole_run_speaks_json_on_stdout_only(zl, recipe, tmp_path):
    status, out, err = zl("run", recipe, "--json")
    assert status == 0, err
    assert err == ""
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["event"] for event in events} == {"start", "step", "note", "end"}
    assert [e["label"] for e in events if e["event"] == "start"][:3] == ["sft", "reference", "dpo"]
    losses = [e["loss"] for e in events if "loss" in e]
    assert len(losses) == 2 and all(isinstance(loss, float) for loss in losses)
    assert "zephyr-lite chat small.yaml" in events[-1]["text"]
    manifest = json.loads((tmp_path / "runs" / "small" / "manifest.json").read_text())
    assert all(stage["finished"] for stage in manifest["stages"].values())

    status, out, err = zl("run", recipe, "--quiet")  # everything is done: nothing is computed
    assert (status, out) == (0, "")
    assert err.startswith("done in 0.0 min") and len(err.splitlines()) == 1

    before = (tmp_path / "runs" / "small" / "recipe.yaml").read_bytes()
    status, _, err = zl("run", recipe, "--set", "sft.learning_rate=1e-9")
    assert status == 2 and "sft.learning_rate: 0.0002 -> 1e-09" in err and "--run NEW" in err
    assert (tmp_path / "runs" / "small" / "recipe.yaml").read_bytes() == before


def test_a_second_run_takes_over_what_is_unchanged_unless_told_not_to(zl, recipe, tmp_path):
    assert zl("run", recipe, "--quiet")[0] == 0
    again = ("dpo", recipe, "--quiet", "--set", "dpo.beta=0.2", "--run")
    status, _, err = zl(*again, "runs/second")
    assert status == 0
    assert err.splitlines() == [
        "aif: taken from runs/small (same inputs)",
        "sft: taken from runs/small (same inputs)",
    ]
    status, _, err = zl(*again, "runs/third", "--fresh")
    assert status == 0 and "taken from" not in err
    weights = Path("sft") / "adapter" / "adapter_model.safetensors"
    first, second, third = (tmp_path / "runs" / n / weights for n in ("small", "second", "third"))
    assert second.samefile(first)
    assert not third.samefile(first) and third.read_bytes() == first.read_bytes()


def test_a_rehearsal_speaks_json_on_stdout_only(zl, recipe, tmp_path):
    status, out, err = zl("run", recipe, "--rehearse", "--json")
    assert (status, err) == (0, ""), err
    events = [json.loads(line) for line in out.splitlines()]
    assert {event["event"] for event in events} == {"start", "step", "note", "end"}
    assert events[-1]["text"] == "  zephyr-lite run small.yaml"
    assert not (tmp_path / "runs").exists()


def test_people_read_stderr_and_the_hint_keeps_the_folder(zl, recipe):
    status, out, err = zl("run", recipe, "--run", "elsewhere", "--set", "dpo=null")
    assert (status, out) == (0, "")
    assert "sft: 1/1 loss" in err
    assert "talk to it: zephyr-lite chat small.yaml --run elsewhere" in err


def test_offline_opens_no_connection(zl, recipe, monkeypatch):
    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"connected to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    status, _, err = zl("sft", recipe, "--offline", "--quiet")
    assert status == 0, err
    assert os.environ["HF_HUB_OFFLINE"] == "1"
