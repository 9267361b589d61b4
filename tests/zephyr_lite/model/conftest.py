"""Policies over the tiny model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from zephyr_lite.model.adapters import add_adapter, load_adapter, save_adapter
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Lora, Memory

# Tests say `from layer_truth import relative`; importlib mode puts no folder on the path.
sys.path.insert(0, str(Path(__file__).parent))

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def sft_adapter(load_tiny: Callable, shake: Callable, tmp_path_factory) -> Path:
    """A saved SFT adapter of the tiny NF4 model, random but not zero."""
    model = add_adapter(load_tiny(), "sft", Lora(r=8, alpha=12, dropout=0.05), seed=1)
    shake(model, "sft", seed=1)
    folder = tmp_path_factory.mktemp("sft-adapter")
    save_adapter(model, ["sft"], folder, "base")
    return folder


@pytest.fixture(params=["native", "hf"])
def engine(request: pytest.FixtureRequest) -> str:
    """Every engine that runs the tiny model."""
    return request.param


@pytest.fixture
def stack(load_tiny: Callable, sft_adapter: Path, engine: str) -> Callable[..., Policy]:
    """`stack(dropout)` gives the policy of dDPO: `sft` frozen, a fresh `dpo` trainable."""

    def make(dropout: float = 0.0, checkpointing: str = "none", **lora: int) -> Policy:
        model = load_adapter(load_tiny(), "sft", sft_adapter)
        settings = Lora.model_validate({"r": 4, "alpha": 6, "dropout": dropout, **lora})
        model = add_adapter(model, "dpo", settings, seed=2)
        memory = Memory.model_validate({"checkpointing": checkpointing, "head_rows": 16})
        policy = make_policy(model, torch.float32, CPU, memory, engine=engine)
        policy.use(["sft", "dpo"], "dpo")
        return policy

    return make
