"""llama.cpp's own quantisers, called in the library that the optional package xllamacpp brings.

The wheel's extension module exports ggml's C symbols. Only functions of numbers and pointers are
called, whose ABI is that of C itself. Nothing is taken on trust: the symbols must be there, sizes
must agree with the `gguf` package's, and a self-test must give the bytes that `k_quants.py` and
`blocks.py` give, or this route does not exist on this machine (`why_not` says which). So a file
reads the same by either route, which only differ in time.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.export.quants.blocks import refuse

# First 16 digits of the SHA-256 of `self_test_weight()` in each type.
DIGESTS = {
    Kind.Q8_0: "81944f2988dc9c85",
    Kind.Q4_0: "5e42318183351ea3",
    Kind.Q5_0: "5c15719f5b738ea2",
    Kind.Q5_1: "f435607ac3e505fa",
    Kind.Q3_K: "18d21c768adf2b15",
    Kind.Q4_K: "b22a6db9f886b81a",
    Kind.Q5_K: "f8ff5b53480bb5fd",
    Kind.Q6_K: "ced3a18a9efa2efa",
}
# Bytes of a block that are halves: ggml writes infinity there where a scale does not fit.
HALVES = {
    Kind.Q8_0: slice(0, 2),
    Kind.Q4_0: slice(0, 2),
    Kind.Q5_0: slice(0, 2),
    Kind.Q5_1: slice(0, 4),
    Kind.Q3_K: slice(108, 110),
    Kind.Q4_K: slice(0, 4),
    Kind.Q5_K: slice(0, 4),
    Kind.Q6_K: slice(208, 210),
}
LEAST = 1 << 16  # values that are worth a thread


def encode_into(x_NB: torch.Tensor, kind: Kind, out_NS: np.ndarray, threads: int) -> None:
    """Quantise fp32 blocks [N, B] on the CPU, contiguous, into uint8 [N, S].

    Raises: OverflowError as the torch route: ggml itself passes over what is not finite.
    """
    refuse(x_NB)
    library = _library()

    def encode(start: int, stop: int) -> None:
        source, target = x_NB[start:stop], out_NS[start:stop]
        written = library.ggml_quantize_chunk(
            kind, source.data_ptr(), target.ctypes.data, 0, len(source), x_NB.shape[1], None
        )
        assert written == target.nbytes, f"ggml wrote {written} bytes, not {target.nbytes}"

    parts = max(1, min(threads, x_NB.numel() // LEAST))
    edges = [len(x_NB) * part // parts for part in range(parts + 1)]
    if parts == 1:
        encode(0, len(x_NB))
    else:  # ctypes lets go of the GIL, and blocks do not know each other
        with ThreadPoolExecutor(parts) as pool:
            list(pool.map(encode, edges[:-1], edges[1:]))
    halves = np.ascontiguousarray(out_NS[:, HALVES[kind]]).view(np.uint16)
    if ((halves & 0x7C00) == 0x7C00).any():
        raise OverflowError("does not fit float16")


@functools.cache
def why_not() -> str | None:
    """Why ggml cannot be called on this machine, one sentence; None where it can."""
    try:
        library = _library()
        for kind in DIGESTS:
            block, size = GGML_QUANT_SIZES[kind]
            found = library.ggml_row_size(kind, block)
            if found != size:
                return f"its {kind.name} has {found} bytes a block, not {size}"
    except (ImportError, OSError) as error:
        return f"xllamacpp does not load: {error}"
    except AttributeError as error:
        return f"xllamacpp does not export ggml: {error}"
    differing = [kind.name for kind, digest in DIGESTS.items() if _self_test(kind) != digest]
    return f"its {', '.join(differing)} differ from ours" if differing else None


def self_test_weight() -> torch.Tensor:
    """fp32 [8, 1024], the same everywhere: heavy tails, one row of zeros and one of a constant."""
    numbers = np.arange(8 * 1024, dtype=np.int64) * 2654435761 % (1 << 32)
    spread = numbers.astype(np.float64) / (1 << 31) - 1
    weight = (spread * spread * spread).astype(np.float32).reshape(8, 1024)
    weight[3], weight[5] = 0, 0.25
    return torch.from_numpy(weight)


def digest(stored: np.ndarray) -> str:
    """What stands in DIGESTS for these bytes."""
    return hashlib.sha256(stored.tobytes()).hexdigest()[:16]


def _self_test(kind: Kind) -> str:
    block, size = GGML_QUANT_SIZES[kind]
    x_NB = self_test_weight().reshape(-1, block)
    out_NS = np.empty((len(x_NB), size), np.uint8)
    encode_into(x_NB, kind, out_NS, 1)
    return digest(out_NS)


@functools.cache
def _library() -> ctypes.CDLL:
    """The shared library with its functions' types.

    Raises: ImportError without the package, OSError where it does not load, AttributeError where
    it does not export them.
    """
    spec = find_spec("xllamacpp.xllamacpp")
    if spec is None or spec.origin is None:
        raise ImportError("no extension module in it")
    library = ctypes.CDLL(spec.origin)
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_row_size.restype = ctypes.c_size_t
    counts = [ctypes.c_int64] * 3
    pointers = [ctypes.c_void_p] * 2
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, *pointers, *counts, ctypes.c_void_p]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library
