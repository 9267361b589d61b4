"""The tensors of a checkpoint folder by their Hugging Face names, as training saw them, in fp32.

Two kinds of folder: plain fp32/fp16/bf16 safetensors, and bitsandbytes 4-bit as `save_pretrained`
writes it, where `X.weight` is packed codes and its siblings `X.weight.absmax`,
`X.weight.quant_map`, `X.weight.quant_state.bitsandbytes__nf4`, ... say how to read them. A 4-bit
weight is dequantised to the dtype in its quant state, which is the matrix the forward pass of
training multiplied by, and only then widened to fp32.

Only safetensors are read. Pickled weights, `auto_map` and other quantisations are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from bitsandbytes.utils import unpack_tensor_to_dict
from safetensors import SafetensorError, safe_open

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.model.frozen_weights import dequantised
from zephyr_lite.storage import read_json

QUANT_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
FLOATS = {"F32", "F16", "BF16"}
# Old Llama checkpoints carry these buffers; the model recomputes them from the config.
BUFFERS = ("rotary_emb.inv_freq",)


def open_safetensors(path: Path) -> Any:
    """A lazily reading handle. Raises: StorageError when the file is missing or damaged."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None


class BaseWeights:
    """A checkpoint folder, opened but not loaded. Names are those of `state_dict()`."""

    def __init__(self, folder: Path) -> None:
        """Read config and headers.

        Raises: StorageError for a missing or damaged file, RecipeError for a kind of checkpoint
            that is not supported, DataError for tensors that make no sense.
        """
        self.folder = folder
        self.config = read_config(folder)
        self._handles = [open_safetensors(path) for path in _weight_files(folder)]
        self._home = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        self._states = {
            key.removesuffix(kind): key
            for key in self._home
            for kind in QUANT_STATES
            if key.endswith(kind)
        }
        self._shapes = {name: self._read_shape(name) for name in self._weight_names()}

    def names(self) -> list[str]:
        """Weights in the order of the files; the siblings of packed weights are not listed."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dequantised weight."""
        return self._shapes[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The weight as fp32 on the CPU; a fresh tensor the caller may change."""
        if name in self._states:
            return self._dequantise(name).to(torch.float32)
        return self._home[name].get_tensor(name).to(torch.float32, copy=True)

    def _weight_names(self) -> list[str]:
        siblings = {
            key for name in self._states for key in self._home if key.startswith(f"{name}.")
        }
        return [
            key
            for key in self._home
            if key not in siblings and not any(key.endswith(buffer) for buffer in BUFFERS)
        ]

    def _read_shape(self, name: str) -> tuple[int, ...]:
        if name in self._states:
            key = self._states[name]
            return tuple(unpack_tensor_to_dict(self._home[key].get_tensor(key))["shape"])
        header = self._home[name].get_slice(name)
        if header.get_dtype() not in FLOATS:
            raise DataError(
                f"tensor {name} has dtype {header.get_dtype()}",
                file=self.folder,
                hint="give a plain fp16, bf16 or fp32 checkpoint, or a bitsandbytes 4-bit one",
            )
        return tuple(header.get_shape())

    def _dequantise(self, name: str) -> torch.Tensor:
        siblings = {
            key: handle.get_tensor(key)
            for key, handle in self._home.items()
            if key.startswith(f"{name}.")
        }
        try:
            state = QuantState.from_dict(siblings, device=torch.device("cpu"))
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"quantisation state of {name} is damaged: {error!r}", file=self.folder
            ) from None
        packed = self._home[name].get_tensor(name)
        if state.quant_type == "nf4":  # bitsandbytes' CPU code misreads some widths
            return dequantised(packed, state, state.dtype or torch.float32)
        return dequantize_4bit(packed, quant_state=state)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as a dict.

    Raises: RecipeError for `auto_map` (we never run code from a checkpoint) and for quantisations
        other than bitsandbytes 4-bit.
    """
    if not (folder / "config.json").is_file():
        raise StorageError(f"{folder}: has no config.json", hint="give a model folder")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise DataError("is not a JSON object", file=folder / "config.json")
    if "auto_map" in config:
        raise RecipeError(
            f"{folder}/config.json: auto_map asks for code from the checkpoint to be run",
            hint="use a model whose class is part of transformers",
        )
    quantisation = config.get("quantization_config") or {}
    method = quantisation.get("quant_method", "bitsandbytes")
    if quantisation and (method != "bitsandbytes" or quantisation.get("load_in_8bit")):
        kind = f"{method} 8-bit" if method == "bitsandbytes" else method
        raise RecipeError(
            f"{folder}/config.json: {kind} checkpoints cannot be exported",
            hint="export from the plain or the bitsandbytes 4-bit checkpoint",
        )
    return config


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            if Path(name).name != name:
                raise DataError(f"names a file outside its folder: {name!r}", file=index)
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = next((p.name for p in folder.glob("*.bin")), None)
    raise StorageError(
        f"{folder}: has no model.safetensors" + (f", only {pickled}" if pickled else ""),
        hint="convert pickled weights to safetensors; they are never loaded here",
    )
