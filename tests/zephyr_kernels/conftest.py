"""Where kernel tests run: every implementation that this machine can execute, in every dtype."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from zephyr_kernels import backend

# Tests say `from tolerance import assert_within`; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _implementations() -> list[str]:
    names = ["cpu-torch"]
    if backend.HAS_TRITON and INTERPRETED:
        names.append("cpu-triton")
    if torch.cuda.is_available():
        names.append("cuda-torch")
        if backend.HAS_TRITON and not INTERPRETED:
            names.append("cuda-triton")
    return names


@pytest.fixture(params=_implementations())
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device of a test; all operations in it run by one implementation."""
    name, choice = request.param.split("-")
    with backend.using(choice):
        yield torch.device(name)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The dtype of a test's tensors."""
    return request.param


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out bf16 in Triton's interpreter, which truncates where a GPU rounds."""
    left_out = [item for item in items if _is_interpreted_bf16(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_interpreted_bf16(item: pytest.Item) -> bool:
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return (parameters.get("device"), parameters.get("dtype")) == ("cpu-triton", torch.bfloat16)


@pytest.fixture
def normal(device: torch.device) -> Callable[..., torch.Tensor]:
    """`normal(*shape, dtype, seed)` -> standard normal values, the same on every device."""

    def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed + 1000 * len(shape))
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    return make


@pytest.fixture
def poisoned(device: torch.device) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`poisoned(rows, width, dtype)` -> the first columns of a wider NaN buffer, and the rest."""

    def make(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.full((rows, width + 3), torch.nan, dtype=dtype, device=device)
        return buffer[:, :width], buffer[:, width:]

    return make


@pytest.fixture
def far_rows(device: torch.device) -> Callable[[int], torch.Tensor]:
    """`far_rows(width)` -> an fp16 view [2, width] whose second row starts at element 2^31."""
    if device.type == "cpu" and backend.runs_triton(torch.empty(0)):
        pytest.skip("the interpreter copies the whole storage, 4.3 GB")

    def make(width: int) -> torch.Tensor:
        buffer = torch.empty(2**31 + width, dtype=torch.float16, device=device)
        return buffer.as_strided((2, width), (2**31, 1))

    return make
