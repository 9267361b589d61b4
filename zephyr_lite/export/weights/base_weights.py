"""The tensors of a checkpoint folder by their Hugging Face names, as training saw them, in fp32.

Two kinds of folder: plain fp32/fp16/bf16 safetensors, and bitsandbytes 4-bit as `save_pretrained`
writes it, where `X.weight` is packed codes and its siblings `X.weight.absmax`,
`X.weight.quant_map`, `X.weight.quant_state.bitsandbytes__nf4`, ... say how to read them.

Only safetensors are read. Pickled weights, `auto_map` and other quantisations are refused. All that
headers can tell is checked when a folder is opened: before a byte of a result is written.
"""

from __future__ import annotations

import json
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.four_bit import STATE, PackedWeight, Stored, open_packed

FLOATS = {"F32", "F16", "BF16"}
# Old Llama checkpoints carry these buffers; the model recomputes them from the config.
BUFFERS = ("rotary_emb.inv_freq",)
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")
HUGE_PAGE = 1 << 21


class BaseWeights:
    """A checkpoint folder, opened but not loaded. Names are those of `state_dict()`."""

    def __init__(self, folder: Path) -> None:
        """Read config and headers.

        Raises: RecipeError for a kind of checkpoint that is not supported, DataError naming file
            and tensor for what is missing, damaged or makes no sense.
        """
        self.folder = folder
        self.config = read_config(folder)
        stored = _open_files(folder)
        packed = _packed_parts(stored)
        siblings = {part.key for parts in packed.values() for part in parts.values()}
        self._packed = {name: open_packed(name, parts) for name, parts in packed.items()}
        self._stored = {
            key: tensor
            for key, tensor in stored.items()
            if key in packed or (key not in siblings and not key.endswith(BUFFERS))
        }
        for name, tensor in self._stored.items():
            if name not in packed and tensor.dtype not in FLOATS:
                raise DataError(
                    f"tensor {name} has dtype {tensor.dtype}",
                    file=tensor.file,
                    hint="give a plain fp16, bf16 or fp32 checkpoint, or a bitsandbytes 4-bit one",
                )

    def names(self) -> list[str]:
        """Weights in the order of the files; the siblings of packed weights are not listed."""
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dequantised weight."""
        return self._packed[name].shape if name in self._packed else self._stored[name].shape

    def file(self, name: str) -> Path:
        """The file that a weight lies in."""
        return self._stored[name].file

    def packed(self, name: str) -> PackedWeight | None:
        """How a weight is stored in 4 bits; None for a plain one."""
        return self._packed.get(name)

    def stored(self, name: str) -> torch.Tensor:
        """A plain weight in its own dtype: a view of the file's bytes, not to be written to."""
        return self._stored[name].get_tensor()

    def tensor(self, name: str) -> torch.Tensor:
        """The weight as fp32 on the CPU, contiguous; a fresh tensor the caller may change.

        Memory: the result, and for a 4-bit weight its scales and a chunk.
        """
        shape = self.shape(name)
        if name in self._packed:
            size = math.prod(shape)
            flat = empty_fp32(size + size % 2)
            self._packed[name].read(flat)
            return flat[:size].view(shape)
        return widened(self.stored(name))


def widened(stored: torch.Tensor) -> torch.Tensor:
    """A fresh contiguous fp32 copy."""
    return empty_fp32(stored.numel()).view(stored.shape).copy_(stored)


def empty_fp32(size: int) -> torch.Tensor:
    """An uninitialised flat fp32 tensor, in huge pages where the system has them.

    A fresh tensor of a 7B model is 16,000 to 130,000 small pages, and to fault them in takes three
    times as long as to fill them.
    """
    if size * 4 < 2 * HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size)
    memory = mmap.mmap(-1, size * 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, and no mask of the tensor's size."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) and torch.isfinite(high))


def open_safetensors(path: Path) -> Any:
    """A lazily reading handle. Raises: DataError when the file is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise DataError("is missing", file=path) from None
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot be read: {error}", file=path) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object that somebody else wrote. Raises: DataError when it is missing or is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("is missing", file=path) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON: {str(error)[:100]}", file=path) from None
    if not isinstance(value, dict):
        raise DataError("is not a JSON object", file=path)
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dict.

    Raises: RecipeError for `auto_map` (we never run code from a checkpoint) and for quantisations
        other than bitsandbytes 4-bit; DataError for a missing or damaged file.
    """
    path = folder / "config.json"
    config = read_object(path)
    if "auto_map" in config:
        raise RecipeError(
            f"{path}: auto_map asks for code from the checkpoint to be run",
            hint="use a model whose class is part of transformers",
        )
    quantisation = config.get("quantization_config") or config.get("compression_config") or {}
    if not isinstance(quantisation, dict):
        raise DataError("quantization_config is not a JSON object", file=path)
    method = quantisation.get("quant_method", "bitsandbytes")
    if quantisation and (method != "bitsandbytes" or quantisation.get("load_in_8bit")):
        kind = f"{method} 8-bit" if method == "bitsandbytes" else method
        raise RecipeError(
            f"{path}: {kind} checkpoints cannot be exported",
            hint="export from the plain or the bitsandbytes 4-bit checkpoint",
        )
    return config


def _open_files(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder by its name."""
    listed = _listed_files(folder)
    stored: dict[str, Stored] = {}
    for path in sorted(set(listed.values())) or [_single_file(folder)]:
        handle = open_safetensors(path)
        for key in handle.keys():  # noqa: SIM118 (a file handle, not a dict)
            if key in stored:
                raise DataError(f"tensor {key} is also in {stored[key].file.name}", file=path)
            stored[key] = Stored(path, handle, key)
    for key, path in listed.items():
        if key not in stored or stored[key].file != path:
            raise DataError(f"tensor {key} is missing, though the index names it", file=path)
    return stored


def _listed_files(folder: Path) -> dict[str, Path]:
    """Tensor -> file by the index; empty where there is none.

    Raises: DataError for a file outside the folder, and for a shard that the index leaves out.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return {}
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError("has no weight_map", file=index)
    for name in set(map(str, weight_map.values())):
        if Path(name).name != name:
            raise DataError(f"names a file outside its folder: {name!r}", file=index)
    names = set(weight_map.values())
    series = {match[1] for name in names if (match := SHARD.fullmatch(name))}
    for path in sorted(folder.glob("*.safetensors")):
        match = SHARD.fullmatch(path.name)
        if match and match[1] in series and path.name not in names:
            raise DataError(f"does not name {path.name}, a shard beside it", file=index)
    return {key: folder / name for key, name in weight_map.items()}


def _single_file(folder: Path) -> Path:
    single = folder / "model.safetensors"
    if single.is_file():
        return single
    if any(SHARD.fullmatch(path.name) for path in folder.glob("*.safetensors")):
        raise DataError(
            "is missing, and the weights are in shards",
            file=folder / "model.safetensors.index.json",
        )
    kinds = ("*.bin", "*.pt", "*.pth", "*.ckpt")
    pickled = next((p.name for kind in kinds for p in folder.glob(kind)), None)
    raise DataError(
        "has no model.safetensors" + (f", only {pickled}" if pickled else ""),
        file=folder,
        hint="convert pickled weights to safetensors; they are never loaded here",
    )


def _packed_parts(stored: Mapping[str, Stored]) -> dict[str, dict[str, Stored]]:
    """Of each 4-bit weight its tensors, by what follows its name."""
    names = {key.partition(f".{STATE}")[0] for key in stored if f".{STATE}" in key}
    parts: dict[str, dict[str, Stored]] = {name: {} for name in names}
    for key, tensor in stored.items():
        if key in parts:
            parts[key][""] = tensor
        elif (cut := key.find(".weight.") + len(".weight")) and key[:cut] in parts:
            parts[key[:cut]][key[cut + 1 :]] = tensor
    return parts
