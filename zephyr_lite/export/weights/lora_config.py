"""What adapter_config.json says its tensors mean, and what of it cannot be folded.

Variants that mean something else (DoRA, biases, initialisations that moved the base) share the file
names of plain LoRA. So whatever the config switches on that is not handled is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.base_weights import read_object

CONFIG = "adapter_config.json"
# Fields that are read here, that say where the adapter came from, or act only in training.
INERT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# pissa, olora, corda, loftq and lora_ga subtract from the base what they put into the adapter.
FAITHFUL_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
PATTERNS = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "layers_pattern")


def read_lora_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json of plain LoRA.

    Raises: RecipeError naming the field of a variant that cannot be folded; DataError for a
        missing or damaged file and for values that are none.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(f"has no {CONFIG}", file=folder, hint="give a PEFT adapter")
    config = read_object(path)
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"{path}: peft_type {config.get('peft_type')!r} cannot be exported")
    if (config.get("bias") or "none") != "none":
        raise RecipeError(f"{path}: bias: {config['bias']!r} cannot be exported, only 'none'")
    if config.get("init_lora_weights", True) not in FAITHFUL_INITS:
        raise RecipeError(
            f"{path}: init_lora_weights: {config['init_lora_weights']!r} moved the base weights",
            hint="convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    for field, value in config.items():
        if value and field not in INERT and field != "bias":
            raise RecipeError(f"{path}: {field}: {value!r:.80} cannot be exported")
    _check_values(config, path)
    return config


def rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """r and alpha of one module, by its patterns or the defaults."""
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return int(rank), float(alpha)


def is_saved(config: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names a module or one around it: it was trained whole."""
    modules = config.get("modules_to_save") or []
    return any(f".{name}." in f".{module}." for name in modules)


def is_targeted(config: Mapping[str, Any], module: str, is_embedding_or_head: bool) -> bool:
    """Whether PEFT would have put an A and a B beside a linear of this name."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules") or []
    if _names(excluded, module) or is_saved(config, module):
        return False
    if targets == "all-linear":
        return not is_embedding_or_head
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return _names(targets or [], module) and _in_layers(config, module)


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    wanted = config.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if match := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
            return int(match[1]) in ([wanted] if isinstance(wanted, int) else wanted)
    return False


def _names(patterns: str | list[str], module: str) -> bool:
    """PEFT: a string is a regex of the whole name, a list holds names or dotted tails."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, module) is not None
    return any(f".{module}".endswith(f".{tail}") for tail in patterns)


def _pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT: the first key that matches the module's name or its dotted tail, as a regex.
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _check_values(config: Mapping[str, Any], path: Path) -> None:
    if missing := {"r", "lora_alpha"} - config.keys():
        raise DataError(f"lacks {sorted(missing)}", file=path)
    ranks = {"r": config["r"], **_pattern(config, "rank_pattern", path)}
    alphas = {"lora_alpha": config["lora_alpha"], **_pattern(config, "alpha_pattern", path)}
    for field, value in ranks.items():
        if type(value) is not int or value < 1:
            raise DataError(f"{field}: {value!r:.80} is not a rank", file=path)
    for field, value in alphas.items():
        if type(value) not in (int, float):
            raise DataError(f"{field}: {value!r:.80} is not a number", file=path)
    for field in PATTERNS:
        value = config.get(field) or []
        is_plain = field in ("target_modules", "exclude_modules") and isinstance(value, list)
        for text in [value] if isinstance(value, str) else value:
            try:
                re.compile(re.escape(text) if is_plain else text)
            except (re.error, TypeError):
                raise DataError(f"{field}: {text!r:.80} is not a pattern", file=path) from None


def _pattern(config: Mapping[str, Any], field: str, path: Path) -> dict[str, Any]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise DataError(f"{field}: {value!r:.80} is not a JSON object", file=path)
    return value
