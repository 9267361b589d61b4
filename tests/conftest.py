"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: spinning OpenMP threads make a shared CPU several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real dialogues, feedback and models that are not part of the repository."""
    folder = Path(os.environ.get("ZEPHYR_LITE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not there: {folder} (set ZEPHYR_LITE_SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; one cache serves the whole session."""
    before = os.environ.get("ZEPHYR_LITE_HOME")
    home = tmp_path_factory.getbasetemp() / "zephyr-lite-home"
    os.environ["ZEPHYR_LITE_HOME"] = str(home)
    yield
    if before is None:
        del os.environ["ZEPHYR_LITE_HOME"]
    else:
        os.environ["ZEPHYR_LITE_HOME"] = before
