"""Write the trained model as GGUF, tensor by tensor, and read the file back before it exists.

Mistral and Llama share the architecture `llama` in GGUF. Their rotary embedding pairs neighbouring
rows (2i, 2i+1) of a head there and rows (i, i + d/2) in transformers, so the rows of q_proj and
k_proj are permuted. Format: gguf.md of ggml (MIT).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import DataError, MachineError, RecipeError, StorageError
from zephyr_lite.export.fold import FoldedModel
from zephyr_lite.export.quantise import BLOCK, byte_size, encode
from zephyr_lite.export.vocabulary import Vocabulary, read_vocabulary
from zephyr_lite.storage import file_digest

Quant = Literal["f32", "f16", "q8_0"]
KINDS = {"f32": Kind.F32, "f16": Kind.F16, "q8_0": Kind.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
ARCHITECTURES = ("MistralForCausalLM", "LlamaForCausalLM")
REQUIRED = {
    "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "rms_norm_eps", "vocab_size",
}  # fmt: skip
ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: where it comes from and how it is stored."""

    source: str
    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def nbytes(self) -> int:
        """Bytes of its data, without padding."""
        return byte_size(self.shape, self.kind)


def write_gguf(
    model: FoldedModel,
    tokenizer_folder: Path,
    chat_template: str,
    out: Path,
    quant: Quant,
    *,
    name: str,
    on_tensor: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write `out` atomically: plan, header, tensors one at a time, fsync, re-read, rename.

    Args:
        chat_template: Jinja, stored verbatim.
        quant: type of the matrices; 1-D tensors are always F32.
        name: `general.name`.
        on_tensor: called with (tensors written, tensors in all).
    Returns: report with `file`, `quant`, `tensors`, `parameters`, `bytes`, `sha256`, `kept_f16`
        (matrices whose rows do not divide into blocks) and `notes`.
    Raises: RecipeError, DataError, MachineError (disk), StorageError.
    Memory: about three copies of the largest tensor.
    """
    check_architecture(model.config)
    vocabulary = read_vocabulary(tokenizer_folder, model.config["vocab_size"])
    plan = plan_tensors(model, quant)
    part = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_disk(out.parent, sum(t.nbytes for t in plan))
        _write(
            part, model, plan, _metadata(model, vocabulary, chat_template, quant, name), on_tensor
        )
        check_gguf(part, plan, chat_template)
        digest = file_digest(part)
        os.replace(part, out)
    except StorageError:  # itself an OSError: it already says what is wrong
        raise
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return {
        "file": out.name,
        "quant": quant,
        "tensors": len(plan),
        "parameters": sum(int(np.prod(t.shape)) for t in plan),
        "bytes": out.stat().st_size,
        "sha256": digest,
        "kept_f16": [t.name for t in plan if quant == "q8_0" and t.kind == Kind.F16],
        "notes": _notes(model.config),
    }


def check_architecture(config: dict[str, Any]) -> None:
    """Refuse what GGUF's `llama` architecture would compute otherwise.

    Raises: RecipeError naming the field; DataError for a config that lacks one.
    """
    named = config.get("architectures") or ["none"]
    if named[0] not in ARCHITECTURES:
        raise RecipeError(
            f"architecture {named[0]} cannot be exported to GGUF, only Mistral, Llama"
        )
    if missing := sorted(REQUIRED - config.keys()):
        raise DataError(f"config.json lacks {', '.join(missing)}")
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise RecipeError(f"rope scaling {rope} cannot be exported to GGUF yet")
    if rope.get("partial_rotary_factor", 1) != 1 or "rope_theta" not in rope:
        raise RecipeError(f"rope parameters {rope} cannot be exported to GGUF")
    if config.get("hidden_act", "silu") != "silu":
        raise RecipeError(f"hidden_act {config['hidden_act']!r} cannot be exported to GGUF")


def plan_tensors(model: FoldedModel, quant: Quant) -> list[Planned]:
    """Name, shape and type of every tensor, in the order of the file.

    Raises: DataError naming a tensor the architecture does not have, or one it lacks.
    """
    layers = model.config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    plan = []
    for source in model.names():
        name = names.get_name(source, (".weight", ".bias"))
        if name is None:
            raise DataError(f"tensor {source} has no place in a GGUF of architecture llama")
        shape = model.shape(source)
        plan.append(Planned(source, name, shape, _kind(shape, quant)))
    rows = model.shape("model.embed_tokens.weight")[0]
    if rows != model.config["vocab_size"]:
        raise DataError(
            f"the embedding has {rows} rows, vocab_size is {model.config['vocab_size']}"
        )
    per_layer = 9  # two norms, four projections of attention, three of the MLP
    weights = sum(t.name.endswith(".weight") for t in plan)
    expected = 2 + (not model.config["tie_word_embeddings"]) + layers * per_layer
    if weights != expected:
        raise DataError(f"{weights} weights, a model of {layers} layers has {expected}")
    return plan


def permute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows [heads x (half, d/2)] -> [heads x (d/2, half)]: rotate-half to neighbouring pairs."""
    paired = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return paired.swapaxes(1, 2).reshape(weight.shape)


def check_gguf(path: Path, plan: list[Planned], chat_template: str) -> None:
    """Re-read a file: names, shapes, types, alignment, overlaps, end; and the template's text.

    Raises: StorageError naming the first thing that is not as planned.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise StorageError(f"{path}: is not readable as GGUF: {error}") from None
    if len(reader.tensors) != len(plan):
        raise StorageError(f"{path}: holds {len(reader.tensors)} tensors, planned {len(plan)}")
    end = reader.data_offset
    for planned, found in zip(plan, reader.tensors, strict=True):
        shape = tuple(int(n) for n in reversed(found.shape))
        same = (found.name, shape, found.tensor_type) == (planned.name, planned.shape, planned.kind)
        if not same or found.data_offset != end or int(found.n_bytes) != planned.nbytes:
            raise StorageError(f"{path}: tensor {found.name} is not where or what was planned")
        end += _padded(planned.nbytes)
    if path.stat().st_size != end:
        raise StorageError(f"{path}: has {path.stat().st_size} bytes, planned {end}")
    stored = reader.get_field(gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    if stored is None or stored.contents() != chat_template:
        raise StorageError(f"{path}: the chat template was not stored verbatim")


def _kind(shape: tuple[int, ...], quant: Quant) -> Kind:
    if len(shape) == 1:
        return Kind.F32
    if quant == "q8_0" and shape[-1] % BLOCK:
        return Kind.F16
    return KINDS[quant]


def _metadata(
    model: FoldedModel, vocabulary: Vocabulary, chat_template: str, quant: Quant, name: str
) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    parameters = sum(int(np.prod(model.shape(n))) for n in model.names())
    writer.add_size_label(gguf.size_label(parameters, 0, 0, 0))
    writer.add_file_type(FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, model.config)
    _add_tokenizer(writer, vocabulary, chat_template)
    return writer


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    heads, head_dim = config["num_attention_heads"], _head_dim(config)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary, chat_template: str) -> None:
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(vocabulary.bos)
    writer.add_eos_token_id(vocabulary.eos)
    writer.add_unk_token_id(vocabulary.unknown)
    if vocabulary.padding is not None:
        writer.add_pad_token_id(vocabulary.padding)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_chat_template(chat_template)


def _write(
    part: Path,
    model: FoldedModel,
    plan: list[Planned],
    writer: gguf.GGUFWriter,
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    for t in plan:
        writer.add_tensor_info(t.name, t.shape, np.dtype(np.float32), t.nbytes, raw_dtype=t.kind)
    try:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, t in enumerate(plan, start=1):
            writer.write_tensor_data(_stored(model, t))
            if on_tensor is not None:
                on_tensor(done, len(plan))
        writer.flush()
        for handle in writer.fout or []:
            os.fsync(handle.fileno())
    finally:
        writer.close()


def _stored(model: FoldedModel, planned: Planned) -> np.ndarray:
    weight = model.tensor(planned.source)
    heads = model.config["num_attention_heads"]
    if ".q_proj." in planned.source:
        weight = permute_rotary(weight, heads)
    elif ".k_proj." in planned.source:
        weight = permute_rotary(weight, model.config.get("num_key_value_heads") or heads)
    try:
        return encode(weight, planned.kind)
    except OverflowError as error:
        raise DataError(
            f"tensor {planned.source} {error}", hint="write f32, or q8_0 for a smaller file"
        ) from None


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: transformers 5 has `rope_parameters`, 4 `rope_theta` + `rope_scaling`."""
    if config.get("rope_parameters"):
        return config["rope_parameters"]
    theta = {"rope_theta": config["rope_theta"]} if "rope_theta" in config else {}
    return {**theta, **(config.get("rope_scaling") or {})}


def _notes(config: dict[str, Any]) -> list[str]:
    window = config.get("sliding_window")
    if window and window < config["max_position_embeddings"]:
        return [
            f"GGUF has no sliding window for this model: past {window} tokens it attends to all"
        ]
    return []


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder}: {free / 2**30:.1f} GiB free, the file needs {needed / 2**30:.1f} GiB"
        )


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
