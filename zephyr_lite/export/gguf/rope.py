"""Rotary embedding as config.json has it, and as llama.cpp reads it.

    rope_type   of the file
    default     freq_base
    linear      scaling.type, scaling.factor
    llama3      the tensor rope_freqs.weight, by which llama.cpp divides each frequency
    yarn        scaling.type, scaling.factor, scaling.original_context_length

llama.cpp takes YaRN's betas as 32 and 1 and its attention factor as 0.1 ln(factor) + 1, which are
transformers' defaults; a model that says otherwise is refused.

Sources: llama3: `apply_scaling` of meta-llama/llama-models (models/llama3/model.py); YaRN:
arXiv 2309.00071, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import torch

from zephyr_lite.errors import DataError, RecipeError

THETA = 10000.0  # what Mistral, Llama and Qwen2/3 of transformers take for no entry
COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {"factor", "original_max_position_embeddings"},
}  # fmt: skip
# Fields of YaRN that may stand there with the value they have anyway.
USUAL = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "partial_rotary_factor": 1}


@dataclass(frozen=True)
class Rope:
    """`positions`: tokens the scaling reaches by itself; 0 where config.json's count is all."""

    kind: str
    theta: float
    dimensions: int
    factor: float
    original_positions: int
    positions: int
    factors: torch.Tensor | None = field(compare=False, repr=False)

    def add_metadata(self, writer: gguf.GGUFWriter) -> None:
        """The keys of rope; `factors` are a tensor."""
        writer.add_rope_dimension_count(self.dimensions)
        writer.add_rope_freq_base(self.theta)
        if self.kind in ("linear", "yarn"):
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(self.factor)
        if self.kind == "yarn":
            writer.add_rope_scaling_orig_ctx_len(self.original_positions)


def read_rope(config: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary embedding of a model; `head_dim` must be even.

    Raises: RecipeError naming the field llama.cpp has no equal for; DataError for a missing one.
    """
    fields = _fields(config)
    kind = fields.get("rope_type") or fields.get("type") or "default"
    _refuse_others(kind, fields)
    if missing := sorted(FIELDS[kind] - fields.keys() - {"original_max_position_embeddings"}):
        raise DataError(f"rope of type {kind} in config.json lacks {', '.join(missing)}")
    theta, factor = float(fields.get("rope_theta", THETA)), float(fields.get("factor", 1.0))
    original = fields.get("original_max_position_embeddings", config["max_position_embeddings"])
    factors = _llama3_factors(fields, head_dim, theta, original) if kind == "llama3" else None
    positions = int(original * factor) if kind == "yarn" else 0
    return Rope(kind, theta, head_dim, factor, original, positions, factors)


def _fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Both spellings: transformers 5 has `rope_parameters`, 4 `rope_theta` + `rope_scaling`."""
    theta = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") else {}
    both = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if "partial_rotary_factor" in config:
        theta["partial_rotary_factor"] = config["partial_rotary_factor"]
    return {**theta, **{name: value for name, value in both.items() if value is not None}}


def _refuse_others(kind: str, fields: Mapping[str, Any]) -> None:
    if kind not in FIELDS:
        raise RecipeError(
            f"rope_type {kind!r} cannot be exported to GGUF", hint=f"known are {', '.join(FIELDS)}"
        )
    for name, value in fields.items():
        if name == "attention_factor" and kind == "yarn":
            is_usual = math.isclose(value, 0.1 * math.log(fields["factor"]) + 1, rel_tol=1e-6)
        else:
            is_usual = value == USUAL.get(name)
        if name not in COMMON - USUAL.keys() | FIELDS[kind] and not is_usual:
            raise RecipeError(f"rope field {name}: {value!r} cannot be exported to GGUF")


def _llama3_factors(
    fields: Mapping[str, Any], head_dim: int, theta: float, original: int
) -> torch.Tensor:
    """What each frequency is divided by: fp32 [head_dim / 2].

    Per frequency f, with turns = original f / 2 pi: 1 for turns > high, `factor` for turns < low,
    between them the f that is linear in turns.
    """
    factor, low, high = (fields[n] for n in ("factor", "low_freq_factor", "high_freq_factor"))
    if not high > low:
        raise DataError(f"high_freq_factor {high} is not above low_freq_factor {low}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    turns = original * theta**-exponents / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
