"""The base model: found, identified by its bytes, quantised once into the cache, loaded.

    source     hub snapshot or local folder, safetensors only, no code of its own
    cache      CACHE/bases/<key>/     an NF4 checkpoint that transformers wrote, sealed by hashes

A source that bitsandbytes quantised to 4 bits already is used as it was found.

Every stage and the export read the cached bytes, so what is trained, referenced and exported is one
set of numbers even where another device or library version would round a scale differently.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.recipe import Base
from zephyr_lite.storage import (
    SEAL,
    cache_folder,
    digest,
    file_digest,
    held,
    is_sealed,
    read_json,
    sealed_folder,
    sweep,
    write_json,
)

FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json",
         "tokenizer.json", "tokenizer_config.json")  # fmt: skip
COPIED = ("tokenizer.json", "tokenizer_config.json")
SETTINGS = ("config.json", "generation_config.json", *COPIED)


@dataclass(frozen=True)
class BaseFiles:
    """A base model on disk, ready to load.

    folder: checkpoint with tokenizer; the bytes that training and export read.
    identity: id, revision, quantisation and one hash over names and contents; goes into manifests
        and keys. `as_found` in its quantisation marks a source that was quantised already.
    """

    folder: Path
    identity: dict[str, Any]

    @property
    def sha256(self) -> str:
        """One hash for the checkpoint's contents."""
        return self.identity["sha256"]

    def departure(self, base: Base) -> str | None:
        """Where the checkpoint is quantised otherwise than the recipe says: a sentence, or None."""
        used = self.identity["quantization"]
        asked = _asked(base)
        if (
            not isinstance(used, dict)
            or used == asked | {"as_found": True}
            or "as_found" not in used
        ):
            return None
        return (
            f"base: {base.model} is quantised already ({_describe(used)}): it is used as it is, "
            f"not as the recipe says ({_describe(asked)})"
        )


def prepare(base: Base, device: torch.device, *, offline: bool = False) -> BaseFiles:
    """Find the base and quantise it into the cache unless that was done before.

    Raises: as `locate`.
    """
    source, revision = locate(base, offline=offline)
    config = read_json(source / "config.json")
    files = {
        path.name: _known_digest(path) for path in sorted(_weights(source) + _settings(source))
    }
    identity = {"model": base.model, "revision": revision, "source": digest(files)}
    found = stored_quantization(config, f"base.model: {base.model}")
    if found or base.quantization == "none":
        used = found | {"as_found": True} if found else "none"
        return BaseFiles(source, identity | {"quantization": used, "sha256": digest(files)})
    quantization = _asked(base) | {"block": 64}
    bases = cache_folder() / "bases"
    folder = bases / digest({"source": files, "quantization": quantization})[:32]
    bases.mkdir(parents=True, exist_ok=True)
    with held(bases / f"{folder.name}.lock"):
        if not is_sealed(folder):
            sweep(bases, folder.name)
            meta = {"source": identity, "quantization": quantization}
            _quantise(source, folder, base, device, meta)
    contents = digest(read_json(folder / SEAL)["files"])
    return BaseFiles(folder, identity | {"quantization": quantization, "sha256": contents})


def load_base(files: BaseFiles, base: Base, device: torch.device) -> torch.nn.Module:
    """Load the checkpoint, frozen, in compute dtype.

    The model stays in train mode for good: bitsandbytes repacks Linear4bit weights for bf16
    inference when a CPU forward runs in eval mode, which would change the numbers under us.
    Dropout is switched where it lives: see `adapters.set_dropout`.
    """
    dtype = compute_dtype(base, device)
    model = _from_pretrained(files.folder, dtype, device)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype, module.compute_type_is_set = dtype, True
    model.requires_grad_(False)
    return model.train()


def compute_dtype(base: Base, device: torch.device) -> torch.dtype:
    """fp32 on a CPU, where bf16 products are about five times slower; bf16 on a GPU."""
    if base.dtype != "auto":
        return getattr(torch, base.dtype)
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def quiet_libraries() -> None:
    """Loading bars and start-up notes of the libraries would fight with our own progress."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("bitsandbytes", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _from_pretrained(
    folder: Path, dtype: torch.dtype | str, device: torch.device, **options: Any
) -> torch.nn.Module:
    quiet_libraries()
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, use_safetensors=True, **options
    )
    return model


def _quantise(
    source: Path, folder: Path, base: Base, device: torch.device, meta: dict[str, Any]
) -> None:
    """Let transformers and bitsandbytes quantise shard by shard, and write the result once."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=base.quantization,
        bnb_4bit_use_double_quant=base.double_quant,
        bnb_4bit_compute_dtype=compute_dtype(base, device),
    )
    model: Any = _from_pretrained(source, "auto", device, quantization_config=config)
    with sealed_folder(folder, meta) as part:
        model.save_pretrained(part)
        for name in COPIED:  # byte for byte: a tokenizer that is rebuilt may tokenise otherwise
            if (source / name).exists():
                (part / name).write_bytes((source / name).read_bytes())


def locate(base: Base, *, offline: bool = False) -> tuple[Path, str | None]:
    """Folder and revision of the source checkpoint; a hub model is downloaded.

    Raises: RecipeError when it cannot be found or is not acceptable; MachineError when a hub id
        is asked for without a connection.
    """
    key = f"base.model: {base.model}"
    folder, revision = find_folder(base.model, base.revision, FILES, key, offline=offline)
    accept_model(folder, key)
    return folder, revision


def find_folder(
    name: str, revision: str | None, files: Sequence[str], key: str, *, offline: bool
) -> tuple[Path, str | None]:
    """Local folder, or snapshot of a hub repository with these files only, and its revision.

    Args: files: patterns of what is downloaded. key: what errors begin with.
    Raises: as `locate`.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local, None
    if local.exists() or name.startswith((".", "/", "~")):
        raise RecipeError(f"{key} is not a folder", hint="give a local folder or a hub id")
    try:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=list(files),
            local_files_only=offline or os.environ.get("HF_HUB_OFFLINE") == "1",
        )
    except HFValidationError:
        raise RecipeError(
            f"{key} is neither a folder nor a hub id", hint="check the path, or give OWNER/NAME"
        ) from None
    except RepositoryNotFoundError:
        raise RecipeError(
            f"{key}: the hub has no such repository, or it is gated",
            hint="check the name, or log in with `hf auth login`",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineError(
            f"{key} is not in the local cache and cannot be downloaded ({type(error).__name__})",
            hint="connect once without --offline, or give a local folder",
        ) from None
    return Path(folder), Path(folder).name


def accept_model(source: Path, key: str) -> None:
    """Raises: RecipeError beginning with `key` for a model folder that we refuse to load."""
    if not (source / "config.json").is_file():
        raise RecipeError(f"{key} has no config.json")
    config = read_json(source / "config.json")
    if "auto_map" in config:
        raise RecipeError(
            f"{key} brings code of its own (auto_map); that is never executed",
            hint="use a model whose class transformers ships",
        )
    if (kind := config.get("model_type")) not in transformers.CONFIG_MAPPING:
        raise RecipeError(
            f"{key} has model type {kind!r}, unknown to transformers {transformers.__version__}",
            hint="use a model whose class transformers ships",
        )
    stored_quantization(config, key)
    if not _weights(source):
        raise RecipeError(
            f"{key} has no .safetensors file",
            hint="convert pickled weights (.bin, .pt) first; they are never loaded here",
        )
    if not (source / "tokenizer.json").is_file():
        raise RecipeError(f"{key} has no tokenizer.json")


def stored_quantization(config: dict[str, Any], key: str) -> dict[str, Any] | None:
    """How a checkpoint is quantised already: `type` and `double_quant`; None for plain weights.

    Raises: RecipeError that names a quantisation which is not bitsandbytes' 4 bits.
    """
    stored = config.get("quantization_config") or config.get("compression_config")
    if not stored:
        return None
    method = stored.get("quant_method", "bitsandbytes")
    is_4bit = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    if method != "bitsandbytes" or not is_4bit:
        kind = "bitsandbytes int8" if method == "bitsandbytes" else str(method)
        raise RecipeError(
            f"{key} is quantised as {kind}; no adapter can be trained on that here",
            hint="use the plain checkpoint, or one that bitsandbytes quantised to 4 bits",
        )
    double_quant = bool(stored.get("bnb_4bit_use_double_quant", False))
    return {"type": stored.get("bnb_4bit_quant_type", "fp4"), "double_quant": double_quant}


def _asked(base: Base) -> dict[str, Any]:
    return {"type": base.quantization, "double_quant": base.double_quant}


def _describe(quantization: dict[str, Any]) -> str:
    if quantization["type"] == "none":
        return "none"
    return f"{quantization['type']}, double quant {'on' if quantization['double_quant'] else 'off'}"


def _weights(source: Path) -> list[Path]:
    return list(source.glob("*.safetensors"))


def _settings(source: Path) -> list[Path]:
    """What makes another model of the same weights: geometry, rope, eps, tokenizer."""
    return [source / name for name in SETTINGS if (source / name).is_file()]


def _known_digest(path: Path) -> str:
    """SHA-256 of a file, remembered by path, size and time so that 14 GB are hashed once."""
    memory = cache_folder() / "digests.json"
    known = read_json(memory) if memory.exists() else {}
    stat = path.resolve().stat()
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    if key not in known:
        known[key] = file_digest(path)
        write_json(memory, known)
    return known[key]
