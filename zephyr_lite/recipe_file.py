"""Recipe files: where they lie, how YAML is read, and errors that name the file and the line."""

from __future__ import annotations

import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from zephyr_lite.errors import RecipeError
from zephyr_lite.recipe import Recipe

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `5e-6` as a string; everybody who writes it means a number."""


_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*)(?:\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def folders() -> list[Path]:
    """Where built-in recipes lie: beside the package first, else in the installed share folder."""
    here = Path(__file__).resolve().parent.parent / "recipes"
    return [f for f in (here, Path(sys.prefix) / "share/zephyr-lite/recipes") if f.is_dir()]


def built_in() -> dict[str, Path]:
    """Name -> file of every built-in recipe."""
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.rglob("*.yaml")):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def find(name: str | Path) -> Path:
    """The file of a recipe given by name or path."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist", hint="zephyr-lite recipes")
        return path
    names = built_in()
    if str(name) not in names:
        near = difflib.get_close_matches(str(name), names, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"built-in: {', '.join(names) or 'none'}"
        raise RecipeError(f"there is no recipe named {name!r}", hint=hint)
    return names[str(name)]


def load(name: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a built-in recipe or a file and apply `a.b=c` overrides.

    Raises: RecipeError with file, line, the key and the nearest right name.
    """
    file = find(name)
    tree, node = _read(file)
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, file, node) from None


def parse(text: str) -> Any:
    """One YAML value, with `5e-6` a number."""
    return yaml.load(text, _Loader)


def _read(file: Path) -> tuple[dict[str, Any], yaml.Node]:
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{file}: larger than {MAX_BYTES} bytes; this is not a recipe")
    try:
        text = file.read_text(encoding="utf-8")
        if re.search(
            r"(?m)(^|[\s:\[,-])[&*][A-Za-z0-9_]+", re.sub(r"#.*|'[^']*'|\"[^\"]*\"", "", text)
        ):
            raise RecipeError(f"{file}: YAML anchors and aliases are not accepted in a recipe")
        tree, node = parse(text), yaml.compose(text, _Loader)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{file}:{line}: not YAML: {error.problem}") from None
    if not isinstance(tree, dict) or node is None:
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values")
    return tree, node


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(
            f"--set {override}: not of the form a.b=value", hint="--set dpo.beta=0.05"
        )
    *parents, leaf = key.strip().split(".")
    for name in parents:
        child = tree.get(name)
        if isinstance(child, str) and name == "base":
            child = {"model": child}
        tree[name] = child if isinstance(child, dict) else {}
        tree = tree[name]
    try:
        tree[leaf] = parse(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: value is not YAML ({error})") from None


def _explain(error: ValidationError, file: Path, node: yaml.Node) -> RecipeError:
    """The first validation error as one line a person can act on."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    dotted = ".".join(loc) or "recipe"
    line = _line(node, loc)
    place = f"{file}:{line}" if line else f"{file} (with --set)"
    if first["type"] == "extra_forbidden":
        known = _names(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, 1, 0.4)
        hint = f"did you mean {'.'.join([*loc[:-1], near[0]])}?" if near else f"known: {known}"
        return RecipeError(f"{place}: unknown key {dotted}", hint=hint)
    if first["type"] == "missing":
        return RecipeError(f"{place}: key {dotted} is missing")
    message = first["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(first["input"], (dict, list)) else f" (got {first['input']!r})"
    return RecipeError(f"{place}: {dotted}: {message}{seen}")


def _line(node: yaml.Node, loc: list[str]) -> int | None:
    """1-based line of the deepest node along `loc`; None when the key is not in the file."""
    line = node.start_mark.line + 1
    for depth, part in enumerate(loc):
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                return line if depth == len(loc) - 1 and len(loc) > 1 else None
        elif isinstance(node, yaml.SequenceNode) and part.isdigit():
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line


def _names(path: list[str]) -> list[str]:
    """Field names of the section at `path`."""
    section: Any = Recipe
    for part in path:
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else _section_of(field.annotation)
    return list(getattr(section, "model_fields", {}))


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _section_of(inner):
            return found
    return None
