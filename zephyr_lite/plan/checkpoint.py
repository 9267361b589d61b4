"""Checkpoint: sizes and bytes of a base before anything is loaded.

From config.json and the headers of the safetensors files; no tensor is read.

Bytes are those of the loaded model. A linear of the decoder under NF4 is, of n weights in blocks of
64 (Dettmers et al., arXiv 2305.14314, as bitsandbytes holds it):

    n / 2          codes
    4 n / 64       scales, fp32; under double quantisation 1 n / 64, whose own scales are fp32, one
                   for 256 of them, with their table of 256 fp32 and one fp32 offset
    4 * 16         the table of the 16 codes

All else, and every linear of a base that is not quantised, is in the compute dtype. The files are
found where a training would find them; models that many start from are known without files.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from zephyr_lite.data.sources import resolve
from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.model.base import (
    accept_model,
    compute_dtype,
    find_folder,
    locate,
    stored_quantization,
)
from zephyr_lite.plan.geometry import Geometry, geometry_of, geometry_to_build
from zephyr_lite.plan.headers import ELEMENT, Headers, read_headers, shards
from zephyr_lite.recipe import Base
from zephyr_lite.storage import read_json

CONFIG = "config.json"
BLOCK, GROUP, OFFSET = 64, 256, 4
HEAD = "lm_head.weight"
LINEAR = re.compile(r"\.layers\.\d+\.(self_attn|mlp)\.\w+\.weight$")
STATE = re.compile(r"\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map)$")
PACKED_STATE = ".quant_state.bitsandbytes__"
Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Checkpoint:
    """A base as it will lie in memory.

    linear_bytes: linears of the decoder, scales and code tables included; other_bytes: embedding,
    head, norms and biases. parameters: of the model, a tied head counted once. source: where that
    is known from, a phrase for people.
    """

    geometry: Geometry
    linear_bytes: int
    other_bytes: int
    parameters: int
    source: str


def find_checkpoint(base: Base, *, offline: bool = False, device: Device = "cuda") -> Checkpoint:
    """The base as `read_checkpoint` gives it, from the first of: its folder, the hub's cache, the
    models known here, the headers on the hub; of one that is to be built, from the recipe.

    Args: offline: no connection is opened. device: what `dtype: auto` depends on.
    Raises: RecipeError for a base that would be refused; StorageError for a damaged file;
        MachineError where its sizes cannot be had without a connection.
    """
    if base.build is not None:
        vocabulary = _vocabulary(base.build.tokenizer)
        geometry = geometry_to_build(base.build, vocabulary)
        return _expected(geometry, base, device, "to be built")
    if Path(base.model).expanduser().exists() or base.model.startswith((".", "/", "~")):
        return read_checkpoint(locate(base, offline=True)[0], base, device=device)
    folder = _cached(base)
    if folder is not None:
        return read_checkpoint(folder, base, device=device)
    known = known_base(base.model, base, device=device)
    if known is not None:
        return known
    if offline or os.environ.get("HF_HUB_OFFLINE") == "1":
        raise _unknown(base, "is neither in the local cache nor known here")
    return _from_hub(base, device)


def read_checkpoint(folder: Path, base: Base, *, device: Device = "cuda") -> Checkpoint:
    """A checkpoint's sizes from its config and headers, and its bytes as `base` loads it.

    A checkpoint that bitsandbytes quantised to 4 bits is counted as it was found.
    Raises: RecipeError where config.json lacks a size or names another quantisation; StorageError
        for a file that is missing, cut off or damaged.
    """
    config, where = read_json(folder / CONFIG), f"base.model: {base.model}"
    headers = read_headers(folder)
    return _measured(config, headers, base, device, where, "headers of its files")


def nf4_bytes(weights: int, *, double_quant: bool) -> int:
    """Bytes of one linear of so many weights under NF4; see the module."""
    blocks = math.ceil(weights / BLOCK)
    scales = 4 * blocks
    if double_quant:
        scales = blocks + 4 * math.ceil(blocks / GROUP) + 4 * GROUP + OFFSET
    return math.ceil(weights / 2) + scales + 4 * 16


_MISTRAL = Geometry("mistral", 32, 4096, 14336, 32, 8, 128, 32000, window=4096)
_LLAMA = Geometry("llama", 32, 4096, 14336, 32, 8, 128, 128256)
_QWEN2 = Geometry("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True)
_QWEN3 = Geometry("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, head_norms=True)
# As the config.json of each repository states them; Zephyr's and its dSFT are Mistral's.
KNOWN = {
    "mistralai/Mistral-7B-v0.1": _MISTRAL,
    "mistralai/Mistral-7B-v0.3": dataclasses.replace(_MISTRAL, vocabulary=32768, window=None),
    "HuggingFaceH4/mistral-7b-sft-beta": _MISTRAL,
    "HuggingFaceH4/zephyr-7b-beta": _MISTRAL,
    "alignment-handbook/zephyr-7b-sft-full": _MISTRAL,
    "meta-llama/Llama-3.1-8B": _LLAMA,
    "meta-llama/Meta-Llama-3.1-8B": _LLAMA,
    "Qwen/Qwen2.5-7B": _QWEN2,
    "Qwen/Qwen3-8B": _QWEN3,
    "Qwen/Qwen3-8B-Base": _QWEN3,
}


def known_base(
    model_id: str, base: Base | None = None, *, device: Device = "cuda"
) -> Checkpoint | None:
    """A model whose sizes are written down here, loaded as `base` says; None for any other."""
    geometry = KNOWN.get(model_id)
    if geometry is None:
        return None
    base = base or Base.model_validate({"model": model_id})
    return _expected(geometry, base, device, f"known sizes of {model_id}")


def _measured(
    config: dict[str, Any], headers: Headers, base: Base, device: Device, where: str, source: str
) -> Checkpoint:
    """Add up what the tensors take when they are loaded."""
    stored = stored_quantization(config, where)
    geometry = geometry_of(config, where)
    geometry = dataclasses.replace(geometry, tied=geometry.tied or HEAD not in headers)
    element = compute_dtype(base, torch.device(device)).itemsize
    linear = other = parameters = 0
    for name, (dtype, shape) in headers.items():
        count = math.prod(shape)
        if name == HEAD and geometry.tied:
            continue
        if STATE.search(name):
            linear += count * ELEMENT[dtype]
        elif PACKED_STATE in name:  # text that becomes attributes; of its numbers one is a tensor
            nested = f"{name.partition(PACKED_STATE)[0]}.nested_absmax" in headers
            linear += OFFSET if nested else 0
        elif stored and dtype == "U8":
            linear, parameters = linear + count, parameters + 2 * count
        else:
            parameters += count
            if not LINEAR.search(name) or len(shape) != 2:
                other += element * count
            elif base.quantization == "none" or stored:
                linear += element * count
            else:
                linear += nf4_bytes(count, double_quant=base.double_quant)
    return Checkpoint(geometry, linear, other, parameters, source)


def _expected(geometry: Geometry, base: Base, device: Device, source: str) -> Checkpoint:
    """As `_measured`, of the tensors that a model of these sizes has."""
    g, width, layers = geometry, geometry.head_width, geometry.layers
    element = compute_dtype(base, torch.device(device)).itemsize
    weights = [n * k for n, k in g.linears.values()]
    linear = sum(
        element * n if base.quantization == "none" else nf4_bytes(n, double_quant=base.double_quant)
        for n in weights
    )
    small = 2 * g.hidden
    if g.qkv_bias:
        small += (g.heads + 2 * g.kv_heads) * width
    if g.head_norms:
        small += 2 * width
    other = layers * small + g.hidden + (1 if g.tied else 2) * g.vocabulary * g.hidden
    return Checkpoint(g, layers * linear, element * other, g.weights + other, source)


def _cached(base: Base) -> Path | None:
    """The hub's copy on this machine; None where there is none, or not all of it."""
    key = f"base.model: {base.model}"
    try:
        folder, _ = find_folder(base.model, base.revision, (CONFIG,), key, offline=True)
        if not all(file.is_file() for file, _ in shards(folder)):
            return None
    except (MachineError, StorageError):
        return None
    accept_model(folder, key)
    return folder


def _from_hub(base: Base, device: Device) -> Checkpoint:
    """Config and headers over the network: some kilobytes."""
    import httpx
    from huggingface_hub import errors, get_safetensors_metadata, hf_hub_download

    key = f"base.model: {base.model}"
    try:
        config = read_json(Path(hf_hub_download(base.model, CONFIG, revision=base.revision)))
        found = get_safetensors_metadata(base.model, revision=base.revision)
    except errors.LocalEntryNotFoundError:  # an EntryNotFoundError, though nobody was asked
        raise _unknown(base, "is not in the local cache, and the hub cannot be reached") from None
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
    ):
        raise RecipeError(
            f"{key}: the hub has no such repository, revision or file, or it is gated",
            hint="check the name, or log in with `hf auth login`",
        ) from None
    except (errors.NotASafetensorsRepoError, errors.SafetensorsParsingError):
        raise RecipeError(
            f"{key} has no sound .safetensors file",
            hint="convert pickled weights (.bin, .pt) first; they are never loaded here",
        ) from None
    except (httpx.HTTPError, OSError) as error:
        raise _unknown(base, f"cannot be asked for on the hub ({type(error).__name__})") from None
    headers: Headers = {
        name: (info.dtype, tuple(info.shape))
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return _measured(config, headers, base, device, key, "headers of its files on the hub")


def _unknown(base: Base, what: str) -> MachineError:
    return MachineError(
        f"base.model: {base.model} {what}: its sizes are unknown",
        hint="connect once without --offline, or give a local folder",
    )


def _vocabulary(tokenizer: str) -> int:
    """Pieces of a tokenizer.json. Raises: DataError where it is none."""
    file = resolve(tokenizer)
    try:
        return Tokenizer.from_str(file.read_text(encoding="utf-8")).get_vocab_size()
    except Exception as error:  # `tokenizers` raises Exception itself
        raise DataError(f"not a tokenizer.json: {str(error)[:200]}", file=file) from None
