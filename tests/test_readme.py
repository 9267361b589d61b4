"""What the README says is true: its commands exist, its files are there, its figures are rows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from zephyr_lite import recipe_file
from zephyr_lite.cli import app

DOCS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/memory.md")


def _commands(text: str) -> list[list[str]]:
    """Every `zephyr-lite ...` command of the code blocks, as words."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    found = re.findall(r"(?:^|[\s/])zephyr-lite ([a-z].*?)(?=&&|$)", "\n".join(lines), re.MULTILINE)
    return [shlex.split(command, comments=True) for command in found]


@pytest.mark.parametrize("name", DOCS)
def test_every_command_parses(root, name):
    text = (root / name).read_text(encoding="utf-8")
    for words in _commands(text):
        command: Any = typer.main.get_command(app)
        while words and words[0] in getattr(command, "commands", {}):
            command, words = command.commands[words[0]], words[1:]
        command.make_context(command.name, list(words))  # raises for an unknown option or argument


def test_the_readme_has_commands_and_the_two_that_set_everything_up(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    assert len(_commands(text)) >= 8
    assert ".venv/bin/pip install -e '.[llama]' && .venv/bin/zephyr-lite run tiny" in text
    assert ".venv/bin/pip install -e '.[dev,llama]' && .venv/bin/pytest -q" in text


def test_recipes_named_in_the_readme_exist(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    for words in _commands(text):
        if words[0] in ("run", "chat") and not words[1].endswith(".yaml"):
            assert words[1] in recipe_file.built_in()


def test_every_built_in_recipe_is_in_the_readme_s_table(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert recipe_file.built_in().keys() <= named


def test_a_recipe_in_the_readme_is_one(root, tmp_path):
    text = (root / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        file = tmp_path / "recipe.yaml"
        file.write_text(block, encoding="utf-8")
        recipe_file.load(file)


@pytest.mark.parametrize("name", DOCS)
def test_links_and_named_files_exist(root, name):
    document = root / name
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (document.parent / target).exists(), target
    for target in re.findall(
        r"`((?:zephyr_lite|benchmarks|docs|recipes|tests|kernels)/[\w./-]+)`", text
    ):
        assert Path(root / target).exists(), target
