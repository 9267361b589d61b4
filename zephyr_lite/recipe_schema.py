"""The JSON schema of recipes, for editors that complete and check YAML."""

from __future__ import annotations

from typing import Any

from zephyr_lite.recipe import Recipe


def json_schema() -> dict[str, Any]:
    """The recipe's JSON schema, for editors that complete and check YAML.

    It is the schema of a file, which may extend another one: then a section need not be whole, and
    null takes out the parent's.
    """
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        section.pop("required", None)
    for key in ("data", "memory", "export", "expect"):
        form = schema["properties"][key]
        about = {k: form.pop(k) for k in ("default", "description", "title") if k in form}
        schema["properties"][key] = {"anyOf": [form, {"type": "null"}], **about}
    text = "A built-in recipe, or a file beside this one, that this file is laid over."
    schema["properties"]["extends"] = {"type": "string", "description": text}
    schema["anyOf"] = [{"required": ["name", key]} for key in ("base", "extends")]
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "zephyr-lite recipe"
    return schema
