"""The bytes of the simple types are ggml's, however a tensor is cut; nothing infinite passes."""

from __future__ import annotations

from operator import attrgetter

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.errors import MachineError
from zephyr_lite.export.quants import ggml, quantise
from zephyr_lite.export.quants.quantise import KINDS, byte_size, encode, routes

NAME = attrgetter("name")
SIMPLE = [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_0, Kind.Q5_1]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal fp32."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", SIMPLE, ids=NAME)
@pytest.mark.parametrize("scale", [1e-6, 0.03, 1.0, 900.0])
def test_bytes_equal_the_gguf_package(
    kind: Kind, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantise, "CHUNK", 512)  # 111 blocks: several chunks and a rest
    weight = normal(37, 96) * scale
    weight[3] = 0
    weight[4, :32] = torch.linspace(-127, 127, 32)  # multiples of the step: ties
    weight[5, :32] = torch.arange(32) - 15.5  # two extremes
    weight[6, :3] = torch.tensor([127.0, 0.49999997, -0.49999997])  # just below a tie
    weight[7, 32:64] = -weight[5, :32]  # the other extreme first
    weight[8] = 0.3
    expected = gguf.quants.quantize(weight.numpy(), kind)
    stored = encode(weight, kind)
    assert stored.tobytes() == expected.tobytes()
    assert stored.nbytes == byte_size((37, 96), kind)


def test_q8_0_error_is_half_a_step() -> None:
    weight = normal(64, 128, seed=1)
    stored = encode(weight, Kind.Q8_0).reshape(64, -1)
    back = torch.from_numpy(gguf.quants.dequantize(stored, Kind.Q8_0))
    step = weight.reshape(64, 4, 32).abs().amax(dim=-1, keepdim=True) / 127
    error = (back - weight).reshape(64, 4, 32).abs()
    assert (error <= step * 0.5 + 127 * step * 2**-11 + 1e-7).all()


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in (Kind.F32, Kind.BF16)], ids=NAME
)
def test_what_does_not_fit_fp16_is_an_error(kind: Kind) -> None:
    with pytest.raises(OverflowError):
        encode(torch.full((1, 256), -1e12), kind)


@pytest.mark.parametrize("kind", KINDS, ids=NAME)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_an_error(kind: Kind, bad: float) -> None:
    for place in (0, 1000, 2047):
        weight = normal(4, 512)
        weight.view(-1)[place] = bad
        with pytest.raises(OverflowError):
            encode(weight, kind)


@pytest.mark.parametrize("kind", KINDS, ids=NAME)
def test_bytes_do_not_depend_on_threads_or_chunks(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(7, 1280, seed=2)  # 35 super-blocks
    before = weight.clone()
    whole = encode(weight, kind, threads=1)
    monkeypatch.setattr(quantise, "CHUNK", 2048)
    assert encode(weight, kind, threads=3).tobytes() == whole.tobytes()
    assert whole.nbytes == byte_size((7, 1280), kind)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("kind", KINDS, ids=NAME)
def test_rows_are_encoded_by_themselves(kind: Kind) -> None:
    weight = normal(5, 512, seed=3)
    whole = encode(weight, kind).reshape(5, -1)
    for row in range(5):
        assert encode(weight[row], kind).tobytes() == whole[row].tobytes()


def test_views_and_16_bit_weights_are_taken_as_they_read() -> None:
    weight = normal(256, 64, seed=4)
    assert np.array_equal(encode(weight.t(), Kind.Q4_K), encode(weight.t().contiguous(), Kind.Q4_K))
    half = weight.to(torch.bfloat16)
    assert np.array_equal(encode(half, Kind.Q8_0), encode(half.float(), Kind.Q8_0))


def test_the_number_of_threads_of_torch_is_given_back() -> None:
    before = torch.get_num_threads()
    encode(normal(4, 256), Kind.Q4_K, threads=2)
    with pytest.raises(OverflowError):
        encode(torch.full((4, 256), torch.nan), Kind.Q4_K, threads=2)
    assert torch.get_num_threads() == before


def test_an_unknown_type_or_row_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot encode Q2_K"):
        encode(torch.zeros(1, 256), Kind.Q2_K)
    with pytest.raises(ValueError, match="Q4_K wants rows of a multiple of 256, got 128"):
        encode(torch.zeros(2, 128), Kind.Q4_K)
    with pytest.raises(ValueError, match="ggml does not encode F16"):
        encode(torch.zeros(2, 128), Kind.F16, route="ggml")
    assert byte_size((2, 256), Kind.Q4_K) == 288


def test_routes_where_ggml_is_and_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    all_torch = dict.fromkeys(KINDS, "torch")
    monkeypatch.setattr(ggml, "why_not", lambda: None)
    assert routes("torch") == all_torch
    auto, wanted = routes("auto"), routes("ggml")
    assert {kind for kind in KINDS if auto[kind] == "ggml"} == quantise.GGML_PAYS
    assert {kind for kind in KINDS if wanted[kind] == "ggml"} == set(ggml.DIGESTS)
    monkeypatch.setattr(ggml, "why_not", lambda: "it is not here")
    assert routes("auto") == all_torch
    assert quantise.why_not() == "it is not here"
    with pytest.raises(MachineError, match="ggml cannot be called: it is not here") as error:
        routes("ggml")
    assert error.value.hint is not None and "zephyr-lite[llama]" in error.value.hint
