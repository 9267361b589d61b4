"""`data`: where dialogues and feedback come from, and what is done to their rows."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from zephyr_lite.recipe.section import SHORT_FORMS, Section


class Source(Section):
    """Where rows come from. A plain string is short for `{path: STRING}`."""

    path: str = Field(
        description="JSON, JSONL or parquet file, a folder of them, or a hub dataset id."
    )
    split: str | None = Field(
        default=None, description="Split name of a hub dataset; unused for files."
    )
    file: str | None = Field(
        default=None, description="One file of a hub dataset's repository, read instead of a split."
    )
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a hub dataset; unused for files."
    )
    limit: int | None = Field(default=None, ge=1, description="Read at most this many rows.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Share of its rows in the mixture: 0.5 takes a seeded half, 2 every row twice.",
    )


def _as_source(value: Any) -> Any:
    return {SHORT_FORMS["train"]: value} if isinstance(value, str) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


# The input types are what the JSON schema shows: editors accept the short forms too.
_Source = Annotated[Source, BeforeValidator(_as_source, json_schema_input_type=str | Source)]
Sources = Annotated[
    tuple[_Source, ...],
    BeforeValidator(_as_list, json_schema_input_type=str | Source | list[str | Source]),
]


class Split(Section):
    """Rows to train on and rows held out."""

    train: Sources = Field(description="Sources of training rows, read in this order.")
    eval: Sources = Field((), description="Sources of held-out rows.")
    holdout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Fraction of training rows held out, by hash of prompt, when `eval` is empty.",
    )


class Dialogues(Split):
    """Dialogues for dSFT, and what is done to them before they are tokenised."""

    truecase: bool = Field(
        False, description="Repair user turns typed without capitals (ultrachat_200k's truecasing)."
    )
    drop_refusals: bool = Field(
        False,
        description="Leave out dialogues in which the assistant refuses as a machine (`I do not "
        "have personal opinions`), as ultrachat_200k does.",
    )


class Feedback(Split):
    """AI feedback and how it becomes preference pairs."""

    rule: Literal["mean", "overall", "worst"] = Field(
        "mean",
        description="chosen = highest mean aspect score (`mean`, the paper) or overall score "
        "(`overall`, the published dataset), rejected = a random other; `worst` = best and worst.",
    )
    ties: Literal["drop", "keep"] = Field(
        "drop",
        description="A pair whose two scores are equal is dropped or kept; both are counted.",
    )
    exclude_sources: tuple[str, ...] = Field(
        ("truthful_qa",),
        description="Rows whose own `source` is one of these are left out and counted: "
        "UltraFeedback draws on TruthfulQA, which is also a benchmark.",
    )


class Data(Section):
    """Everything read from outside."""

    dialogues: Dialogues | None = Field(default=None, description="Dialogues for dSFT.")
    feedback: Feedback | None = Field(default=None, description="AI feedback for dDPO.")
    decontaminate: Sources = Field(
        default=(),
        description="Benchmarks: a training row that shares more than half of the normalised "
        "8-grams of one of their prompts is left out and counted.",
    )
    on_fault: Literal["stop", "drop"] = Field(
        default="stop",
        description="A faulty row (empty answer, chosen == rejected, ...) stops the run with file "
        "and line, or is dropped and counted in the report.",
    )
