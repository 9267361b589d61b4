"""The bytes are ggml's."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.export import quantise
from zephyr_lite.export.quantise import byte_size, encode


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0])
@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 900.0])
def test_bytes_equal_the_gguf_package(
    kind: Kind, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "CHUNK", 16)  # 111 blocks: several chunks and a rest
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0)) * scale
    weight[3] = 0
    weight[4, :32] = torch.linspace(-127, 127, 32)  # multiples of the step: ties
    weight[5, :32] = torch.arange(32) - 15.5
    weight[6, :3] = torch.tensor([127.0, 0.49999997, -0.49999997])  # just below a tie
    expected = gguf.quants.quantize(weight.numpy(), kind)
    stored = encode(weight, kind)
    assert stored.tobytes() == expected.tobytes()
    assert stored.nbytes == byte_size((37, 96), kind)


def test_q8_0_error_is_half_a_step() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    stored = encode(weight, Kind.Q8_0).reshape(64, -1)
    back = torch.from_numpy(gguf.quants.dequantize(stored, Kind.Q8_0))
    step = weight.reshape(64, 4, 32).abs().amax(dim=-1, keepdim=True) / 127
    error = (back - weight).reshape(64, 4, 32).abs()
    assert (error <= step * 0.5 + 127 * step * 2**-11 + 1e-7).all()


@pytest.mark.parametrize("kind", [Kind.F16, Kind.Q8_0])
def test_what_does_not_fit_fp16_is_an_error(kind: Kind) -> None:
    with pytest.raises(OverflowError):
        encode(torch.full((1, 32), 1e9), kind)


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="Q4_K"):
        encode(torch.zeros(1, 256), Kind.Q4_K)
    assert byte_size((2, 256), Kind.Q4_K) == 288
