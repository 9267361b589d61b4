"""K types fit as ggml's do, to the byte where bytes mean something, and read back as written."""

from __future__ import annotations

from operator import attrgetter

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.export.quants import ggml
from zephyr_lite.export.quants.quantise import encode

NAME = attrgetter("name")
K_KINDS = [Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K]
# Relative RMSE on normal values; a fault of layout makes it about 1.
NORMAL_ERROR = {Kind.Q3_K: 0.147, Kind.Q4_K: 0.0717, Kind.Q5_K: 0.0363, Kind.Q6_K: 0.0177}


def draw(name: str) -> torch.Tensor:
    """Weights [24, 1024] of one kind."""
    rng = np.random.default_rng(5)
    normal = rng.standard_normal((24, 1024))
    one = np.zeros_like(normal)
    one[:, 5] = -1.5
    outlier = normal.copy()
    outlier[:, ::97] *= 100
    found = {
        "normal": normal * 0.02,
        "heavy": rng.standard_t(3, normal.shape),
        "outlier columns": outlier,
        "zero": normal * 0,
        "constant": np.full_like(normal, 0.3),
        "negative constant": np.full_like(normal, -0.3),
        "tiny": normal * 1e-6,
        "huge": np.clip(normal / 4, -1, 1) * 6e4,
        "one value": one,
        "off centre": normal * 0.01 - 1,
        "16-bit": torch.from_numpy(normal).bfloat16().double().numpy(),
        "two values": np.sign(normal),
        "sparse": normal * (rng.random(normal.shape) < 0.05),
    }
    return torch.from_numpy(found[name].astype(np.float32))


NAMES = [
    "normal", "heavy", "outlier columns", "zero", "constant", "negative constant", "tiny", "huge",
    "one value", "off centre", "16-bit", "two values", "sparse",
]  # fmt: skip


def read(stored: np.ndarray, kind: Kind, weight: torch.Tensor) -> np.ndarray:
    """The values, by the gguf package."""
    rows = stored.reshape(weight.shape[0], -1)
    return gguf.quants.dequantize(rows, kind).reshape(weight.shape)


def relative_error(values: np.ndarray, weight: torch.Tensor) -> float:
    """RMSE over RMS; of zeros the RMSE itself."""
    truth = weight.double().numpy()
    return float(np.sqrt(np.mean((values - truth) ** 2) / (np.mean(truth**2) or 1)))


@pytest.fixture
def ggml_here() -> None:
    """Skips where llama.cpp's code cannot be called."""
    pytest.importorskip("xllamacpp")
    assert ggml.why_not() is None


@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
def test_normal_values_read_back_at_the_known_error(kind: Kind) -> None:
    weight = draw("normal")
    error = relative_error(read(encode(weight, kind), kind, weight), weight)
    assert error == pytest.approx(NORMAL_ERROR[kind], rel=0.02)


@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_errors_are_ggmls(ggml_here: None, kind: Kind, name: str) -> None:
    weight = draw(name)
    ours, theirs = encode(weight, kind), encode(weight, kind, route="ggml")
    values = read(ours, kind, weight)
    assert np.isfinite(values).all()
    assert relative_error(values, weight) <= relative_error(read(theirs, kind, weight), weight)
    assert np.array_equal(values, read(theirs, kind, weight))


@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
@pytest.mark.parametrize("name", ["normal", "huge", "constant", "zero", "off centre", "16-bit"])
def test_bytes_are_ggmls_where_no_scale_rounds_to_nothing(
    ggml_here: None, kind: Kind, name: str
) -> None:
    weight = draw(name)
    ours, theirs = encode(weight, kind), encode(weight, kind, route="ggml")
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
def test_every_value_has_its_own_place(kind: Kind) -> None:
    """One block of other values at a time: a swapped run, nibble or scale shows."""
    for block in range(0, 256, 16):
        weight = torch.zeros(1, 256)
        weight[0, block : block + 16] = torch.linspace(-2, 1, 16)
        values = read(encode(weight, kind), kind, weight)
        assert relative_error(values, weight) < 0.2
        outside = np.delete(values[0], range(block, block + 16))
        assert np.abs(outside).max() < 0.2, "what was zero reads as something"


@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
def test_the_search_beats_rounding_to_the_nearest(kind: Kind) -> None:
    weight = draw("heavy")
    size, top = (32, 15 if kind == Kind.Q4_K else 31) if kind in (Kind.Q4_K, Kind.Q5_K) else (16, 0)
    blocks = weight.reshape(-1, size)
    if top:
        low = blocks.amin(1, keepdim=True).clamp(max=0)
        step = (blocks.amax(1, keepdim=True) - low) / top
        plain = ((blocks - low) / step).round() * step + low
    else:
        levels = 4 if kind == Kind.Q3_K else 32
        step = blocks.abs().amax(1, keepdim=True) / levels
        plain = (blocks / step).round().clamp(-levels, levels - 1) * step
    found = relative_error(read(encode(weight, kind), kind, weight), weight)
    assert found < relative_error(plain.reshape(weight.shape).numpy(), weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", K_KINDS, ids=NAME)
def test_a_gpu_fits_as_well(kind: Kind) -> None:
    """Its sums go another way through a block, so some scales differ and no error does."""
    weight = draw("heavy")
    here, there = encode(weight, kind), encode(weight.cuda(), kind)
    errors = [relative_error(read(stored, kind, weight), weight) for stored in (here, there)]
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
