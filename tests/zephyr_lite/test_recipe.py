"""The recipe: what it may hold, what it refuses, and what a schema tells an editor."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from zephyr_lite import recipe as recipe_module
from zephyr_lite import recipe_file
from zephyr_lite.recipe import Recipe, Section, result_fields
from zephyr_lite.recipe_schema import json_schema


def _sections(above: type[Section]) -> list[type[Section]]:
    found = [s for s in above.__subclasses__() if s.__module__.startswith(recipe_module.__name__)]
    return [*found, *(below for section in found for below in _sections(section))]


SECTIONS = _sections(Section)
MINIMAL: dict[str, Any] = {
    "name": "x",
    "base": "some/model",
    "data": {"dialogues": {"train": "d.jsonl"}, "feedback": {"train": ["p.jsonl", "q.jsonl"]}},
    "sft": {},
    "dpo": {},
}
# A quantity without one of these words in its description has no unit a reader could know.
UNITS = re.compile(
    r"token|step|row|gigabyte|pair|fraction|minutes|seed|rank|layer|head|pass|width|nats|norm|rate|decay"
    r"|scale|document|prompt|example|checkpoint|weight|stop",
    re.IGNORECASE,
)


@pytest.fixture
def recipe() -> Recipe:
    """A recipe with every stage."""
    return Recipe.model_validate(MINIMAL)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_section_and_field_is_described(section):
    assert section.__doc__ and section.__doc__ != Section.__doc__
    for name, field in section.model_fields.items():
        assert field.description and field.description.endswith("."), f"{section.__name__}.{name}"
        if field.annotation in (int, float, int | None):
            assert UNITS.search(field.description), f"{name}: {field.description} has no unit"


def test_sections_are_frozen(recipe):
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        recipe.dpo.lora.r = 1


def test_short_forms_mean_the_long_ones(recipe):
    long = {
        **MINIMAL,
        "base": {"model": "some/model"},
        "data": {
            "dialogues": {"train": [{"path": "d.jsonl"}]},
            "feedback": {"train": [{"path": "p.jsonl"}, {"path": "q.jsonl"}]},
        },
    }
    assert Recipe.model_validate(long) == recipe


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {}}, "sft needs data.dialogues"),
        ({"data": {"dialogues": {"train": "d"}}}, "dpo needs data.feedback"),
        ({"dpo": {"max_prompt_length": 1024}}, "must be below max_length"),
        ({"dpo": {"loss": "robust"}}, "needs label_smoothing"),
        ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "no meaning"),
        ({"expect": {"dpo.eval_loss": [0.6, 0.5]}}, "low end"),
        ({"name": "../up"}, "pattern"),
        ({"name": "a b"}, "pattern"),
        ({"sft": {"epochs": float("inf")}}, "finite"),
        ({"sft": {"learning_rate": 0}}, "greater than 0"),
        ({"export": {"quants": []}}, "at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate(MINIMAL | change)


def test_result_fields_leave_out_what_only_changes_how(recipe):
    fields = result_fields(recipe)
    how = {"log_every", "eval_every", "checkpoint_every", "checkpoint_minutes", "checkpoint_keep"}
    assert not {name.rpartition(".")[2] for name in fields} & how
    assert not [name for name in fields if name.startswith("memory")]
    assert fields["dpo.beta"] == 0.01
    assert fields["data.feedback.train"][1]["path"] == "q.jsonl"
    changed = Recipe.model_validate(
        MINIMAL | {"sft": {"log_every": 7}, "memory": {"tokens_per_micro_batch": 99}}
    )
    assert result_fields(changed) == fields
    assert result_fields(Recipe.model_validate(MINIMAL | {"seed": 43})) != fields


def test_every_field_is_either_a_result_or_marked(recipe):
    """A new field must change the fingerprint unless it says that it need not."""
    names = set(result_fields(recipe))
    marked = [
        f"{section}.{name}"
        for section in ("sft", "dpo", "memory")
        for name, field in type(getattr(recipe, section)).model_fields.items()
        if (field.json_schema_extra or {}).get("affects_result") is False
    ]
    every = {
        f"{section}.{field.alias or name}"
        for section in ("sft", "dpo", "memory")
        for name, field in type(getattr(recipe, section)).model_fields.items()
    }
    assert every - set(marked) - {"sft.lora", "dpo.lora"} <= names
    assert {n for n in names if n.startswith(("sft.lora.", "dpo.lora."))}


def test_one_key_of_an_adapter_keeps_the_stages_other_defaults():
    tree = MINIMAL | {"sft": {"lora": {"r": 8}}, "dpo": {"lora": {"dropout": 0.1}}}
    recipe = Recipe.model_validate(tree)
    assert recipe.sft and recipe.dpo
    assert (recipe.sft.lora.r, recipe.sft.lora.alpha, recipe.sft.lora.dropout) == (8, 16, 0.05)
    assert (recipe.dpo.lora.r, recipe.dpo.lora.alpha, recipe.dpo.lora.dropout) == (128, 128, 0.1)


def test_defaults_survive_a_round_trip_through_yaml(recipe):
    text = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert Recipe.model_validate(recipe_file.parse(text)) == recipe


# ---------------------------------------------------------------- the JSON schema


@pytest.mark.parametrize("name", recipe_file.built_in())
def test_schema_accepts_the_built_in_recipes(name):
    """An editor that checks with the schema must not underline what we ship."""
    tree = recipe_file.parse(recipe_file.find(name).read_text(encoding="utf-8"))
    assert list(_faults(tree, json_schema())) == []


def test_schema_accepts_short_forms_and_refuses_mistakes():
    schema = json_schema()
    assert list(_faults(MINIMAL, schema)) == []
    assert list(_faults(MINIMAL | {"sed": 1}, schema))
    assert list(_faults(MINIMAL | {"base": {"modle": "x"}}, schema))
    assert list(_faults(MINIMAL | {"dpo": {"loss": "dpo"}}, schema))
    assert list(_faults({"name": "x"}, schema))


def test_schema_describes_every_field():
    schema = json_schema()
    for section in SECTIONS:
        node = schema if section is Recipe else schema["$defs"].get(section.__name__)
        if node is None:  # a base class of sections
            assert any(issubclass(s, section) and s is not section for s in SECTIONS)
            continue
        for name, field in node["properties"].items():
            assert field.get("description"), f"{section.__name__}.{name}"


def _faults(value: Any, schema: dict[str, Any], root: dict[str, Any] | None = None) -> Any:
    """What of a JSON schema's structure a value breaks; only the keywords that ours uses."""
    root = root or schema
    known = {"$schema", "$defs", "$ref", "title", "description", "default", "affects_result"}
    known |= {"type", "properties", "required", "additionalProperties", "anyOf", "enum", "const"}
    known |= {"items", "prefixItems", "pattern", "minItems", "maxItems"}
    known |= {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
    assert schema.keys() <= known, f"this test does not know {schema.keys() - known}"
    if "$ref" in schema:
        target = root["$defs"][schema["$ref"].rpartition("/")[2]]
        yield from _faults(value, target, root)
    if "anyOf" in schema and all(list(_faults(value, s, root)) for s in schema["anyOf"]):
        yield f"{value!r} fits none of {len(schema['anyOf'])} forms"
    if "enum" in schema and value not in schema["enum"]:
        yield f"{value!r} is not in {schema['enum']}"
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}
    types |= {"integer": int, "number": (int, float)}
    if "type" in schema and not isinstance(value, types[schema["type"]]):
        yield f"{value!r} is not {schema['type']}"
    elif isinstance(value, dict):
        yield from _object_faults(value, schema, root)
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for item in value:
            yield from _faults(item, schema["items"], root)


def _object_faults(value: dict[str, Any], schema: dict[str, Any], root: dict[str, Any]) -> Any:
    properties, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    yield from (f"{name} is missing" for name in schema.get("required", ()) if name not in value)
    for name, item in value.items():
        if name in properties:
            yield from _faults(item, properties[name], root)
        elif more is False:
            yield f"unknown key {name}"
        elif isinstance(more, dict):
            yield from _faults(item, more, root)


def test_there_are_sections_to_test():
    assert {"Recipe", "Sft", "Dpo", "Lora", "Source"} <= {s.__name__ for s in SECTIONS}
    assert issubclass(Recipe, BaseModel)
