"""fp32 tensors as the bytes of a GGML type.

Two routes to the same bytes: `torch`, our own code (`blocks.py`, `k_quants.py`), always there, on
the weight's device; `ggml`, llama.cpp's code where xllamacpp brings it (`ggml.py`). Blocks lie
along rows and are independent, so a tensor is encoded a cache's worth of blocks at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import MachineError
from zephyr_lite.export.quants import blocks, ggml, k_quants

Route = Literal["torch", "ggml"]
ENCODERS = blocks.ENCODERS | k_quants.ENCODERS
KINDS = (Kind.F32, *ENCODERS)
# Values at a time: half a dozen arrays of 1 MiB meet in cache; a GPU wants fewer, larger steps.
CHUNK, GPU_CHUNK = 1 << 18, 1 << 22
# Where ggml is at least twice as fast as torch on one thread: benchmarks/results/quantise.jsonl.
GGML_PAYS = frozenset({Kind.Q3_K, Kind.Q5_1})


def byte_size(shape: tuple[int, ...], kind: Kind) -> int:
    """Bytes of a tensor of `shape` stored as `kind`."""
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def routes(wanted: Literal["auto", "torch", "ggml"]) -> dict[Kind, Route]:
    """Which code quantises each type on this machine.

    `auto` takes ggml where it can be called (`why_not`) and is much faster. Types without a scale
    are torch's under any.

    Raises: MachineError when ggml is wanted and cannot be called.
    """
    found: dict[Kind, Route] = dict.fromkeys(KINDS, "torch")
    if wanted == "torch":
        return found
    reason = why_not()
    if reason is not None and wanted == "ggml":
        raise MachineError(
            f"ggml cannot be called: {reason}",
            hint="pip install 'zephyr-lite[llama]', or take export.quantiser: torch",
        )
    if reason is None:
        found |= dict.fromkeys(GGML_PAYS if wanted == "auto" else ggml.DIGESTS, "ggml")
    return found


def why_not() -> str | None:
    """Why the route `ggml` is not open on this machine, one sentence; None where it is."""
    return ggml.why_not()


def encode(
    weight: torch.Tensor, kind: Kind, *, route: Route = "torch", threads: int | None = None
) -> np.ndarray:
    """fp32 [..., D] -> uint8 [blocks, bytes of a block], the bytes to store.

    Under F32 it may be the weight's own memory. Beyond the result it holds a few MiB a thread, and
    a copy of the weight where that is not contiguous fp32 (or, for ggml, not on the CPU).

    Args:
        threads: of the CPU; torch's number by default. The bytes do not depend on it.

    Raises: OverflowError when a value or scale does not fit or is not finite; ValueError for
        another `kind`, a D that is not a multiple of its block, or a type that ggml does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"cannot encode {kind.name}")
    block, size = GGML_QUANT_SIZES[kind]
    if weight.shape[-1] % block:
        raise ValueError(f"{kind.name} wants rows of a multiple of {block}, got {weight.shape[-1]}")
    x_NB = weight.detach().to(torch.float32).reshape(-1, block)
    if kind == Kind.F32:
        blocks.refuse(x_NB)
        return x_NB.cpu().numpy().view(np.uint8)
    threads = threads or torch.get_num_threads()
    out_NS = np.empty((len(x_NB), size), np.uint8)
    if route == "ggml":
        if kind not in ggml.DIGESTS:
            raise ValueError(f"ggml does not encode {kind.name} here")
        ggml.encode_into(x_NB.cpu().contiguous(), kind, out_NS, threads)
    else:
        _encode_in_chunks(x_NB, ENCODERS[kind], torch.from_numpy(out_NS), threads)
    return out_NS


def _encode_in_chunks(
    x_NB: torch.Tensor, encoder: blocks.Encoder, out_NS: torch.Tensor, threads: int
) -> None:
    """Encode into `out_NS`, several chunks at once on a CPU."""
    chunk = max(1, (CHUNK if x_NB.device.type == "cpu" else GPU_CHUNK) // x_NB.shape[1])

    @torch.inference_mode()
    def encode_chunk(start: int) -> None:
        out_NS[start : start + chunk] = encoder(x_NB[start : start + chunk])

    starts = range(0, len(x_NB), chunk)
    threads = min(threads, len(starts)) if x_NB.device.type == "cpu" else 1
    with _operations_on_one_thread():
        if threads <= 1:
            for start in starts:
                encode_chunk(start)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(encode_chunk, starts))


@contextmanager
def _operations_on_one_thread() -> Iterator[None]:
    """Chunks share the cores; an operation on one chunk is too small to be shared itself.

    torch's new threads take the number that was set last, so this is true in the pool's as well.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
