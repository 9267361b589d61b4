"""A GPU's forward and backward without a GPU: the engine's own code on tensors that have no memory.

On torch's `meta` device every operation gives tensors of the right sizes and computes nothing, so a
7B's micro-batch is followed through in seconds. What asks whether a tensor is on a GPU is told so,
Triton's launches are left out behind their allocations, and flash attention's backward takes here
what torch's mha_varlen_bwd takes inside, which no dispatch mode sees. The allocator and CUDA itself
are not in it: those a GPU alone can tell.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import MistralConfig, MistralForCausalLM
from zephyr_kernels import _flash, attention, backend, fp16acc, reference, varlen

from plans.live_bytes import LiveBytes, tensors_in
from zephyr_lite.data.layout import Layout
from zephyr_lite.model import host_store
from zephyr_lite.model import policy as policies
from zephyr_lite.model.adapters import add_adapter, trainable_tensors
from zephyr_lite.model.attention import DeviceLayout, to_device
from zephyr_lite.model.frozen_weights import FrozenWeight
from zephyr_lite.model.native import NativeEngine
from zephyr_lite.model.policy import Policy
from zephyr_lite.plan.geometry import Geometry, geometry_of
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.recipe import ALL_LINEARS, Lora

META = torch.device("meta")
LAUNCHERS = ("lora", "norm", "rope", "swiglu", "nf4", "linear_logprob", "fp16acc")
MISTRAL = {"vocab_size": 32000, "num_key_value_heads": 8, "sliding_window": None}


def geometry(layers: int, **sizes: Any) -> Geometry:
    """Mistral-7B's geometry with fewer layers, or another's `sizes` of config.json."""
    return geometry_of(_config(layers, sizes).to_dict(), "dry")


def live_bytes(setting: Setting, cut: Cut, layout: Layout, layers: int, **sizes: Any) -> int:
    """Peak of live tensor bytes of a micro-batch beside its gradients, no optimizer states.

    What waits in host memory is in it.
    """
    plan = _planned(layout)
    with _pretended_gpu(), patch.object(policies, "to_device", lambda *_: _moved(plan)):
        model = _model(setting, _config(layers, sizes))
        dtype = torch.bfloat16
        saved = "keep" if cut.keep == layers else cut.rest
        engine = NativeEngine(model, dtype, saved=saved, gemm=setting.gemm, kept_layers=cut.keep)
        head = model.get_base_model().get_output_embeddings().weight
        policy = Policy(model, engine, head, META, dtype, "trained", cut.head_rows, setting.gemm)
        for parameter in trainable_tensors(model).values():
            parameter.grad = torch.empty_like(parameter)
        tracker = LiveBytes(tensors_in(policy))
        with tracker:
            (-policy.log_probs(layout, training=True).sum()).backward()
        return tracker.peak


def _config(layers: int, sizes: dict[str, Any]) -> MistralConfig:
    return MistralConfig(**{**MISTRAL, "num_hidden_layers": layers, **sizes})


def _planned(layout: Layout) -> DeviceLayout:
    """The layout with a GPU's plan of its attention."""

    def plan(segments: Any, n_queries: int, n_keys: int, device: torch.device) -> attention.Plan:
        made = make(segments, n_queries, n_keys, device)
        return replace(made, varlen=varlen.plan(segments, n_keys, device))

    make = attention.make_plan
    with patch("zephyr_lite.model.attention.make_plan", plan):
        return to_device(layout, torch.device("cpu"))


def _moved(x: Any) -> Any:
    """The same with its tensors on the device."""
    if isinstance(x, torch.Tensor):
        return torch.empty_like(x, device=META)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: _moved(getattr(x, f.name)) for f in fields(x)})
    return tuple(_moved(y) for y in x) if isinstance(x, tuple) else x


def _model(setting: Setting, config: MistralConfig) -> Any:
    with META:
        model: Any = MistralForCausalLM(config).to(torch.bfloat16).requires_grad_(False)
        rate = 0.05 if setting.dropout else 0.0
        names = ["frozen"] * bool(setting.frozen) + ["trained"]
        for name in names:
            rank = getattr(setting, name)
            lora = {"r": rank, "alpha": rank, "dropout": rate, "targets": setting.targets}
            model = add_adapter(model, name, Lora.model_validate(lora), seed=1)
        model.base_model.set_adapter(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".trained." in name)
        if setting.quantization == "nf4":
            _quantise(model, setting.double_quant)
    return model.train()


def _quantise(model: Any, double_quant: bool) -> None:
    """Put bitsandbytes' linears in place of the layers' plain ones, with its state's tensors."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in ALL_LINEARS or name == "base_layer":
                base = getattr(child, "base_layer", None)
                if base is None:
                    setattr(parent, name, _nf4_linear(child, double_quant))


def _nf4_linear(plain: Any, double_quant: bool) -> Linear4bit:
    n, k = plain.weight.shape
    blocks = -(-n * k // 64)
    linear: Any = Linear4bit(k, n, bias=False)
    packed = torch.empty(-(-n * k // 2), 1, dtype=torch.uint8)
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    outer = SimpleNamespace(code=torch.empty(256), absmax=torch.empty(-(-blocks // 256)))
    linear.weight.quant_state = SimpleNamespace(
        shape=(n, k),
        code=torch.empty(16),
        nested=double_quant,
        absmax=torch.empty(blocks, dtype=torch.uint8 if double_quant else torch.float32),
        state2=outer if double_quant else None,
        offset=0.0,
    )
    return linear


@contextlib.contextmanager
def _pretended_gpu() -> Iterator[None]:
    """What asks for a GPU finds one."""
    before = backend.use("triton")
    modules = [importlib.import_module(f"zephyr_kernels.{name}") for name in LAUNCHERS]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(patch.object(module, "launch", lambda *_, **__: None))
        stack.enter_context(patch.object(attention, "_taken", lambda *_: _flash))
        stack.enter_context(patch.object(reference, "product", _product))
        stack.enter_context(patch.object(host_store, "_copy", lambda *_: None))
        stack.enter_context(patch.object(fp16acc, "_sums", _fp16_sums))
        stack.enter_context(patch.object(FrozenWeight, "check_fp16", lambda _: None))
        stack.enter_context(patch.object(_flash, "backward_", _flash_backward))
        no_autocast = patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        stack.enter_context(no_autocast)
        try:
            yield
        finally:
            backend.use(before)


def _product(x_MK: torch.Tensor, y_KN: torch.Tensor) -> torch.Tensor:
    """cuBLAS' product of half-precision operands in fp32, no operand widened."""
    return x_MK.new_empty(len(x_MK), y_KN.shape[1], dtype=torch.float32)


def _fp16_sums(x16_TK: torch.Tensor, weight_KN: torch.Tensor) -> torch.Tensor:
    pieces = fp16acc.pieces_of(x16_TK.shape[1])
    return x16_TK.new_empty(len(pieces), len(x16_TK), weight_KN.shape[1])


def _flash_backward(*args: Any) -> None:
    """What torch's takes at once, and lets go of but for its results: keys and values in the order
    of the call, dQ, dK, dV, fp32 sums of dQ and of the softmax, dK and dV of every query head."""
    q, k, plan = args[1], args[2], args[6]
    (_, heads, width), (_, kv_heads, _) = q.shape, k.shape
    rows, keys = len(q) + 128 * len(plan.q_lengths), sum(plan.k_lengths)
    rounded = -(-width // 32) * 32
    taken = [q.new_empty(rows, heads, w, dtype=torch.float32) for w in (rounded, 1)]
    copies = 2 if plan.key_rows is None else 4
    taken += [q.new_empty(q.shape), *(k.new_empty(keys, kv_heads, width) for _ in range(copies))]
    taken += [q.new_empty(keys, heads, width) for _ in range(2 if heads > kv_heads else 0)]
    del taken
    flash_backward(*args)


flash_backward = _flash.backward_
