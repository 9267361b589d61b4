"""The adapters alone, as one GGUF LoRA: for llama.cpp's `--lora`, beside a GGUF of the base.

    W + sum_k s_k B_k A_k = W + B A    with A = [A_1 ; A_2 ; ...], B = [s_1 B_1 | s_2 B_2 | ...]

llama.cpp adds `scale * alpha / rank * B A`, with one alpha for the whole file; where alpha is 0 it
adds `scale * B A`. So the scales s_k, which may differ between modules and adapters, go into B and
alpha is 0. The rows of B are in the order in which llama.cpp has the rows of W. An embedding is
looked up and not multiplied, so its A has a row per token there and the roles are exchanged.

F32, the type adapters are trained and saved in: fp16 would round each factor by 5e-4 of itself and
lose what is below 6e-8, and llama.cpp would round the activations to fp16 as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import RecipeError, StorageError
from zephyr_lite.export.gguf.architecture import Architecture
from zephyr_lite.export.gguf.target import ALIGNMENT, Planned, header_bytes
from zephyr_lite.export.part_file import PartFile
from zephyr_lite.export.weights.adapter import EMBEDDING, HEAD
from zephyr_lite.export.weights.fold import FoldedModel


def write_gguf_adapter(
    model: FoldedModel, architecture: Architecture, out: Path, *, name: str, identity: str
) -> dict[str, Any]:
    """Write `out` by way of `out.part`, read it back, and give it its name.

    Args:
        name: `general.name`.
        identity: digest of the adapters and all else the bytes depend on.
    Returns: report with `file`, `quant` ("lora"), `tensors`, `parameters`, `bytes`, `sha256`,
        `rank` (the largest), `notes`.
    Raises: RecipeError naming what a LoRA file cannot say; StorageError.
    Memory: the factors of one matrix.
    """
    ranks = adapted_ranks(model)
    plan = _planned(model, architecture, ranks)
    header = _header(architecture.name, name, plan)
    blobs = [(factor.name, factor.nbytes) for factor in plan]
    file = PartFile(out, header, blobs, identity, alignment=ALIGNMENT)
    file.begin()
    try:
        for hf_name in ranks:
            keys = _keys(architecture, hf_name)
            if file.has(keys[-1]):
                continue
            for key, factor in zip(keys, _factors(model, architecture, hf_name), strict=True):
                if not file.has(key):
                    file.append(key, factor.contiguous().numpy())
        sha256 = file.finish()
        _check(file.part, plan)
        file.commit()
    finally:
        file.close()
    return {
        "file": out.name,
        "quant": "lora",
        "tensors": len(plan),
        "parameters": sum(prod(factor.shape) for factor in plan),
        "bytes": file.nbytes,
        "sha256": sha256,
        "rank": max(ranks.values()),
        "notes": ["the adapter alone: give it to llama.cpp with a GGUF of the base"],
    }


def adapted_ranks(model: FoldedModel) -> dict[str, int]:
    """Weights with a low-rank change, in the model's order, and the rank of it.

    Raises: RecipeError for a change that a LoRA file cannot say.
    """
    for adapter in model.adapters:
        if adapter.replaced:
            raise RecipeError(
                f"{min(adapter.replaced)} was trained whole (modules_to_save); a LoRA file cannot "
                "say so",
                hint="export a merged GGUF, and set export.lora_gguf=false",
            )
    names = [n for n in model.names() if any(n in a.low_rank for a in model.adapters)]
    if not names:
        raise RecipeError(
            "there is no adapter to write: this model is the base itself",
            hint="set export.lora_gguf=false",
        )
    tied = [n for n in names if n in (EMBEDDING, HEAD) and HEAD not in model.base.names()]
    if tied:
        raise RecipeError(
            f"{tied[0]} is tied in the base and adapted alone; llama.cpp has one matrix for both",
            hint="export a merged GGUF, and set export.lora_gguf=false",
        )
    return {n: sum(a_RI.shape[0] for a_RI, _, _ in _parts(model, n)) for n in names}


def _keys(architecture: Architecture, hf_name: str) -> tuple[str, str]:
    """Names of the two factors; llama.cpp finds the matrix by what is before the suffix."""
    name = architecture.rename(hf_name)
    return f"{name}.lora_a", f"{name}.lora_b"


def _planned(
    model: FoldedModel, architecture: Architecture, ranks: Mapping[str, int]
) -> list[Planned]:
    """Every factor in the order of the file."""
    plan = []
    for hf_name, rank in ranks.items():
        rows, columns = model.shape(hf_name)
        is_embedding = hf_name == EMBEDDING
        shapes = (
            ((rows, rank), (columns, rank)) if is_embedding else ((rank, columns), (rows, rank))
        )
        keys = _keys(architecture, hf_name)
        plan += [Planned(key, shape, Kind.F32) for key, shape in zip(keys, shapes, strict=True)]
    return plan


def _factors(
    model: FoldedModel, architecture: Architecture, hf_name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lora_a, lora_b) as stored, fp32."""
    parts = _parts(model, hf_name)
    a_RI = torch.cat([a for a, _, _ in parts])
    b_OR = torch.cat([scale * b for _, b, scale in parts], dim=1)
    if hf_name == EMBEDDING:
        return b_OR, a_RI.T
    return a_RI, architecture.stored(hf_name, b_OR)


def _parts(model: FoldedModel, hf_name: str) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """(A, B, s) of every adapter that changes a weight."""
    return [a.factors(hf_name) for a in model.adapters if hf_name in a.low_rank]


def _header(architecture: str, name: str, factors: Sequence[Planned]) -> bytes:
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    return header_bytes(writer, factors)


def _check(path: Path, plan: Sequence[Planned]) -> None:
    """Read the file as others do. Raises: StorageError when a factor is not where it should be."""
    try:
        found = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise StorageError(f"{path}: is not readable as GGUF: {error}") from None
    if [(t.name, t.data.shape) for t in found] != [(t.name, t.shape) for t in plan]:
        raise StorageError(f"{path}: its factors are not the ones that were written")
