"""The Modelfile says in Go what the training template says in Jinja, and Ollama is handed it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from zephyr_lite.data.chat import render
from zephyr_lite.errors import MachineError, RecipeError, StorageError
from zephyr_lite.export.ollama import TEMPLATE, create, modelfile


def evaluate(messages: list[dict[str, str]]) -> str:
    """Run TEMPLATE's few constructs by hand; the same cases were run through Go's text/template."""
    head, rest = TEMPLATE.split("{{ end }}\n{{- range .Messages }}")
    body, tail = rest.split("{{ end }}")
    condition = '{{- if ne (index .Messages 0).Role "system" }}'
    assert head.startswith(condition)
    first = head.removeprefix(condition) if messages[0]["role"] != "system" else ""
    turns = (
        body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    )
    return first + "".join(turns) + tail


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "Hi")],
        [("system", "Be kind"), ("user", " Hi ")],
        [("user", "a"), ("assistant", "b\n"), ("user", "\nc")],
    ],
)
def test_the_template_is_the_training_template(messages: list[tuple[str, str]]) -> None:
    dialogue = [{"role": role, "content": content} for role, content in messages]
    assert evaluate(dialogue) == render(dialogue, True)


def test_the_modelfile() -> None:
    text = modelfile("zephyr-Q8_0.gguf", 2048)
    assert text.startswith("FROM ./zephyr-Q8_0.gguf\n")
    assert f'TEMPLATE """{TEMPLATE}"""\n' in text
    for stop in ("</s>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert f'PARAMETER stop "{stop}"\n' in text
    assert text.endswith("PARAMETER num_ctx 2048\n")


@pytest.mark.parametrize("name", ["../x.gguf", "a b.gguf", "x\nADAPTER /etc/passwd", "", "-x"])
def test_names_that_say_more_than_a_name_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="plain file name"):
        modelfile(name, 2048)
    with pytest.raises(RecipeError, match="num_ctx"):
        modelfile("x.gguf", 0)


def test_another_end_token() -> None:
    """A base whose turns end with another token than Mistral's."""
    text = modelfile("x.gguf", 64, eos="<|im_end|>")
    assert "</s>" not in text
    assert text.count("<|im_end|>") == 3
    assert 'PARAMETER stop "<|im_end|>"\n' in text


def test_a_foreign_template_is_not_passed_off_as_zephyrs() -> None:
    text = modelfile("x.gguf", 64, chat_template="{{ messages }}", eos="<eos>")
    assert "\nTEMPLATE" not in text
    assert "will guess" in text
    assert re.findall('stop "(.*)"', text) == ["<eos>"]
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line.split()[0] for line in commands] == ["FROM", "PARAMETER", "PARAMETER"]


@pytest.mark.parametrize("eos", ['"', "", "a b", '</s>"""\nADAPTER x', "{{ .System }}"])
def test_end_tokens_that_would_end_the_quotes_are_refused(eos: str) -> None:
    with pytest.raises(RecipeError, match="end token"):
        modelfile("x.gguf", 64, eos=eos)


# ---------------------------------------------------------------- ollama create


@pytest.fixture
def export_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "Modelfile").write_text(modelfile("x.gguf", 64))
    return folder


@pytest.fixture
def install_ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`install_ollama(script)` puts an executable called ollama on PATH, before all others."""

    def install(script: str) -> Path:
        place = tmp_path / "bin"
        place.mkdir()
        program = place / "ollama"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
        return program

    return install


def test_create_hands_the_modelfile_over(
    export_folder: Path, install_ollama: Callable[[str], Path]
) -> None:
    install_ollama(
        'printf "%s\\n" "$@" > said\nhead -n 1 "$4" >> said\n'
        'printf "\\033[?25lcopying 50%%\\rcopying 100%%\\n\\nsuccess\\n" >&2'
    )
    printed = create("me/zephyr:q8_0", export_folder)
    said = (export_folder / "said").read_text().splitlines()
    assert said == ["create", "me/zephyr:q8_0", "-f", "Modelfile", "FROM ./x.gguf"]
    assert printed == "copying 50%\ncopying 100%\nsuccess"


def test_a_failure_shows_the_last_lines(
    export_folder: Path, install_ollama: Callable[[str], Path]
) -> None:
    install_ollama("seq 1 50\necho 'Error: could not connect to ollama server' >&2\nexit 3")
    with pytest.raises(MachineError) as caught:
        create("zephyr", export_folder)
    message = str(caught.value)
    assert "exit code 3" in message
    assert message.endswith("48\n49\n50\nError: could not connect to ollama server")
    assert "\n40\n" not in message
    assert "ollama serve" in (caught.value.hint or "")


def test_a_program_that_cannot_be_started(
    export_folder: Path, install_ollama: Callable[[str], Path]
) -> None:
    install_ollama("").write_bytes(b"#!/no/such/shell\n")
    with pytest.raises(MachineError, match="cannot be started"):
        create("zephyr", export_folder)


def test_without_ollama(
    export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineError, match="not installed") as caught:
        create("zephyr", export_folder)
    assert "ollama create zephyr" in (caught.value.hint or "")
    with pytest.raises(StorageError, match="no Modelfile"):
        create("zephyr", tmp_path)


@pytest.mark.parametrize("name", ["-f", "--help", "a b", "", "a/b/c/d", "x:", "../x", "a\nb"])
def test_names_that_are_no_models_are_refused(name: str, export_folder: Path) -> None:
    with pytest.raises(RecipeError, match="model name"):
        create(name, export_folder)
