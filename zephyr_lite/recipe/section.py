"""What every section of a recipe is: frozen, no unknown key; and what of it affects results."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

# Sections that a plain string is short for, and the key that it stands for.
SHORT_FORMS = {"base": "model", "train": "path", "eval": "path"}


class Section(BaseModel):
    """A frozen part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # `sft.from` is a keyword of Python, not of recipes
    )


def how(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes how a stage runs, never what it computes."""
    return Field(
        default, description=description, json_schema_extra={"affects_result": False}, **limits
    )


def result_fields(section: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> plain value of every field that affects results."""
    found: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("affects_result") is False:
            continue
        value, key = getattr(section, name), field.alias or name
        if isinstance(value, BaseModel):
            found |= result_fields(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = section.model_dump(mode="json", include={name})[key]
    return found
