"""bitsandbytes' 4-bit weights in a checkpoint: checked by their headers, read in chunks.

    w[e] = quant_map[nibble(e)] * scale[e // blocksize]
    scale[b] = absmax[b], or nested: nested_quant_map[absmax[b]] * nested_absmax[b // g] + offset

A byte holds weights 2i (high nibble) and 2i + 1; blocks run across rows. The product is rounded in
fp32 and then to the dtype in the state, which is the matrix that the forward pass of training
multiplied by: bit for bit what bitsandbytes gives, whose CPU code misreads some widths
and takes several copies of the weight.

A byte is looked up as the pair of fp32 values that it stands for, one chunk at a time, so that a
chunk stays in the cache and nothing of the weight's size exists but the weight.
Source: Dettmers et al., arXiv 2305.14314.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zephyr_lite.errors import DataError

STATE = "quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CHUNK = 1 << 18  # weights; 1 MiB of fp32, and a multiple of every blocksize
BLOCKSIZES = tuple(64 << i for i in range(7))


@dataclass(frozen=True)
class PackedWeight:
    """One weight, opened but not read.

    parts: reader of each of its tensors by what follows the weight's name ("" for the codes).
    dtype: what its values are rounded to. nested: (blocksize, offset) of quantised scales, or None.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocksize: int
    nested: tuple[int, float] | None
    parts: Mapping[str, Any]

    def read(self, out: torch.Tensor) -> None:
        """Dequantise into `out`: fp32, contiguous, flat, as many elements, rounded up to even."""
        scale, pairs, packed = self.scales(), self._pairs(), self._packed()
        values, size = out.numpy().view(np.uint64), math.prod(self.shape)
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            bytes_ = slice(start // 2, (stop + 1) // 2)
            np.take(pairs, packed[bytes_], out=values[bytes_], mode="clip")
            self._scale(out[start:stop], scale[start // self.blocksize :])

    def codes(self, rows: slice) -> torch.Tensor:
        """Codes 0..15 of some rows, int64 [rows, columns]. For a look at samples."""
        columns = math.prod(self.shape[1:])
        start, stop = rows.start * columns, rows.stop * columns
        packed = torch.from_numpy(self._packed()[start // 2 : (stop + 1) // 2].copy()).long()
        nibbles = torch.stack([packed >> 4, packed & 15], 1).flatten()
        return nibbles[start % 2 :][: stop - start].view(-1, columns)

    def levels(self) -> torch.Tensor:
        """What the 16 codes stand for, fp32."""
        return self.parts["quant_map"].get_tensor().float()

    def scales(self) -> torch.Tensor:
        """One fp32 scale a block."""
        absmax = self.parts["absmax"].get_tensor()
        if self.nested is None:
            return absmax.float()
        group, offset = self.nested
        outer = self.parts["nested_absmax"].get_tensor().float()
        inner = self.parts["nested_quant_map"].get_tensor().float()[absmax.int()]
        return inner * outer.repeat_interleave(group)[: len(inner)] + offset

    def _scale(self, chunk: torch.Tensor, scale: torch.Tensor) -> None:
        whole = chunk.numel() // self.blocksize
        blocks = chunk[: whole * self.blocksize].view(whole, self.blocksize)
        blocks.mul_(scale[:whole, None])
        if rest := chunk.numel() - blocks.numel():
            chunk[-rest:].mul_(scale[whole])
        if self.dtype != torch.float32:
            chunk.copy_(chunk.to(self.dtype))

    def _packed(self) -> np.ndarray:
        return self.parts[""].get_tensor().flatten().numpy()

    def _pairs(self) -> np.ndarray:
        byte = torch.arange(256)
        levels = self.levels()
        pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)
        return pairs.contiguous().numpy().view(np.uint64).ravel()


@dataclass(frozen=True)
class Stored:
    """One tensor of a safetensors file, read when asked for."""

    file: Path
    handle: Any
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """From the header."""
        return tuple(self.handle.get_slice(self.key).get_shape())

    @property
    def dtype(self) -> str:
        """safetensors' name of it, "BF16"."""
        return self.handle.get_slice(self.key).get_dtype()

    def get_tensor(self) -> torch.Tensor:
        """A view of the file's bytes; not to be written to."""
        return self.handle.get_tensor(self.key)


def open_packed(name: str, parts: Mapping[str, Stored]) -> PackedWeight:
    """Check one 4-bit weight by headers and state; its codes and scales are not read.

    Args: parts: its tensors, the codes under "", the others by what follows the name and a dot.
    Raises: DataError naming file and tensor that is missing or has a wrong length or dtype.
    """
    key = next(k for k in parts if k.startswith(STATE))
    state = _read_state(name, parts[key])
    shape = tuple(int(n) for n in state["shape"])
    size, blocksize = math.prod(shape), int(state["blocksize"])
    blocks = -(-size // blocksize)
    is_nested = "nested_blocksize" in state or "nested_absmax" in parts
    wanted = {"": ("U8", -(-size // 2)), "quant_map": ("F32", 16)}
    wanted["absmax"] = ("U8" if is_nested else "F32", blocks)
    if is_nested:
        group = int(state.get("nested_blocksize", 256))
        wanted |= {"nested_absmax": ("F32", -(-blocks // group)), "nested_quant_map": ("F32", 256)}
    for part, (dtype, length) in wanted.items():
        _check_part(name, part, parts, dtype, length)
    if foreign := sorted(parts.keys() - wanted.keys() - {key}):
        where = parts[foreign[0]]
        raise DataError(f"tensor {where.key} is no part of a 4-bit weight", file=where.file)
    nested = (group, float(state["nested_offset"])) if is_nested else None
    return PackedWeight(shape, DTYPES[state["dtype"]], blocksize, nested, parts)


def _read_state(name: str, stored: Stored) -> dict[str, Any]:
    try:
        state = json.loads(bytes(stored.get_tensor().tolist()).decode())
        is_sound = (
            state["quant_type"] in KINDS
            and stored.key.endswith(STATE + state["quant_type"])
            and state["dtype"] in DTYPES
            and int(state["blocksize"]) in BLOCKSIZES
            and len(state["shape"]) == 2
            and all(int(n) > 0 for n in state["shape"])
            and ("nested_blocksize" not in state or math.isfinite(state["nested_offset"]))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        is_sound, state = False, {}
    if not is_sound:
        raise DataError(
            f"tensor {stored.key}: the quantisation state of {name} is damaged", file=stored.file
        )
    return state


def _check_part(name: str, part: str, parts: Mapping[str, Stored], dtype: str, length: int) -> None:
    if part not in parts:
        first = next(iter(parts.values()))
        raise DataError(f"tensor {name}.{part} is missing", file=first.file)
    stored = parts[part]
    if stored.dtype != dtype or math.prod(stored.shape) != length:
        raise DataError(
            f"tensor {stored.key} is {stored.dtype} {list(stored.shape)}; the quantisation state "
            f"of {name} asks for {length} elements of {dtype}",
            file=stored.file,
        )
