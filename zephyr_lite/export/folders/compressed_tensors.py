"""The trained model in 4-bit integers for vLLM: compressed-tensors' "pack-quantized", W4A16.

Each row of a decoder layer's matrix is cut into groups of G columns with one 16-bit scale s:

    q = clamp(round(w / s), -8, 7)        w ~ s q

Eight q lie in one int32 along the row, as q + 8, the first in the lowest bits. `X.weight` becomes

    X.weight_packed   int32 [rows, columns / 8]
    X.weight_scale    16-bit [rows, columns / G]
    X.weight_shape    int64 [2]: rows, columns

Embedding, head, norms and biases stay 16-bit. No calibration: the scale of a group is the best of a
few, by squared error of the group. vLLM, and transformers with the package compressed-tensors, read
it. Format: compressed-tensors 0.20, pack_quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.folders.model_files import Dtype, model_files
from zephyr_lite.export.folders.sharded import (
    DTYPES,
    MAX_SHARD_BYTES,
    TORCH_DTYPES,
    ShardedFolder,
    StoredTensor,
    rounded,
)
from zephyr_lite.export.weights.fold import FoldedModel

FORMAT = "pack-quantized"
GROUPS = (128, 64)  # columns that share a scale; what vLLM's kernels take
LOW, HIGH = -8, 7
PER_WORD = 8
# A group's largest value is put at this many steps. Against 7.5 alone, which is what the package
# compressed-tensors does, the choice lowers the error of gaussian weights from 0.111 to 0.101 of
# their norm, and the mean KL of seven models trained by the built-in recipes from 0.0142 to 0.0124
# nats (groups of 64: 0.0121 to 0.0102). More or finer steps gain less than half a percent.
DIVISORS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5)
CHUNK = 1 << 20  # weights quantised at a time
SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


class PackedTarget:
    """The trained model in W4A16: a `Target` of the export's one pass."""

    label = "w4a16"

    def __init__(
        self,
        model: FoldedModel,
        tokenizer_folder: Path,
        chat_template: str,
        out: Path,
        dtype: Dtype = "float16",
        *,
        identity: str,
        group_size: int = GROUPS[0],
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plan it.

        Args:
            dtype: of scales and of what is not quantised.
            group_size: taken where it divides the rows of every matrix, else 64; a matrix that
                neither divides stays 16-bit, and the report's notes name it.
        Raises: RecipeError for a type or size that is not one of these, or when nothing is left to
            quantise; StorageError without tokenizer.json.
        """
        if dtype not in ("float16", "bfloat16") or group_size not in GROUPS:
            raise RecipeError(f"W4A16 has no dtype {dtype!r} with groups of {group_size}")
        self._dtype: Dtype = dtype
        matrices = {n: model.shape(n)[1] for n in model.names() if _is_matrix(model, n)}
        self.group_size = _group_size(matrices.values(), group_size)
        self._packed = {n for n, columns in matrices.items() if columns % self.group_size == 0}
        self._kept = [n.removesuffix(".weight") for n in matrices if n not in self._packed]
        if not self._packed:
            raise RecipeError(
                f"no matrix has rows that {GROUPS[-1]} divides; W4A16 cannot be written",
                hint="set export.w4a16=false",
            )
        self._folder = ShardedFolder(
            out,
            [tensor for name in model.names() for tensor in self._planned(model, name)],
            identity,
            model_files(
                model.config,
                tokenizer_folder,
                chat_template,
                dtype,
                quantization_config=_quantization_config(self.group_size, self._kept),
            ),
            meta={"kind": "w4a16 model", "group_size": self.group_size, "dtype": dtype},
            max_shard_bytes=max_shard_bytes,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the complete folder."""
        return self._folder.nbytes

    @property
    def part(self) -> Path:
        """The folder as it is until `commit`."""
        return self._folder.part

    def begin(self) -> None:
        """Open or resume. Raises: LockedError, StorageError."""
        self._folder.begin()

    def has(self, name: str) -> bool:
        """Whether a tensor, by its Hugging Face name, is stored."""
        return self._folder.has(_stored_names(name)[-1] if name in self._packed else name)

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Quantise or round a tensor, and store it. Raises: DataError when it does not fit."""
        if name not in self._packed:
            self._folder.append(name, rounded(name, weight, self._dtype))
            return
        scale_dtype = TORCH_DTYPES[DTYPES[self._dtype]]
        codes, scales = quantise(weight, self.group_size, scale_dtype)
        if not torch.isfinite(scales).all():
            raise DataError(
                f"the scales of tensor {name} do not fit {self._dtype}",
                hint="set export.merged_dtype=bfloat16",
            )
        parts = (pack(codes), scales, torch.tensor(weight.shape))
        for stored, part in zip(_stored_names(name), parts, strict=True):
            if not self._folder.has(stored):  # a kill may have come between the three
                self._folder.append(stored, part)

    def finish(self) -> dict[str, Any]:
        """Read back; the entry of the report."""
        notes = [f"{n}: kept in {self._dtype}, its rows are no groups" for n in self._kept]
        return {
            **self._folder.finish(),
            "format": FORMAT,
            "dtype": self._dtype,
            "group_size": self.group_size,
            "notes": notes,
        }

    def commit(self) -> None:
        """Seal it under its final name."""
        self._folder.commit()

    def close(self) -> None:
        """Let go of it; it can be resumed."""
        self._folder.close()

    def _planned(self, model: FoldedModel, name: str) -> Iterator[StoredTensor]:
        if name not in self._packed:
            yield StoredTensor(name, DTYPES[self._dtype], model.shape(name))
            return
        rows, columns = model.shape(name)
        packed, scale, shape = _stored_names(name)
        yield StoredTensor(packed, "I32", (rows, columns // PER_WORD))
        yield StoredTensor(scale, DTYPES[self._dtype], (rows, columns // self.group_size))
        yield StoredTensor(shape, "I64", (2,))


def quantise(
    weight_RC: torch.Tensor, group_size: int, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [R, C] in [-8, 7] and scales [R, C / group_size] of an fp32 matrix."""
    rows, columns = weight_RC.shape
    codes_RC = torch.empty(rows, columns, dtype=torch.int8)
    scales_RG = torch.empty(rows, columns // group_size, dtype=scale_dtype)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        groups = weight_RC[part].reshape(-1, columns // group_size, group_size)
        codes, scales = _best(groups, scale_dtype)
        codes_RC[part] = codes.reshape(-1, columns)
        scales_RG[part] = scales
    return codes_RC, scales_RG


def pack(codes_RC: torch.Tensor) -> torch.Tensor:
    """int8 codes [R, C] -> int32 [R, C / 8]; code i of a word in its bits 4 i to 4 i + 3."""
    nibbles = (codes_RC - LOW).to(torch.uint8).reshape(codes_RC.shape[0], -1, 2)
    # Words are little-endian in the file, as all of safetensors is, and so on this machine.
    return (nibbles[..., 0] | nibbles[..., 1] << 4).contiguous().view(torch.int32)


def _best(groups: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales [...] of groups [..., G]: of all DIVISORS the one of least squared error.

    A scale stays infinite where none fits its dtype.
    """
    largest = groups.abs().amax(dim=-1)
    best_codes = torch.zeros_like(groups, dtype=torch.int8)
    best_scales = torch.full_like(largest, torch.inf)
    best_error = torch.full_like(largest, torch.inf)
    for divisor in DIVISORS:
        scales = (largest / divisor).to(scale_dtype).float()
        scales = torch.where(scales == 0, 1.0, scales)  # of zeros, or what its dtype takes for them
        codes = (groups / scales[..., None]).round_().clamp_(LOW, HIGH)
        error = (codes * scales[..., None]).sub_(groups).square_().sum(dim=-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better[..., None], codes.to(torch.int8), best_codes)
    return best_codes, best_scales.to(scale_dtype)


def _is_matrix(model: FoldedModel, name: str) -> bool:
    """Weights of linears inside the decoder layers."""
    is_inside = name.startswith("model.layers.") and name.endswith(".weight")
    return is_inside and len(model.shape(name)) == 2


def _group_size(columns: Iterable[int], wanted: int) -> int:
    """One size for the whole model: the smaller one where some matrix needs it."""
    divisible = [c for c in columns if c % GROUPS[-1] == 0]
    return wanted if all(c % wanted == 0 for c in divisible) else GROUPS[-1]


def _stored_names(name: str) -> tuple[str, str, str]:
    module = name.removesuffix("weight")
    packed, scale, shape = (module + suffix for suffix in SUFFIXES)
    return packed, scale, shape


def _quantization_config(group_size: int, kept: list[str]) -> dict[str, Any]:
    """What config.json says; only fields that the oldest readers of the format know."""
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *kept],
    }
