"""Who decides what runs, and that nothing needs triton to be imported."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from zephyr_kernels import backend, norm

X = torch.ones(2, 4)


@pytest.fixture(autouse=True)
def _automatic() -> Iterator[None]:
    with backend.using("auto"):
        yield


def test_a_cpu_computes_by_the_reference_unless_told():
    assert not backend.runs_triton(X)
    assert backend.use("triton") == "auto"
    assert backend.runs_triton(X)
    assert backend.use("torch") == "triton"
    assert not backend.runs_triton(X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_runs_triton_unless_told():
    assert backend.runs_triton(X.cuda()) == backend.HAS_TRITON
    with backend.using("torch"):
        assert not backend.runs_triton(X.cuda())


def test_a_block_restores_what_was_chosen_before_whatever_happens_in_it():
    with backend.using("torch"):
        with pytest.raises(KeyError), backend.using("triton"):
            raise KeyError
        assert backend.use("auto") == "torch"


def test_other_threads_compute_by_the_same_choice():
    """Autograd runs the backward of a GPU in a thread of its own."""
    seen = []
    with backend.using("triton"):
        thread = threading.Thread(target=lambda: seen.append(backend.runs_triton(X)))
        thread.start()
        thread.join()
    assert seen == [True]


def test_fp64_is_never_given_to_triton():
    with backend.using("triton"):
        y, rstd = norm.rms_norm(X.double(), torch.ones(4).double(), 0.0)
    assert (y.dtype, rstd.dtype) == (torch.float64, torch.float64)
    assert torch.equal(y, X.double())


WITHOUT_TRITON = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch, zephyr_kernels
for module in pkgutil.iter_modules(zephyr_kernels.__path__):
    if not module.name.endswith("_triton"):
        importlib.import_module("zephyr_kernels." + module.name)
from zephyr_kernels import backend, norm
assert not backend.HAS_TRITON
print(norm.rms_norm(torch.full((1, 2), 3.0), torch.ones(2), 0.0)[0].tolist())
"""


def test_every_module_imports_and_computes_without_triton():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[[1.0, 1.0]]"
