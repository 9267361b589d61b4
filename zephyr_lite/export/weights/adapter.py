"""One PEFT LoRA adapter, read as matrices to add: W <- W + s B A, in fp32.

s = alpha / r, or alpha / sqrt(r) with `use_rslora` (arXiv 2312.03732); r and alpha may differ per
module. Tensors of `modules_to_save` replace the base's, and so do an embedding and a head that lie
in the file: trainers save them whole when they were resized.

An embedding's factors are stored the other way round: W + s (B A)'.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from zephyr_lite.errors import DataError
from zephyr_lite.export.weights.base_weights import FLOATS, is_finite, open_safetensors
from zephyr_lite.export.weights.lora_config import (
    CONFIG,
    is_saved,
    is_targeted,
    rank_and_alpha,
    read_lora_config,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# PEFT's files name no adapter; a state dict saved as it is has `lora_A.default.weight`.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_EMBEDDING_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?"
)
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<end>weight|bias)"
)
# What a module was before it was trained whole; nothing computes with it.
_ORIGINAL = re.compile(r"(?P<module>.+)\.original_module\.(weight|bias)")


@dataclass(frozen=True)
class LowRank:
    """Where one module's A and B lie, and the factor of their product."""

    a_key: str
    b_key: str
    scale: float
    is_embedding: bool = False


class Adapter:
    """An adapter whose every tensor has found its place in the base.

    low_rank, replaced: what changes a base weight and what stands in its place, by its name.
    file: where its tensors lie. config: adapter_config.json.
    """

    def __init__(self, folder: Path, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Read config and tensors, and match them with the base.

        Args: base_shapes: shape of every base weight by its name, a tied head under both names.
        Raises: RecipeError for a variant that is not supported; DataError naming the file, and the
            tensor that fits nothing, has the wrong shape or dtype, or is not finite.
        """
        self.folder, self.file = folder, _weights_file(folder)
        self.config = read_lora_config(folder)
        self._handle = open_safetensors(self.file)
        self._shapes = {
            key: tuple(self._handle.get_slice(key).get_shape())
            for key in self._handle.keys()  # noqa: SIM118 (a file handle, not a dict)
        }
        self.low_rank: dict[str, LowRank] = {}
        self.replaced: dict[str, str] = {}
        self._match(base_shapes)
        self._check_targets(base_shapes)
        self._check_values()

    @property
    def resized(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what it replaces, by the base weight's name."""
        return {name: self._shapes[key] for name, key in self.replaced.items()}

    def touches(self, name: str) -> bool:
        """Whether the base weight `name` is changed or replaced."""
        return name in self.low_rank or name in self.replaced

    def trains(self, name: str) -> bool:
        """Whether training changed the base weight `name`, and it alone where two are tied."""
        module = name.rpartition(".")[0]
        return name in self.low_rank or (name in self.replaced and is_saved(self.config, module))

    def replacement(self, name: str) -> torch.Tensor:
        """What stands in the place of the base weight: its own dtype, not to be written to."""
        return self._handle.get_tensor(self.replaced[name])

    def factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A [r, in], B [out, r], s) of a weight [out, in]: fp32, as W + s B A takes them."""
        low = self.low_rank[name]
        a = self._handle.get_tensor(low.a_key).to(torch.float32)
        b = self._handle.get_tensor(low.b_key).to(torch.float32)
        return (b.T, a.T, low.scale) if low.is_embedding else (a, b, low.scale)

    def _match(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        factors = self._sort()
        self._refuse_left_over(factors, base_shapes)
        for name in self.replaced:
            self._check_replacement(name, base_shapes[name])
        shapes = {**base_shapes, **self.resized}
        for name, sides in factors.items():
            self.low_rank[name] = self._pair(name, sides, shapes)
        if not self._shapes:
            raise DataError("the adapter holds no tensors", file=self.file)

    def _sort(self) -> dict[str, dict[str, str]]:
        """Keys of A and B by the weight they belong to; whole tensors go to `replaced`."""
        factors: dict[str, dict[str, str]] = {}
        for key in list(self._shapes):
            own = key.removeprefix(PREFIX)
            if match := _FACTOR.fullmatch(own) or _EMBEDDING_FACTOR.fullmatch(own):
                sides = factors.setdefault(f"{match['module']}.weight", {})
                if match["side"] in sides:
                    both = f"{sides[match['side']]} and {key}"
                    raise DataError(f"holds two adapters: {both}", file=self.file)
                sides[match["side"]] = key
            elif (match := _WHOLE.fullmatch(own)) and ".lora_" not in own:
                self._replace(f"{match['module']}.{match['end']}", key)
        return factors

    def _replace(self, name: str, key: str) -> None:
        """One that was saved under two names must be one."""
        if (match := _ORIGINAL.fullmatch(name)) and is_saved(self.config, match["module"]):
            del self._shapes[key]
            return
        other = self.replaced.get(name)
        if other is not None:
            one, two = self._handle.get_tensor(key), self._handle.get_tensor(other)
            if not torch.equal(one, two):
                raise DataError(f"holds two of {name}: {other} and {key}", file=self.file)
            del self._shapes[other]
        self.replaced[name] = key

    def _refuse_left_over(
        self, factors: Mapping[str, Mapping[str, str]], base: Mapping[str, tuple[int, ...]]
    ) -> None:
        known = {key for sides in factors.values() for key in sides.values()}
        for name, key in self.replaced.items():
            is_whole = name in (EMBEDDING, HEAD) or is_saved(self.config, name.rpartition(".")[0])
            known |= {key} if is_whole and name in base else set()
        known = {key for key in known if key.startswith(PREFIX)}
        if left := sorted(self._shapes.keys() - known):
            raise DataError(
                f"{len(left)} adapter tensors fit nothing in the base, first {left[0]}",
                file=self.file,
                hint="this adapter was trained on another kind of model or with another method",
            )

    def _pair(
        self, name: str, sides: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> LowRank:
        first = next(iter(sides.values()))
        if missing := {"A", "B"} - sides.keys():
            raise DataError(f"tensor {first}: its {missing.pop()} is missing", file=self.file)
        if name not in shapes:
            raise DataError(f"tensor {first}: the base has no {name}", file=self.file)
        rank, alpha = rank_and_alpha(self.config, name.removesuffix(".weight"))
        a, b = self._shapes[sides["A"]], self._shapes[sides["B"]]
        if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
            raise DataError(
                f"tensor {sides['A']}: shapes {list(a)} and {list(b)} do not have the rank {rank} "
                f"of {CONFIG}",
                file=self.file,
            )
        is_embedding = ".lora_embedding_" in first
        fits = (a[1], b[0]) if is_embedding else (b[0], a[1])
        if fits != shapes[name]:
            raise DataError(
                f"tensor {name}: the adapter is for shape {list(fits)}, the base has "
                f"{list(shapes[name])}",
                file=self.file,
                hint="export with the base this adapter was trained on",
            )
        root = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return LowRank(sides["A"], sides["B"], alpha / root, is_embedding)

    def _check_replacement(self, name: str, base: tuple[int, ...]) -> None:
        """Same shape; an embedding or head may have other rows: the vocabulary was resized."""
        own = self._shapes[self.replaced[name]]
        is_resized = name in (EMBEDDING, HEAD) and len(own) == 2 and own[0] and own[1] == base[1]
        if own != base and not is_resized:
            raise DataError(
                f"tensor {self.replaced[name]}: shape {list(own)}, the base has {list(base)}",
                file=self.file,
                hint="export with the base this adapter was trained on",
            )

    def _check_targets(self, base_shapes: Mapping[str, tuple[int, ...]]) -> None:
        """A truncated adapter loads silently in PEFT: the missing modules stay at the base."""
        for name, shape in base_shapes.items():
            module = name.removesuffix(".weight")
            if module == name or len(shape) != 2 or self.touches(name):
                continue
            if is_targeted(self.config, module, name in (EMBEDDING, HEAD)):
                raise DataError(
                    f"the adapter targets {module} and holds no tensors for it", file=self.file
                )

    def _check_values(self) -> None:
        for key in self._shapes:
            dtype = self._handle.get_slice(key).get_dtype()
            if dtype not in FLOATS:
                raise DataError(f"tensor {key} has dtype {dtype}", file=self.file)
            if not is_finite(self._handle.get_tensor(key)):
                raise DataError(
                    f"tensor {key} holds NaN or infinite values",
                    file=self.file,
                    hint="training diverged or the file is damaged; export an earlier checkpoint",
                )


def _weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        raise DataError(
            f"has no {WEIGHTS}",
            file=folder,
            hint="save the adapter as safetensors; pickled weights are never loaded",
        )
    return path
