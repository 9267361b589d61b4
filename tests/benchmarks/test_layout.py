"""The folder `benchmarks/`: what stands on top, what no module is called, what a rival needs.

Workers of rivals run by path in environments of their own, so their folder is where every library
there looks for a module first, and nothing of ours is installed.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIDES = ("side_plain", "side_trl", "side_unsloth")
LIBRARIES = {"datasets", "flash_attn", "kernels", "numpy", "pynvml", "safetensors", "tokenizers"}


def _modules() -> Iterator[Path]:
    return (path for path in BENCHMARKS.rglob("*.py") if path.stem != "__init__")


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth, with the packages around it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found | {name.rpartition(".")[0] for name in found} - {""}


def _file(module: str) -> Path | None:
    """Of a module of ours."""
    path = BENCHMARKS / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def _needs(path: Path) -> set[str]:
    """What a file imports that is not ours, through all that is."""
    seen, ahead, needs = {path}, [path], set()
    while ahead:
        for name in _imports(ahead.pop()):
            file = _file(name)
            if file is None:
                needs.add(name.partition(".")[0])
            elif file not in seen:
                seen.add(file)
                ahead.append(file)
    return needs - {part.partition(".")[0] for part in _folders()}


def _folders() -> set[str]:
    return {path.parent.relative_to(BENCHMARKS).as_posix() for path in _modules()} - {"."}


def test_a_file_on_the_top_is_a_command_and_the_readme_names_it() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for path in BENCHMARKS.glob("*.py"):
        assert '__name__ == "__main__"' in path.read_text(encoding="utf-8"), path.name
        assert path.name in text
        assert not path.with_suffix("").exists(), f"{path.stem} would name a file and a folder"


def test_every_folder_of_modules_says_what_it_is() -> None:
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for folder in _folders():
        assert ast.get_docstring(ast.parse((BENCHMARKS / folder / "__init__.py").read_text()))
        assert f"{folder.rpartition('/')[2]}/ " in text


def test_no_module_hides_a_library() -> None:
    pins = "".join(path.read_text(encoding="utf-8") for path in BENCHMARKS.glob("rivals/*.txt"))
    rivals = {name.replace("-", "_") for name in re.findall(r"^([\w-]+)==", pins, re.MULTILINE)}
    assert {"torch", "trl", "unsloth", "peft"} <= rivals
    taken = rivals | LIBRARIES | sys.stdlib_module_names
    ours = {path.stem for path in _modules()} | {name.rpartition("/")[2] for name in _folders()}
    assert ours & taken == set()


@pytest.mark.parametrize("side", SIDES)
def test_a_rival_s_worker_needs_nothing_of_this_project(side: str) -> None:
    needs = _needs(BENCHMARKS / "races" / f"{side}.py")
    assert {"numpy", "torch"} <= needs
    assert not {name for name in needs if name.startswith("zephyr")}


def test_a_need_of_this_project_is_seen() -> None:
    assert "zephyr_lite" in _needs(BENCHMARKS / "races" / "side_ours.py")
    assert "zephyr_lite" in _needs(BENCHMARKS / "races" / "prepare.py")
