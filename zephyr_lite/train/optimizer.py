"""Optimizers, the learning-rate schedule, and optimizer state as plain tensors.

State goes to and from checkpoints by parameter name, not by torch's pickled state dict: what is
read back is numbers only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from bitsandbytes.optim.optimizer import Optimizer8bit

from zephyr_lite.recipe import Training

_BITSANDBYTES = {
    "adamw_8bit": AdamW8bit,
    "paged_adamw_8bit": PagedAdamW8bit,
    "paged_adamw_32bit": PagedAdamW32bit,
}


def make_optimizer(
    settings: Training, parameters: dict[str, torch.nn.Parameter]
) -> torch.optim.Optimizer:
    """AdamW (betas 0.9 and 0.999, eps 1e-8) in the recipe's format over fp32 masters."""
    options: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    values = list(parameters.values())
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(values, fused=True, **options)
    return _BITSANDBYTES[settings.optimizer](values, **options)


def learning_rate(settings: Training, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (0-based); the same values as transformers'
    schedules: linear warm-up from 0 over ceil(warmup_ratio * total) steps, then decay to 0.
    """
    warmup = math.ceil(settings.warmup_ratio * total_steps)
    if step < warmup:
        return settings.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    factor = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
        "linear": 1.0 - progress,
        "constant": 1.0,
    }[settings.schedule]
    return settings.learning_rate * max(0.0, factor)


def state_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """`state name/parameter name` -> tensor; Python numbers become 0-d tensors."""
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensor = value if torch.is_tensor(value) else torch.tensor(value)
            found[f"{key}/{name}"] = tensor.detach().cpu().contiguous().clone()
    return found


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: dict[str, torch.nn.Parameter],
    tensors: dict[str, torch.Tensor],
) -> None:
    """Put back what `state_tensors` took."""
    for index, (name, parameter) in enumerate(parameters.items()):
        stored = {k.split("/", 1)[0]: t for k, t in tensors.items() if k.split("/", 1)[1] == name}
        if not stored:
            continue
        if isinstance(optimizer, Optimizer8bit):
            # Let bitsandbytes lay out its buffers (paged ones are not ordinary tensors), then fill.
            optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        state: dict[str, Any] = optimizer.state[parameter]
        for key, tensor in stored.items():
            if isinstance(state.get(key), torch.Tensor):
                state[key].copy_(tensor)
            elif tensor.ndim == 0 and isinstance(optimizer, Optimizer8bit):
                state[key] = tensor.item()
            else:
                # torch keeps its step counter where the fused kernel reads it: beside the parameter
                state[key] = tensor.to(parameter.device)
