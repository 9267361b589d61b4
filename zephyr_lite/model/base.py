"""The base model: found, identified by its bytes, quantised once into the cache, loaded.

    source     hub snapshot or local folder, safetensors only, no code of its own
    cache      CACHE/bases/<key>/     an NF4 checkpoint that transformers wrote, sealed by hashes

Every stage and the export read the cached bytes, so what is trained, referenced and exported is one
set of numbers even where another device or library version would round a scale differently.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from bitsandbytes.nn.modules import Linear4bit
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
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
    identity: id, revision and one hash over names and contents; goes into manifests and keys.
    """

    folder: Path
    identity: dict[str, Any]

    @property
    def sha256(self) -> str:
        """One hash for the checkpoint's contents."""
        return self.identity["sha256"]


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
    if base.quantization == "none" or "quantization_config" in config:
        return BaseFiles(source, identity | {"quantization": "as found", "sha256": digest(files)})
    quantization = {"type": base.quantization, "double_quant": base.double_quant, "block": 64}
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
    folder, revision = _find(base, offline)
    _accept(folder, base.model)
    return folder, revision


def _find(base: Base, offline: bool) -> tuple[Path, str | None]:
    local = Path(base.model).expanduser()
    if local.is_dir():
        return local, None
    if local.exists() or base.model.startswith((".", "/", "~")):
        raise RecipeError(
            f"base.model: {base.model} is not a folder", hint="a local folder or hub id"
        )
    try:
        folder = snapshot_download(
            base.model,
            revision=base.revision,
            allow_patterns=list(FILES),
            local_files_only=offline or os.environ.get("HF_HUB_OFFLINE") == "1",
        )
    except RepositoryNotFoundError:
        raise RecipeError(
            f"base.model: the hub has no {base.model}, or it is gated",
            hint="check the name, or log in with `hf auth login`",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineError(
            f"base.model: {base.model} is not in the local cache and cannot be downloaded "
            f"({type(error).__name__})",
            hint="connect once without --offline, or give a local folder",
        ) from None
    return Path(folder), Path(folder).name


def _accept(source: Path, name: str) -> None:
    """Raises: RecipeError for what we refuse to load."""
    if not (source / "config.json").is_file():
        raise RecipeError(f"base.model: {source} has no config.json")
    config = read_json(source / "config.json")
    if "auto_map" in config:
        raise RecipeError(
            f"base.model: {name} brings code of its own (auto_map); that is never executed",
            hint="use a model whose class transformers ships",
        )
    if not _weights(source):
        raise RecipeError(
            f"base.model: {source} has no .safetensors file",
            hint="convert pickled weights (.bin, .pt) first; they are never loaded here",
        )
    if not (source / "tokenizer.json").is_file():
        raise RecipeError(f"base.model: {source} has no tokenizer.json")


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
