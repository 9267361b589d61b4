"""Write the trained model as plain sharded safetensors that stock transformers loads.

Streams: the header of a shard is known from names, types and shapes alone, so each tensor is
rounded once, appended and forgotten, and memory stays at one tensor. A shard is 8 bytes of header
length (little-endian), a JSON header, and the tensors one behind the other.

    NAME.part/model-00001-of-00003.safetensors.part    shards in the making, with their journals
    NAME/                                              the sealed folder, once all of it is there
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.folders.model_files import Dtype, json_bytes, model_files
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.weights.base_weights import open_safetensors
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.storage import sealed_folder, sweep

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
TORCH_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header names it; `dtype` is one of safetensors' names, such as F16."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


class ShardedFolder:
    """A model folder in the making: shards that survive a kill, and small files beside them."""

    def __init__(
        self,
        out: Path,
        tensors: Sequence[StoredTensor],
        identity: str,
        files: Mapping[str, bytes],
        *,
        meta: Mapping[str, Any] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plan the folder; nothing is written yet.

        Args:
            tensors: in the order in which they will be appended.
            identity: digest of everything the tensors' values depend on.
            files: name -> contents of everything but shards and index.
            meta: what the seal says the folder is.
        """
        self.out, self.part = out, out.with_name(f"{out.name}.part")
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._meta, self._files = dict(meta or {}), dict(files)
        groups = _grouped(tensors, max_shard_bytes)
        self._home = {tensor.name: file for file, group in groups.items() for tensor in group}
        if len(groups) > 1:
            self._files["model.safetensors.index.json"] = json_bytes(
                {
                    "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
                    "weight_map": self._home,
                }
            )
        self._shards = {
            file: PartFile(
                self.part / file, _header(group), [(t.name, t.nbytes) for t in group], identity
            )
            for file, group in groups.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all files, without the seal."""
        shards = sum(shard.nbytes for shard in self._shards.values())
        return shards + sum(map(len, self._files.values()))

    def begin(self) -> None:
        """Open every shard, or go on where it stopped; shards of another plan are removed.

        Raises: LockedError when another process writes them, StorageError.
        """
        sweep(self.out.parent, self.out.name)
        for shard in self._shards.values():
            # Killed right behind the seal: the finished folder has the file too, and keeps it.
            if shard.part.exists() and shard.part.stat().st_nlink > 1:
                shard.part.unlink()
            shard.begin()
        ours = {path for shard in self._shards.values() for path in (shard.part, shard.journal)}
        for path in set(self.part.glob("*.part*")) - ours:
            path.unlink()

    def has(self, name: str) -> bool:
        """Whether a tensor is stored already."""
        return self._shards[self._home[name]].has(name)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        """Store the next tensor. Raises: StorageError; ValueError for one that was not planned."""
        planned = self._tensors[name]
        if (tensor.dtype, tuple(tensor.shape)) != (TORCH_DTYPES[planned.dtype], planned.shape):
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}, planned {planned}")
        data = tensor.contiguous().flatten().view(torch.uint8).numpy()
        self._shards[self._home[name]].append(name, data)

    def finish(self) -> dict[str, Any]:
        """Compare every shard with its journal and its header with the plan.

        Returns: `folder`, `shards`, `tensors`, `bytes` and, by shard, `files` with size and hash.
        Raises: StorageError when the disk holds something else than was written.
        """
        files = {}
        for file, shard in self._shards.items():
            files[file] = {"bytes": shard.nbytes, "sha256": shard.finish()}
            planned = [t for t in self._tensors.values() if self._home[t.name] == file]
            if _described(shard.part) != {t.name: (t.dtype, t.shape) for t in planned}:
                raise StorageError(f"{shard.part}: its header is not the one that was written")
        return {
            "folder": self.out.name,
            "shards": len(files),
            "tensors": len(self._tensors),
            "bytes": sum(entry["bytes"] for entry in files.values()),
            "files": files,
        }

    def commit(self) -> None:
        """Seal the folder under its final name; an earlier one is replaced."""
        with sealed_folder(self.out, self._meta) as folder:
            for file, shard in self._shards.items():
                _take(shard.part, folder / file)
            for name, contents in self._files.items():
                (folder / name).write_bytes(contents)
        self.close()
        shutil.rmtree(self.part, ignore_errors=True)

    def close(self) -> None:
        """Let go of files and locks; what is written stays for the next `begin`."""
        for shard in self._shards.values():
            shard.close()


class MergedTarget:
    """The trained model in one floating-point type: a `Target` of the export's one pass."""

    label = "merged"

    def __init__(
        self,
        model: FoldedModel,
        tokenizer_folder: Path,
        chat_template: str,
        out: Path,
        dtype: Dtype = "float16",
        *,
        identity: str,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Plan it. `dtype`: float16 keeps three more bits of a small adapter than bfloat16.

        Raises: RecipeError for another dtype, StorageError without tokenizer.json.
        """
        if dtype not in DTYPES:
            raise RecipeError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
        self._dtype: Dtype = dtype
        self._folder = ShardedFolder(
            out,
            [StoredTensor(name, DTYPES[dtype], model.shape(name)) for name in model.names()],
            identity,
            model_files(model.config, tokenizer_folder, chat_template, dtype),
            meta={"kind": "merged model", "dtype": dtype},
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
        """Whether a tensor is stored."""
        return self._folder.has(name)

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Round a tensor once and store it. Raises: DataError when its values do not fit."""
        self._folder.append(name, rounded(name, weight, self._dtype))

    def finish(self) -> dict[str, Any]:
        """Read back; the entry of the report."""
        return {**self._folder.finish(), "dtype": self._dtype, "notes": []}

    def commit(self) -> None:
        """Seal it under its final name."""
        self._folder.commit()

    def close(self) -> None:
        """Let go of it; it can be resumed."""
        self._folder.close()


def refuse_bnb_merged() -> NoReturn:
    """What a merged bitsandbytes 4-bit model was asked for answers."""
    raise RecipeError(
        "a merged 4-bit bitsandbytes model is not written: rounding back to NF4 removes most of "
        "the adapter, and all of a DPO adapter, whose entries are smaller than half an NF4 step",
        hint="use the adapter with its base (export.lora_gguf, or the run's adapter folder), "
        "export.merged for 16 bits, or export.w4a16 for 4 bits that are rounded once",
    )


def rounded(name: str, weight: torch.Tensor, dtype: Dtype) -> torch.Tensor:
    """A tensor in the type it is stored in. Raises: DataError when a value does not fit."""
    tensor = weight.to(TORCH_DTYPES[DTYPES[dtype]])
    if not torch.isfinite(tensor).all():
        raise DataError(
            f"tensor {name} does not fit {dtype}", hint="set export.merged_dtype=bfloat16"
        )
    return tensor


def _grouped(tensors: Sequence[StoredTensor], limit: int) -> dict[str, list[StoredTensor]]:
    """File name -> its tensors, filled in order up to the limit, bytes."""
    groups: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, start=1)}


def _header(tensors: Sequence[StoredTensor]) -> bytes:
    """Length and JSON of a shard's header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data begins at a multiple of eight
    return len(text).to_bytes(8, "little") + text


def _described(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of every tensor, as the safetensors library reads the file."""
    with open_safetensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}


def _take(source: Path, target: Path) -> None:
    """A second name for a shard: whatever stops us before the seal, the first is still there."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links; a kill before the seal then costs the shard
        os.rename(source, target)
