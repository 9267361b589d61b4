"""llama.cpp's code is called where it is what we know, and refused by its reason elsewhere."""

from __future__ import annotations

import _ctypes
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from operator import attrgetter

import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from zephyr_lite.export.quants import ggml
from zephyr_lite.export.quants.quantise import encode

NAME = attrgetter("name")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing remembered from another test."""
    for function in (ggml.why_not, ggml._library):
        function.cache_clear()
    yield
    for function in (ggml.why_not, ggml._library):
        function.cache_clear()


@pytest.mark.parametrize("kind", ggml.DIGESTS, ids=NAME)
def test_our_bytes_are_the_golden_ones(kind: Kind) -> None:
    assert ggml.digest(encode(ggml.self_test_weight(), kind)) == ggml.DIGESTS[kind]


@pytest.mark.parametrize("kind", ggml.DIGESTS, ids=NAME)
def test_ggmls_bytes_are_the_golden_ones(kind: Kind) -> None:
    pytest.importorskip("xllamacpp")
    assert ggml.why_not() is None
    stored = encode(ggml.self_test_weight(), kind, route="ggml")
    assert ggml.digest(stored) == ggml.DIGESTS[kind]


@pytest.mark.parametrize("kind", ggml.DIGESTS, ids=NAME)
def test_parts_of_a_tensor_join(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(ggml, "LEAST", 256)
    weight = torch.randn(11, 768, generator=torch.Generator().manual_seed(6))
    whole = encode(weight, kind, route="ggml", threads=1)
    assert encode(weight, kind, route="ggml", threads=4).tobytes() == whole.tobytes()


@pytest.mark.parametrize("kind", ggml.DIGESTS, ids=NAME)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e12])
def test_what_ggml_would_store_as_nonsense_is_an_error(kind: Kind, bad: float) -> None:
    pytest.importorskip("xllamacpp")
    weight = torch.ones(2, 512)
    weight[1, 300] = bad
    with pytest.raises(OverflowError):
        encode(weight, kind, route="ggml")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "find_spec", lambda name: None)
    assert "does not load" in str(ggml.why_not())


def test_a_library_without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleSpec("xllamacpp.xllamacpp", None, origin=_ctypes.__file__)
    monkeypatch.setattr(ggml, "find_spec", lambda name: other)
    assert "does not export ggml" in str(ggml.why_not())


def test_a_file_that_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleSpec("xllamacpp.xllamacpp", None, origin=__file__)
    monkeypatch.setattr(ggml, "find_spec", lambda name: other)
    assert "does not load" in str(ggml.why_not())


def test_other_bytes_or_sizes_close_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp")
    with monkeypatch.context() as patch:
        patch.setitem(ggml.DIGESTS, Kind.Q5_K, "0" * 16)
        assert ggml.why_not() == "its Q5_K differ from ours"
    ggml.why_not.cache_clear()
    monkeypatch.setitem(ggml.GGML_QUANT_SIZES, Kind.Q4_K, (256, 143))
    assert "Q4_K has 144 bytes a block, not 143" in str(ggml.why_not())
