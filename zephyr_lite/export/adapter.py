"""One PEFT LoRA adapter, read as matrices to add: W <- W + s B A, in fp32.

s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732); r and alpha may differ per
module (`rank_pattern`, `alpha_pattern`). Tensors of `modules_to_save` replace the base's.

An adapter says in its config what its tensors mean, and variants that mean something else (DoRA,
biases, initialisations that moved the base) share the same file names. So whatever the config
switches on that is not handled here is refused by its name, and so is any tensor left over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.base_weights import open_safetensors
from zephyr_lite.storage import read_json

PREFIX = "base_model.model."
# Fields that say where the adapter came from, or act only while it is trained.
INERT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# pissa, olora, corda, loftq and lora_ga subtract from the base what they put into the adapter.
FAITHFUL_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LowRank:
    """Where one module's A and B lie, and the factor of their product."""

    a_key: str
    b_key: str
    scale: float


class Adapter:
    """An adapter whose every tensor has found its place in the base."""

    def __init__(self, folder: Path, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read config and header, and match them with the base.

        Args: base_shapes: shape of every base weight by its name, a tied head under both names.
        Raises: RecipeError for a variant that is not supported; DataError naming the tensor that
            fits nothing or has the wrong shape; StorageError for missing or damaged files.
        """
        self.folder = folder
        self.config = _read_config(folder)
        self._file = open_safetensors(_weights_file(folder))
        self._shapes = {
            key: tuple(self._file.get_slice(key).get_shape())
            for key in self._file.keys()  # noqa: SIM118 (a file handle, not a dict)
        }
        self.low_rank: dict[str, LowRank] = {}
        self.replaced: dict[str, str] = {}
        self._match(base_shapes)
        self._check_targets(base_shapes)

    def touches(self, name: str) -> bool:
        """Whether the base weight `name` is changed or replaced."""
        return name in self.low_rank or name in self.replaced

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The trained weight: fp32, same shape; `weight` (fp32) may be changed in place."""
        if name in self.replaced:
            return self._file.get_tensor(self.replaced[name]).to(torch.float32)
        if name in self.low_rank:
            low = self.low_rank[name]
            a_RD = self._file.get_tensor(low.a_key).to(torch.float32)
            b_FR = self._file.get_tensor(low.b_key).to(torch.float32)
            weight.add_(b_FR @ a_RD, alpha=low.scale)
        return weight

    def _match(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        consumed: set[str] = set()
        for key in self._shapes:
            module = key.removeprefix(PREFIX)
            if key.startswith(PREFIX) and module.endswith(".lora_A.weight"):
                module = module.removesuffix(".lora_A.weight")
                b_key = f"{PREFIX}{module}.lora_B.weight"
                self.low_rank[f"{module}.weight"] = self._pair(module, key, b_key, base_shapes)
                consumed |= {key, b_key}
            elif key.startswith(PREFIX) and self._is_saved_module(module):
                self._replace(module, key, base_shapes)
                consumed.add(key)
        if left := sorted(self._shapes.keys() - consumed):
            raise DataError(
                f"{len(left)} adapter tensors fit nothing in the base, first {left[0]}",
                file=self.folder,
                hint="this adapter was trained on another kind of model or with another method",
            )
        if not consumed:
            raise DataError("the adapter holds no tensors", file=self.folder)

    def _pair(
        self, module: str, a_key: str, b_key: str, base_shapes: Mapping[str, tuple[int, ...]]
    ) -> LowRank:
        name = f"{module}.weight"
        if b_key not in self._shapes:
            raise DataError(f"tensor {b_key} is missing", file=self.folder)
        if name not in base_shapes:
            raise DataError(f"tensor {a_key}: the base has no {name}", file=self.folder)
        rank, alpha = self._rank_and_alpha(module)
        a, b = self._shapes[a_key], self._shapes[b_key]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise DataError(
                f"tensor {a_key}: shapes {list(a)} and {list(b)} do not have the rank {rank} of "
                "adapter_config.json",
                file=self.folder,
            )
        if (b[0], a[1]) != base_shapes[name]:
            raise DataError(
                f"tensor {name}: the adapter is for shape {[b[0], a[1]]}, the base has "
                f"{list(base_shapes[name])}",
                file=self.folder,
                hint="export with the base this adapter was trained on",
            )
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return LowRank(a_key, b_key, alpha / root)

    def _rank_and_alpha(self, module: str) -> tuple[int, float]:
        rank = _pattern_value(self.config.get("rank_pattern"), module, self.config["r"])
        alpha = _pattern_value(self.config.get("alpha_pattern"), module, self.config["lora_alpha"])
        return int(rank), float(alpha)

    def _is_saved_module(self, name: str) -> bool:
        modules = self.config.get("modules_to_save") or []
        return any(f".{module}." in f".{name}" for module in modules) and ".lora_" not in name

    def _replace(self, name: str, key: str, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        if base_shapes.get(name) != self._shapes[key]:
            raise DataError(
                f"tensor {key}: shape {list(self._shapes[key])}, the base has "
                f"{list(base_shapes.get(name, ()))}",
                file=self.folder,
            )
        self.replaced[key.removeprefix(PREFIX)] = key

    def _check_targets(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """A truncated adapter loads silently in PEFT: the missing modules stay at the base."""
        targets = self.config.get("target_modules")
        if not isinstance(targets, list) or any(
            self.config.get(field) for field in ("layers_to_transform", "exclude_modules")
        ):
            return
        for name, shape in base_shapes.items():
            module = name.removesuffix(".weight")
            aimed = any(f".{module}".endswith(f".{target}") for target in targets)
            if name.endswith(".weight") and len(shape) == 2 and aimed and not self.touches(name):
                raise DataError(
                    f"the adapter targets {module} and holds no tensors for it", file=self.folder
                )


def _pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT: the first key that matches the module's name or its dotted tail, as a regex.
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise StorageError(f"{folder}: has no adapter_config.json", hint="give a PEFT adapter")
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise RecipeError(f"{path}: peft_type {config.get('peft_type')!r} cannot be exported")
    if config.get("bias", "none") != "none":
        raise RecipeError(f"{path}: bias: {config['bias']!r} cannot be exported, only 'none'")
    if config.get("init_lora_weights", True) not in FAITHFUL_INITS:
        raise RecipeError(
            f"{path}: init_lora_weights: {config['init_lora_weights']!r} moved the base weights",
            hint="convert the adapter with PEFT's path_initial_model_for_weight_conversion",
        )
    for field, value in config.items():
        if value and field not in INERT and field != "bias":
            raise RecipeError(f"{path}: {field}: {value!r} cannot be exported")
    if missing := {"r", "lora_alpha"} - config.keys():
        raise DataError(f"lacks {sorted(missing)}", file=path)
    return config


def _weights_file(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise StorageError(
            f"{folder}: has no adapter_model.safetensors",
            hint="save the adapter as safetensors; pickled weights are never loaded",
        )
    return path
