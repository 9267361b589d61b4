"""Engines: what runs the decoder's layers over a layout.

    native    our own layers: Mistral, Llama, Qwen2                                 model/native.py
    hf        transformers' and PEFT's modules as they are: any decoder with one    model/hf.py
              causal attention pattern

Which one a base runs on is settled from its config.json, before anything is loaded: the engine is
part of the reference log-probs' key. Each is proven at start on the loaded model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig
from zephyr_kernels import backend

from zephyr_lite.errors import MachineError
from zephyr_lite.model.attention import DeviceLayout
from zephyr_lite.model.hf import HfEngine
from zephyr_lite.model.layer import Saved
from zephyr_lite.model.native import NativeEngine, refusal

SAVED: dict[str, Saved] = {"none": "keep", "full": "lean", "offload": "offload"}


class Engine(Protocol):
    """Runs the decoder; `name` goes into manifests and the reference key."""

    name: str
    decoder: Any

    def hidden(self, layout: DeviceLayout) -> torch.Tensor:
        """Final hidden states [T, D] of a layout, normed, ready for the head."""
        ...

    def predicting(self, layout: DeviceLayout) -> torch.Tensor:
        """The same [N, D], of the rows that predict something, in the order of the targets."""
        ...

    def self_test(self, device: torch.device) -> float:
        """Relative error against the engine's own truth. Raises: MachineError when it is wrong."""
        ...


def choose(wanted: str, folder: Path) -> tuple[str, str]:
    """The engine for a base model's folder, and why it is not the one wanted ("" when it is)."""
    if wanted != "native":
        return wanted, ""
    reason = refusal(AutoConfig.from_pretrained(folder))
    return ("hf", f"native does not run this base: {reason}") if reason else ("native", "")


def choose_kernels(wanted: str, engine: str, device: torch.device) -> str:
    """Switch Triton kernels on or off for this process; what computes then: `triton` or `torch`.

    Args: wanted: `auto`, `require` or `off`.
    Raises: MachineError when they are required and cannot run.
    """
    missing = [
        (engine != "native", f"engine {engine} does not use them"),
        (device.type != "cuda", "there is no GPU"),
        (not backend.HAS_TRITON, "triton is not installed"),
    ]
    reasons = [reason for is_so, reason in missing if is_so]
    if wanted == "require" and reasons:
        raise MachineError(f"kernels: require, but {reasons[0]}", hint="set kernels=auto")
    backend.use("torch" if wanted == "off" else "auto")
    return "torch" if wanted == "off" or reasons else "triton"


def make_engine(name: str, model: Any, dtype: torch.dtype, checkpointing: str) -> Engine:
    """The engine over a loaded model. Raises: MachineError when it does not run this one."""
    if name == "native":
        return NativeEngine(model, dtype, saved=SAVED[checkpointing])
    if checkpointing == "offload":
        raise MachineError(
            "engine hf does not move activations to host memory",
            hint="set memory.checkpointing=full",
        )
    return HfEngine(model, checkpointing=checkpointing == "full")
