"""Write the trained model as plain sharded safetensors that stock transformers loads.

Streams: the header of a shard is known from the shapes alone, so each tensor is folded, rounded
once and written, and memory stays at one tensor. Format: safetensors, 8-byte little-endian header
length, JSON header, data. Only files with fixed names are written, with fields from a fixed list:
a tokenizer's own files can name other files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.storage import read_json, sealed_folder

Dtype = Literal["float16", "bfloat16", "float32"]
DTYPES = {
    "float16": (torch.float16, "F16"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float32": (torch.float32, "F32"),
}
MAX_SHARD_BYTES = 5_000_000_000
TOKENIZER_FIELDS = (
    "add_bos_token", "add_eos_token", "bos_token", "clean_up_tokenization_spaces", "eos_token",
    "legacy", "model_max_length", "pad_token", "padding_side", "tokenizer_class", "unk_token",
)  # fmt: skip


def write_merged(
    model: FoldedModel,
    tokenizer_folder: Path,
    chat_template: str,
    out: Path,
    dtype: Dtype = "float16",
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write a model folder atomically; an earlier one is replaced.

    Args: dtype: of all tensors. float16 keeps three more bits of a small adapter than bfloat16.
    Returns: report with `folder`, `dtype`, `shards`, `tensors`, `bytes`.
    Raises: DataError naming a tensor that does not fit float16; StorageError, RecipeError.
    """
    if dtype not in DTYPES:
        raise RecipeError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    tokenizer = tokenizer_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise StorageError(f"{tokenizer_folder}: has no tokenizer.json")
    shards = _shards(model, DTYPES[dtype][0].itemsize, max_shard_bytes)
    with sealed_folder(out, {"kind": "merged model", "dtype": dtype}) as folder:
        for file, names in shards.items():
            _write_shard(folder / file, model, names, dtype)
        if len(shards) > 1:
            _write_index(folder, model, shards, dtype)
        _write_text(folder / "config.json", _config(model.config, dtype))
        _write_text(folder / "tokenizer_config.json", _tokenizer_config(tokenizer_folder))
        ids = {k: model.config[k] for k in ("bos_token_id", "eos_token_id") if k in model.config}
        _write_text(folder / "generation_config.json", ids)
        (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
        shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return {
        "folder": out.name,
        "dtype": dtype,
        "shards": len(shards),
        "tensors": len(model.names()),
        "bytes": sum((out / file).stat().st_size for file in shards),
    }


def _shards(model: FoldedModel, itemsize: int, limit: int) -> dict[str, list[str]]:
    """File name -> tensor names, filled in order up to the limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name in model.names():
        size = int(np.prod(model.shape(name))) * itemsize
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _write_shard(path: Path, model: FoldedModel, names: list[str], dtype: Dtype) -> None:
    torch_dtype, label = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + int(np.prod(model.shape(name))) * torch_dtype.itemsize
        header[name] = {
            "dtype": label,
            "shape": list(model.shape(name)),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for rounded in _rounded(model, names, torch_dtype):
            rounded.flatten().view(torch.uint8).numpy().tofile(handle)


def _rounded(model: FoldedModel, names: list[str], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    for name in names:
        tensor = model.tensor(name).to(dtype)
        if not torch.isfinite(tensor).all():
            raise DataError(f"tensor {name} does not fit {dtype}", hint="write bfloat16")
        yield tensor


def _write_index(
    folder: Path, model: FoldedModel, shards: dict[str, list[str]], dtype: Dtype
) -> None:
    parameters = sum(int(np.prod(model.shape(name))) for name in model.names())
    _write_text(
        folder / "model.safetensors.index.json",
        {
            "metadata": {"total_size": parameters * DTYPES[dtype][0].itemsize},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        },
    )


def _config(config: dict[str, Any], dtype: Dtype) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "torch_dtype"}
    return {**kept, "dtype": dtype}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    kept = {field: config[field] for field in TOKENIZER_FIELDS if field in config}
    kept = {k: v["content"] if isinstance(v, dict) else v for k, v in kept.items()}
    # The generic class reads tokenizer.json as it is; the Llama class rewrites its normaliser.
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}


def _write_text(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
