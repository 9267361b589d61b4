"""Recipe files: where they lie, how YAML is read, and errors that name the file and the line.

`extends: NAME | FILE` lays a file over another one. What is laid over each other are YAML's nodes,
not values, because a node knows the file and the line it stands in.
"""

from __future__ import annotations

import copy
import difflib
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from zephyr_lite.errors import RecipeError, StorageError
from zephyr_lite.recipe import SHORT_FORMS, Recipe

MAX_BYTES = 1 << 20
PLAIN_TEXT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:merge")
NULL = "tag:yaml.org,2002:null"
OWN_KEYS = ("name", "description")  # a file's own: whoever extends it is another recipe


class _Loader(yaml.SafeLoader):
    """YAML without what a recipe is better off without.

    Refused: anchors and aliases, a key given twice (PyYAML takes the last one). Plain text: dates
    and merge keys. A number: `5e-6`, which is text in YAML 1.1; everybody who writes it means one.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """PyYAML's, without anchors and aliases."""
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            problem = "anchors (&) and aliases (*) are not accepted"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """PyYAML's, without keys given twice."""
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in lines:
                problem = f"the key {name!r:.60} stands twice, first in line {lines[name]}"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in PLAIN_TEXT]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def folders() -> list[Path]:
    """Where built-in recipes lie: in this checkout, else in the installed share folder.

    Beside an installed package a folder called `recipes` would be somebody else's.
    """
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file():
        return [checkout / "recipes"]
    return [f for f in (Path(sys.prefix) / "share/zephyr-lite/recipes",) if f.is_dir()]


def built_in() -> dict[str, Path]:
    """Name -> file of every built-in recipe, those of subfolders last."""
    found: dict[str, Path] = {}
    for folder in folders():
        for file in sorted(folder.rglob("*.yaml"), key=lambda f: (len(f.parts), f.with_suffix(""))):
            found.setdefault(file.relative_to(folder).with_suffix("").as_posix(), file)
    return found


def find(name: str | Path) -> Path:
    """The file of a recipe given by name or path; a built-in name wins over a file or folder."""
    names, path = built_in(), Path(name)
    if str(name) in names:
        return names[str(name)]
    if path.is_file():
        return path
    if path.suffix in (".yaml", ".yml"):
        what = "is not a file" if path.exists() else "does not exist"
        raise RecipeError(
            f"recipe file {path} {what}", hint="zephyr-lite recipes lists built-in ones"
        )
    near = difflib.get_close_matches(str(name), names, 1, 0.5)
    hint = f"did you mean {near[0]}?" if near else f"built-in: {', '.join(names) or 'none'}"
    raise RecipeError(f"there is no recipe named {str(name)!r}", hint=hint)


def load(name: str | Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a built-in recipe or a file, with what it extends, and apply `a.b=c` overrides.

    Raises: RecipeError with file and line (or the `--set` at fault), the key and the nearest right
        name; StorageError when the file cannot be read.
    """
    node = _extended(find(name))
    tree = _value(node)
    try:
        return Recipe.model_validate(_overridden(tree, overrides))
    except ValidationError as error:
        first = _ranked(error)[0]
    if _key(first) not in map(_key, _faults(tree)):
        raise _explain(first, _culprits(first, tree, overrides))
    raise _explain(first, _place(node, _loc(first)))


def parse(text: str) -> Any:
    """One YAML value, with `5e-6` a number. Raises: yaml.YAMLError, ValueError, RecursionError."""
    return _parse(text)[0]


def _parse(text: str, file: Path | None = None) -> tuple[Any, yaml.Node | None]:
    """A value, and the nodes that know its lines, and its file where there is one."""
    loader = _Loader(text)
    loader.name = str(file)
    try:
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    finally:
        loader.dispose()


def _value(node: yaml.Node) -> Any:
    """What nodes stand for. They were all read before, so nothing can be wrong with them."""
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _read(file: Path) -> tuple[dict[str, Any], yaml.MappingNode]:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{file}: larger than {MAX_BYTES} bytes; this is not a recipe")
        text = file.read_text(encoding="utf-8-sig")
        tree, node = _parse(text, file)
    except OSError as error:
        raise StorageError(f"{file}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        twice = "stands twice" in str(error.problem)
        hint = None if twice else "indent with spaces; put text with special signs in quotes"
        raise RecipeError(f"{file}:{line}: not YAML: {error.problem}", hint=hint) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not YAML: {_reason(error)}") from None
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values")
    return tree, node


def _extended(file: Path, children: tuple[Path, ...] = ()) -> yaml.MappingNode:
    """A file's nodes over those of the file that it extends, and so on up.

    Args:
        children: the files that have led here, the first one first.
    """
    tree, node = _read(file)
    if "extends" not in tree:
        return node
    where = _place(node, ["extends"])
    parent, line = _parent(file, tree["extends"], where), (*children, file)
    if parent.resolve() in [child.resolve() for child in line]:
        ring = " > ".join(str(each) for each in (*line, parent))
        raise RecipeError(f"{where}: extends: these recipes extend each other: {ring}")
    inherited, own = _extended(parent, line), _without(node, "extends")
    return _over(own, _without(inherited, *OWN_KEYS))


def _parent(file: Path, name: Any, where: str) -> Path:
    """The file behind `extends`: a built-in name, else a path seen from the file's own folder."""
    if not isinstance(name, str):
        hint = "a recipe extends one other: its built-in name, or its file"
        raise RecipeError(f"{where}: extends: must be a name (got {name!r:.60})", hint=hint)
    try:
        return find(name if name in built_in() else file.parent / Path(name).expanduser())
    except RecipeError:
        near = difflib.get_close_matches(name, built_in(), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"built-in: {', '.join(built_in())}"
        message = (
            f"{where}: extends: {name!r:.80} is no built-in recipe and no file beside this one"
        )
        raise RecipeError(message, hint=hint) from None


def _without(node: yaml.MappingNode, *names: str) -> yaml.MappingNode:
    """A mapping without some of its keys."""
    pairs = [(key, value) for key, value in node.value if key.value not in names]
    return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)


def _over(child: yaml.MappingNode, parent: yaml.MappingNode) -> yaml.MappingNode:
    """One mapping laid over another.

    Sections are merged key by key, everything else replaces; `null` takes out what the parent says.
    """
    merged = {key.value: (key, value) for key, value in parent.value}
    for key, value in child.value:
        below = merged.pop(key.value, (key, None))[1]
        if isinstance(value, yaml.MappingNode):
            below = _section(key.value, below)
        if isinstance(value, yaml.MappingNode) and isinstance(below, yaml.MappingNode):
            merged[key.value] = key, _over(value, below)
        elif below is None or value.tag != NULL:
            merged[key.value] = key, value
    return yaml.MappingNode(child.tag, [*merged.values()], child.start_mark, child.end_mark)


def _section(name: str, node: yaml.Node | None) -> yaml.Node | None:
    """A short form written out, so that a section can be laid over it."""
    if name not in SHORT_FORMS or not isinstance(node, yaml.ScalarNode) or node.tag == NULL:
        return node
    marks = node.start_mark, node.end_mark
    key = yaml.ScalarNode("tag:yaml.org,2002:str", SHORT_FORMS[name], *marks)
    return yaml.MappingNode("tag:yaml.org,2002:map", [(key, node)], *marks)


def _reason(error: Exception) -> str:
    """A parser's complaint as one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return " ".join(str(text).split())[:200]


def _overridden(tree: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """A copy of the tree with the overrides in it."""
    changed = copy.deepcopy(tree)
    for override in overrides:
        _override(changed, override)
    return changed


def _override(tree: dict[str, Any], override: str) -> None:
    """Put the value of `a.b=c` into the tree."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        message = f"--set {override}: not of the form a.b=value"
        raise RecipeError(message, hint="--set dpo.beta=0.05")
    try:
        value = parse(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        message = f"--set {override}: the value is not YAML: {_reason(error)}"
        raise RecipeError(message, hint="put text in quotes: --set 'a.b=\"text\"'") from None
    parent: Any = tree
    for name in path[:-1]:
        at = _position(parent, name, override)
        parent[at] = _opened(name, parent[at] if at in _places(parent) else None, override)
        parent = parent[at]
    parent[_position(parent, path[-1], override)] = value


def _places(parent: dict[str, Any] | list[Any]) -> Any:
    return parent if isinstance(parent, dict) else range(len(parent))


def _position(parent: dict[str, Any] | list[Any], name: str, override: str) -> Any:
    """Key of a mapping as it is, of a list as a number."""
    if isinstance(parent, dict):
        return name
    if name.isdigit() and int(name) < len(parent):
        return int(name)
    hint = f"it has {len(parent)} entries: say which, from 0, as in train.0.limit"
    raise RecipeError(f"--set {override}: a list has no {name!r}", hint=hint)


def _opened(name: str, child: Any, override: str) -> dict[str, Any] | list[Any]:
    """A section to set something in: there already, new, or written out from its short form."""
    if child is None:
        return {}
    if isinstance(child, str) and (name in SHORT_FORMS or name.isdigit()):
        return {SHORT_FORMS.get(name, "path"): child}
    if isinstance(child, (dict, list)):
        return child
    raise RecipeError(f"--set {override}: {name} is {child!r:.60}, not a section")


def _ranked(error: ValidationError) -> list[ErrorDetails]:
    """Errors, unknown keys first: a misspelt key is also a missing one, and says more."""
    return sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")


def _faults(tree: dict[str, Any], overrides: tuple[str, ...] = ()) -> list[ErrorDetails]:
    """What is wrong with the file alone, or under some of the overrides."""
    try:
        Recipe.model_validate(_overridden(tree, overrides))
    except ValidationError as error:
        return _ranked(error)
    except RecipeError:  # an override that builds upon one that is left out here
        pass
    return []


def _key(error: ErrorDetails) -> tuple[Any, ...]:
    """What makes two errors the same one."""
    value = error["input"]
    seen = None if isinstance(value, (dict, list)) else repr(value)
    return error["type"], error["loc"], error["msg"], seen


def _loc(error: ErrorDetails) -> list[str]:
    return [str(part) for part in error["loc"]]


def _culprits(error: ErrorDetails, tree: dict[str, Any], overrides: tuple[str, ...]) -> str:
    """The `--set` arguments without which the error is not there; all where no single one is."""
    guilty = []
    for at, override in enumerate(overrides):
        others = (*overrides[:at], *overrides[at + 1 :])
        if _key(error) not in map(_key, _faults(tree, others)):
            guilty.append(override)
    return " ".join(f"--set {override}" for override in guilty or overrides)


def _explain(error: ErrorDetails, place: str) -> RecipeError:
    """A validation error as one line a person can act on."""
    loc = _loc(error)
    dotted = ".".join(loc)
    if error["type"] == "extra_forbidden":
        known = _names(loc[:-1])
        near = _abbreviated(loc[-1], known) or difflib.get_close_matches(loc[-1], known, 1, 0.4)
        right = ".".join([*loc[:-1], *near])
        hint = f"did you mean {right}?" if near else f"known: {', '.join(known)}"
        return RecipeError(f"{place}: unknown key {dotted}", hint=hint)
    if error["type"] == "missing":
        return RecipeError(f"{place}: key {dotted} is missing")
    if error["type"] == "model_type":
        return RecipeError(
            f"{place}: {dotted} must be a section of keys (got {error['input']!r:.60})"
        )
    message = error["msg"].removeprefix("Value error, ").partition(", unable to parse")[0]
    message = message.replace("Input should be", "must be", 1)
    subject = f"{dotted}: " if dotted else ""
    seen = "" if isinstance(error["input"], (dict, list)) else f" (got {error['input']!r:.60})"
    is_word = error["type"] == "string_type" and isinstance(error["input"], bool)
    hint = "YAML reads yes, no, on and off as true and false: use quotes" if is_word else None
    return RecipeError(f"{place}: {subject}{message}{seen}", hint=hint)


def _abbreviated(key: str, names: list[str]) -> list[str]:
    """The name that `key` abbreviates: lr is learning_rate."""
    return [n for n in names if "".join(word[0] for word in n.split("_")) == key][:1]


def _place(node: yaml.Node, loc: list[str]) -> str:
    """File and 1-based line of the deepest part of `loc` that is written anywhere."""
    mark = node.start_mark
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is not None:
                mark, node = found[0].start_mark, found[1]
            elif not part.isdigit():  # one source stands for a list of one
                break
        elif isinstance(node, yaml.SequenceNode) and part.isdigit():
            node = node.value[int(part)]
            mark = node.start_mark
    return f"{mark.name}:{mark.line + 1}"


def _names(path: list[str]) -> list[str]:
    """Field names of the section at `path`."""
    section: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else _section_of(field.annotation)
    fields = getattr(section, "model_fields", {})
    return [field.alias or name for name, field in fields.items()]


def _section_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _section_of(inner):
            return found
    return None
