"""Engines: what runs the decoder's layers over a layout.

    native    our own layers: Mistral, Llama, Qwen2, Qwen3                          model/native.py
    hf        transformers' and PEFT's modules as they are: any decoder with one    model/hf.py
              causal attention pattern

A third name, `unsloth`, trains dSFT in another process (train/unsloth_process.py): what runs in
this one is then `native`, or `hf`.

Which one a base runs on is settled from its config.json, before anything is loaded: the engine is
part of the reference log-probs' key. Each is proven at start on the loaded model itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import torch
from transformers import AutoConfig
from zephyr_kernels import attention, backend

from zephyr_lite.errors import MachineError
from zephyr_lite.model.attention import DeviceLayout
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.hf import HfEngine
from zephyr_lite.model.layer import Saved
from zephyr_lite.model.native import NativeEngine, refusal

# Of `memory.checkpointing`; `auto` is what was not planned.
SAVED: dict[str, Saved] = {"auto": "keep", "none": "keep", "full": "lean", "offload": "offload"}


class Engine(Protocol):
    """Runs the decoder; `name` goes into manifests and the reference key.

    gemm: how products with frozen weights are computed from now on.
    """

    name: str
    decoder: Any
    gemm: Gemm

    def hidden(self, layout: DeviceLayout) -> torch.Tensor:
        """Final hidden states [T, D] of a layout, normed, ready for the head."""
        ...

    def predicting(self, layout: DeviceLayout) -> torch.Tensor:
        """The same [N, D], of the rows that predict something, in the order of the targets."""
        ...

    def report(self) -> list[str]:
        """What runs where, in words; for the manifest."""
        ...

    def undo(self) -> None:
        """Leave the model as it was found."""
        ...

    def self_test(self, device: torch.device) -> float:
        """Relative error against the engine's own truth. Raises: MachineError when it is wrong."""
        ...


def choose(wanted: str, folder: Path) -> tuple[str, str]:
    """The engine for a base model's folder, and why it is not the one wanted ("" when it is).

    For `unsloth`, the one that measures what it trained.
    """
    if wanted == "hf":
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


def choose_attention(
    wanted: attention.Kernel | Literal["auto"],
    device: torch.device,
    dtype: torch.dtype,
    head_width: int,
) -> str:
    """Choose a GPU's attention for this process; what computes such heads: `flash`, `xformers`, or
    `dense` where torch has no kernel for them.

    Raises: MachineError when xformers is wanted and does not compute them here.
    """
    attention.use("flash")
    if wanted != "xformers":
        return attention.computed_by(device, dtype, head_width)
    if device.type != "cuda":
        _refuse_xformers("it needs a GPU")
    try:
        attention.use("xformers")
    except ImportError as error:
        _refuse_xformers(f"it cannot be imported ({error})", "pip install xformers, or ")
    if attention.computed_by(device, dtype, head_width) == "dense":
        attention.use("flash")
        _refuse_xformers(f"it has nothing for heads of {head_width} in {dtype} on this GPU")
    return "xformers"


def choose_gemm(wanted: Gemm, engine: str, device: torch.device) -> Gemm:
    """How products with frozen weights are computed in training.

    Raises: MachineError when this machine or engine cannot; whether it pays, `gemm_probe` says.
    """
    if wanted == "fp16acc" and engine != "native":
        _refuse_gemm(wanted, f"engine {engine} does not compute it, engine native does")
    if wanted == "fp16acc" and device.type != "cuda":
        _refuse_gemm(wanted, "it needs a GPU")
    return wanted


def make_engine(
    name: str,
    model: Any,
    dtype: torch.dtype,
    checkpointing: str,
    gemm: Gemm = "exact",
    keep_layers: int = 0,
) -> Engine:
    """The engine over a loaded model; see `recipe.Memory` for what the words mean.

    Raises: MachineError when it does not run this one.
    """
    if name == "native":
        saved = SAVED[checkpointing]
        return NativeEngine(model, dtype, saved=saved, gemm=gemm, kept_layers=keep_layers)
    if gemm != "exact":
        _refuse_gemm(gemm, f"engine {name} does not compute it, engine native does")
    if checkpointing == "offload":
        raise MachineError(
            "engine hf does not move activations to host memory",
            hint="set memory.checkpointing=full",
        )
    if keep_layers:
        raise MachineError(
            "engine hf computes all layers again or none", hint="leave memory.keep_layers out"
        )
    return HfEngine(model, checkpointing=checkpointing == "full")


def _refuse_xformers(reason: str, way_out: str = "") -> NoReturn:
    raise MachineError(f"attention: xformers: {reason}", hint=f"{way_out}set attention=auto")


def _refuse_gemm(gemm: Gemm, reason: str) -> NoReturn:
    raise MachineError(f"gemm: {gemm}: {reason}", hint="set gemm=exact")
