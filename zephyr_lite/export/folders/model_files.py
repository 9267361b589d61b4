"""The small files of a model folder: config, tokenizer, template.

Only files with fixed names are made, with fields from a fixed list: a tokenizer's own files can
name other files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from zephyr_lite.errors import StorageError
from zephyr_lite.storage import read_json

Dtype = Literal["float16", "bfloat16", "float32"]
TOKENIZER_FIELDS = (
    "add_bos_token", "add_eos_token", "bos_token", "clean_up_tokenization_spaces", "eos_token",
    "legacy", "model_max_length", "pad_token", "padding_side", "tokenizer_class", "unk_token",
)  # fmt: skip


def model_files(
    config: Mapping[str, Any],
    tokenizer_folder: Path,
    chat_template: str,
    dtype: Dtype,
    **more: Any,
) -> dict[str, bytes]:
    """Everything in a model folder but the tensors. Args: more: further fields of config.json.

    Raises: StorageError without tokenizer.json, which is copied byte for byte.
    """
    tokenizer = tokenizer_folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise StorageError(f"{tokenizer_folder}: has no tokenizer.json")
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id") if k in config}
    return {
        "chat_template.jinja": chat_template.encode(),
        "config.json": json_bytes({**_config(config, dtype), **more}),
        "generation_config.json": json_bytes(ids),
        "tokenizer.json": tokenizer.read_bytes(),
        "tokenizer_config.json": json_bytes(_tokenizer_config(tokenizer_folder)),
    }


def json_bytes(value: Any) -> bytes:
    """A JSON file of a model folder."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _config(config: Mapping[str, Any], dtype: Dtype) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if not k.startswith("_") and k != "torch_dtype"}
    # Before version 5, transformers (and vLLM with it) reads RoPE from two fields of other names,
    # and takes a base of 10000 where there are none.
    rope = dict(kept.get("rope_parameters") or {})
    if "rope_theta" in rope:
        kept["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        kept["rope_scaling"] = rope
    return {**kept, "dtype": dtype}


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    kept = {field: config[field] for field in TOKENIZER_FIELDS if field in config}
    kept = {k: v["content"] if isinstance(v, dict) else v for k, v in kept.items()}
    # The generic class reads tokenizer.json as it is; the Llama class rewrites its normaliser.
    return {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
