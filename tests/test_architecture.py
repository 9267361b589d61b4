"""The house keeps its shape: who may import whom, what is never called, how long a file may be.

Each rule is a function from source text to violations, tried first on sources that break it.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# From the roof down; a unit may import what stands on a lower storey, and itself.
STOREYS = (
    ("cli",),
    ("session",),
    ("stages",),
    ("evaluate", "report", "export", "tiny"),
    ("train",),
    ("plan",),
    ("model",),
    ("data",),
    ("recipe", "recipe_file", "recipe_schema", "run", "storage", "stopping", "errors"),
)
LEVEL = {unit: level for level, units in enumerate(reversed(STOREYS)) for unit in units}
GROUND = 0  # its units may import errors, and these each other
ON_GROUND = {
    "recipe_file": {"recipe"},
    "recipe_schema": {"recipe"},
    "run": {"recipe", "storage", "stopping"},
}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
PICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    "torch": {"load", "jit", "hub"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load"},
    "os": {"system", "popen"},
}
FORBIDDEN_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 450, 60, 120


# ---------------------------------------------------------------- the rules


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, at any depth; relative ones are resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                above = parts[: len(parts) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def upward_imports(unit: str, source: str, package: str = "zephyr_lite") -> list[str]:
    """Imports by `unit` of a unit that stands on its own storey or above."""
    found = []
    for line, module in imported_modules(source, package):
        parts = module.split(".")
        if parts[0] != "zephyr_lite" or len(parts) < 2 or parts[1] in (unit, "__version__"):
            continue
        other = parts[1]
        if other not in LEVEL:
            found.append(f"{line}: {other} stands on no storey")
        elif LEVEL[unit] == LEVEL[other] == GROUND:
            if other not in {"errors"} | ON_GROUND.get(unit, set()):
                found.append(f"{line}: {unit} -> {other}")
        elif LEVEL[unit] <= LEVEL[other]:
            found.append(f"{line}: {unit} -> {other}")
    return found


def kernel_imports(unit: str, source: str) -> list[str]:
    """Imports of zephyr_kernels by anything but `model`."""
    return [
        f"{line}: {unit} -> {module}"
        for line, module in imported_modules(source, "zephyr_lite")
        if module.split(".")[0] == "zephyr_kernels" and unit != "model"
    ]


def foreign_imports(source: str) -> list[str]:
    """Imports by zephyr_kernels of anything but itself, torch, triton and the standard library."""
    allowed = {"zephyr_kernels", "torch", "triton"} | sys.stdlib_module_names
    return [
        f"{line}: {module}"
        for line, module in imported_modules(source, "zephyr_kernels")
        if module.split(".")[0] not in allowed
    ]


def forbidden_uses(source: str) -> list[str]:
    """Everything that could execute what was downloaded, or run a shell."""
    tree = ast.parse(source)
    found = [
        f"{line}: {module}"
        for line, module in imported_modules(source, "zephyr_lite")
        if module.split(".")[0] in PICKLES
        or module.partition(".")[2] in FORBIDDEN_ATTRIBUTES.get(module.partition(".")[0], ())
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in FORBIDDEN_CALLS:
                found.append(f"{node.lineno}: {node.func.id}(")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in FORBIDDEN_ATTRIBUTES.get(node.value.id, ()):
                found.append(f"{node.lineno}: {node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg in FORBIDDEN_KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{node.lineno}: {node.arg}=")
        elif isinstance(node, ast.Constant) and node.value == "trust_remote_code":
            found.append(f"{node.lineno}: 'trust_remote_code'")
    return found


def long_parts(source: str, function_lines: int = FUNCTION_LINES) -> list[str]:
    """The file when it is too long, and every function that is."""
    found = []
    length = len(source.splitlines())
    if length > FILE_LINES:
        found.append(f"{length} lines")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            is_kernel = any("triton" in ast.unparse(d) for d in node.decorator_list)
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > (KERNEL_LINES if is_kernel else function_lines):
                found.append(f"{node.lineno}: {node.name} has {length} lines")
    return found


# ---------------------------------------------------------------- each rule can fail


def test_upward_import_is_seen():
    up = "def f():\n    from zephyr_lite.train.loop import Job\n"
    assert upward_imports("data", up) == ["2: data -> train"]
    assert upward_imports("stages", up) == []
    assert upward_imports("export", "import zephyr_lite.tiny.base") == ["1: export -> tiny"]
    assert upward_imports("data", "from ..model import base", "zephyr_lite.data") == [
        "1: data -> model"
    ]
    assert upward_imports("train", "from zephyr_lite import stages") == ["1: train -> stages"]
    assert upward_imports("storage", "from zephyr_lite.run import Run") == ["1: storage -> run"]
    assert upward_imports("cli", "import zephyr_lite.attic") == ["1: attic stands on no storey"]
    assert upward_imports("cli", "from zephyr_lite import __version__") == []


def test_kernel_imports_are_seen():
    source = "from zephyr_kernels.norm import rms_norm"
    assert kernel_imports("train", source) == ["1: train -> zephyr_kernels.norm.rms_norm"]
    assert kernel_imports("model", source) == []
    assert foreign_imports("import transformers\nimport math\nimport triton.language as tl") == [
        "1: transformers"
    ]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from torch import load",
        "import torch\ntorch.load('x')",
        "eval('1')",
        "exec(code)",
        "subprocess.run(line, shell=True)",
        "f(trust_remote_code=flag)",
        "options['trust_remote_code'] = True",
        "import yaml\nyaml.load(text, yaml.Loader)",
        "import os\nos.system('ls')",
        "numpy.load(f, allow_pickle=True)",
    ],
)
def test_forbidden_use_is_seen(source):
    assert forbidden_uses(source)


def test_harmless_lookalikes_pass():
    assert forbidden_uses("model.eval()\nre.compile('x')\nrun(x, shell=False)\njson.load(f)") == []


def test_length_is_seen():
    body = "    x = 1\n" * 60
    assert long_parts("def f():\n" + body) == ["1: f has 61 lines"]
    assert long_parts("@triton.jit\ndef f():\n" + body) == []
    assert long_parts("x = 1\n" * 451) == ["451 lines"]


# ---------------------------------------------------------------- the house


def _sources(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.rglob("*.py") if "__pycache__" not in p.parts)
    assert found, f"no source under {folder}"
    return found


def _unit(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return parts[0]


def _complaints(files: list[Path], root: Path, rule) -> list[str]:
    return [
        f"{path.relative_to(root)}:{complaint}"
        for path in files
        for complaint in rule(path, path.read_text(encoding="utf-8"))
    ]


def test_imports_go_downward(root):
    package = root / "zephyr_lite"

    def rule(path: Path, source: str) -> list[str]:
        unit = _unit(path, package)
        if unit == "__init__":
            return [str(m) for m in imported_modules(source, "zephyr_lite")]
        inside = ".".join(("zephyr_lite", *path.relative_to(package).parts[:-1]))
        return upward_imports(unit, source, inside) + kernel_imports(unit, source)

    files = _sources(package)
    assert {_unit(f, package) for f in files} - {"__init__"} <= LEVEL.keys()
    assert _complaints(files, root, rule) == []


def test_kernels_know_torch_triton_and_python_only(root):
    files = _sources(root / "kernels" / "zephyr_kernels")
    assert _complaints(files, root, lambda _, source: foreign_imports(source)) == []


def test_nothing_that_was_downloaded_is_executed(root):
    files = _sources(root / "zephyr_lite") + _sources(root / "kernels")
    assert _complaints(files, root, lambda _, source: forbidden_uses(source)) == []


def test_files_and_functions_fit_the_eye(root):
    packages = _sources(root / "zephyr_lite") + _sources(root / "kernels")
    assert _complaints(packages, root, lambda _, source: long_parts(source)) == []
    around = _sources(root / "tests") + _sources(root / "benchmarks")
    assert _complaints(around, root, lambda _, source: long_parts(source, KERNEL_LINES)) == []


def test_no_module_has_a_name_that_says_nothing(root):
    files = [f for part in ("zephyr_lite", "kernels", "tests") for f in _sources(root / part)]
    vague = [f for f in files if {f.stem, f.parent.name} & VAGUE_NAMES]
    assert vague == []


def test_nothing_of_ours_is_importable_as_kernels(root):
    """transformers probes the import name `kernels` and would execute what it finds."""
    assert not (root / "kernels" / "__init__.py").exists()
    assert {p.name for p in (root / "kernels").iterdir()} <= {"zephyr_kernels", "README.md"}
    for part in ("tests", "benchmarks"):
        assert not [p for p in (root / part).rglob("kernels*") if p.stem == "kernels"]
    assert not list((root / "tests").rglob("__init__.py"))
    code = (
        "from transformers.utils import is_kernels_available\n"
        "import sys\n"
        "module = sys.modules.get('kernels')\n"
        "print(is_kernels_available(), getattr(module, '__file__', None))\n"
    )
    here, elsewhere = _python(code, root), _python(code, Path("/"))
    assert here.split()[0] == elsewhere.split()[0], "our folder is taken for Hugging Face's package"
    assert str(root / "kernels") not in here


def test_the_command_line_imports_nothing_heavy(root):
    code = "import zephyr_lite.cli, sys\nprint(*sys.modules)"
    loaded = set(_python(code, root).split())
    heavy = {"torch", "transformers", "datasets", "peft", "numpy", "pydantic", "yaml", "rich"}
    assert "zephyr_lite.cli" in loaded
    assert loaded & heavy == set()


def test_nothing_names_this_machine(root):
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: cannot tell the repository's files from others")
    places = {root, root.parent / "shared", Path.home()} - {Path("/")}
    found = []
    for name in listed.stdout.splitlines():
        path = root / name
        if not path.is_file() or path.stat().st_size > 1 << 20:
            continue
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{name}: {place}" for place in places if f"{place}/" in text]
    assert found == []


def _python(code: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout
