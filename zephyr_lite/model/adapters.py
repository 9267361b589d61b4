"""LoRA adapters: attach, stack, freeze, and save as one PEFT adapter relative to the original base.

The field's most reported Zephyr failure is a DPO adapter loaded on the wrong base: it was trained
on base + SFT, its config names the base, and the SFT half is lost. Here two stacked adapters are
saved as one of rank r1 + r2, exact, for the sum of two low-rank updates is a low-rank update:

    s1 B1 A1 + s2 B2 A2 = [s1 B1 | s2 B2] [A1 ; A2]        alpha = r, so that PEFT's scale is 1

A linear that only one of the two changes gets zeros for the other.

Only PEFT's public shapes are used: any PEFT loads the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import DataError, VerificationError
from zephyr_lite.recipe import Lora
from zephyr_lite.storage import file_digest, read_json, write_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# All that a plain sum of s B A is made of or that acts only in training. What stands beside them in
# adapter_config.json and is not empty makes it more; to ignore it would be silently wrong.
PLAIN = {
    "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "inference_mode",
    "init_lora_weights", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "revision", "runtime_config",
    "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# The other ways to begin subtract from the base what they put into the adapter.
FAITHFUL_INITS = (True, False, "gaussian", "eva", "orthogonal")


def add_adapter(model: Any, name: str, lora: Lora, seed: int) -> PeftModel:
    """Add a fresh adapter (B = 0, so nothing changes yet), fp32 masters, initialised by seed."""
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - PEFT multiplies by it
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        task_type="CAUSAL_LM",
    )
    return _attach(model, name, config, seed)


def load_adapter(model: Any, name: str, folder: Path) -> PeftModel:
    """Add a saved adapter under `name`. Raises: DataError when it does not fit the model."""
    stored_config = read_json(folder / CONFIG)
    refuse_unsupported(stored_config, folder)
    config = LoraConfig(
        r=stored_config["r"],
        lora_alpha=stored_config["lora_alpha"],
        use_rslora=stored_config.get("use_rslora", False),
        target_modules=stored_config["target_modules"],
        task_type="CAUSAL_LM",
    )
    peft_model = _attach(model, name, config, seed=0)
    wanted = dict(_tensors(peft_model, name))
    stored = load_file(folder / WEIGHTS)
    if wanted.keys() != stored.keys():
        odd = sorted(wanted.keys() ^ stored.keys())[0]
        raise DataError(f"{folder}: adapter and base do not fit: {odd}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            if parameter.shape != stored[key].shape:
                raise DataError(f"{folder}: {key} has shape {tuple(stored[key].shape)}")
            parameter.copy_(stored[key])
    return peft_model


def refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    """Raise DataError for an adapter that is not a plain sum of s B A."""
    path = folder / CONFIG
    for key, value in config.items():
        if value and key not in PLAIN:
            raise DataError(f"{path}: {key} is not supported (got {value!r})")
    allowed: dict[str, tuple[Any, ...]] = {
        "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": FAITHFUL_INITS,
    }  # fmt: skip
    for key, values in allowed.items():
        if config.get(key, values[0]) not in values:
            raise DataError(f"{path}: {key} {config[key]!r} is not supported")
    if not isinstance(config.get("target_modules"), list):
        raise DataError(f"{path}: target_modules must be a list of names")
    if missing := {"r", "lora_alpha"} - config.keys():
        raise DataError(f"{path}: lacks {sorted(missing)}")


def activate(model: Any, names: Sequence[str], trainable: str | None = None) -> None:
    """Make exactly these adapters part of the forward, and one of them trainable.

    Raises: VerificationError when PEFT left anything else trainable.
    """
    if names:
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(list(names))  # this makes all of them trainable
    else:
        model.base_model.disable_adapter_layers()
    model.requires_grad_(False)
    wanted = dict(_tensors(model, trainable)) if trainable else {}
    for parameter in wanted.values():
        parameter.requires_grad_(True)
    count = sum(p.requires_grad for p in model.parameters())
    if count != len(wanted):
        raise VerificationError(f"{count} tensors are trainable, expected {len(wanted)}")


def set_dropout(model: torch.nn.Module, trainable: str | None) -> None:
    """Dropout on in the trainable adapter only; everything else stays in train mode, inert."""
    for _, layer in _named_layers(model):
        for name, dropout in layer.lora_dropout.items():
            dropout.train(name == trainable)


def trainable_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name -> parameter of everything that trains, in the model's order."""
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in found.items():
        if parameter.dtype != torch.float32:
            raise VerificationError(f"{name} trains in {parameter.dtype}; masters must be float32")
    return found


def save_adapter(model: PeftModel, names: Sequence[str], folder: Path, base_id: str) -> None:
    """Write the sum of `names` as one PEFT adapter relative to the original base.

    Args:
        folder: an existing folder; gets adapter_model.safetensors and adapter_config.json.
        base_id: what adapter_config.json calls the base.
    """
    configs: list[Any] = [model.peft_config[n] for n in names]
    rank = sum(c.r for c in configs)
    tensors: dict[str, torch.Tensor] = {}
    for prefix, layer in _named_layers(model):
        if not any(n in layer.lora_A for n in names):
            continue
        parts = [_matrices(layer, n, c.r) for n, c in zip(names, configs, strict=True)]
        b = [w for _, w in parts]
        if len(names) > 1:
            b = [w * layer.scaling.get(n, 1.0) for w, n in zip(b, names, strict=True)]
        tensors[f"{prefix}.lora_A.weight"] = torch.cat([a for a, _ in parts], 0).contiguous()
        tensors[f"{prefix}.lora_B.weight"] = torch.cat(b, 1).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=rank,
        lora_alpha=configs[0].lora_alpha if len(names) == 1 else rank,
        use_rslora=configs[0].use_rslora if len(names) == 1 else False,
        lora_dropout=configs[0].lora_dropout if len(names) == 1 else 0.0,
        target_modules=list({t for c in configs for t in c.target_modules}),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_id,
        inference_mode=True,
    ).save_pretrained(str(folder))
    config = read_json(folder / CONFIG)
    config["target_modules"].sort()  # PEFT keeps a set, whose order is another in every process
    write_json(folder / CONFIG, config)


def adapter_identity(folder: Path) -> dict[str, Any]:
    """What an adapter does to a model: the hash of its weights, and its scale and targets."""
    config = read_json(folder / CONFIG)
    kept = {k: config[k] for k in ("r", "lora_alpha", "use_rslora")}
    targets = sorted(config["target_modules"])
    return {"weights": file_digest(folder / WEIGHTS), "targets": targets, **kept}


def _matrices(layer: Any, name: str, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of an adapter in a layer, fp32 on the CPU; zeros where it does not change it."""
    if name not in layer.lora_A:
        return torch.zeros(r, layer.in_features), torch.zeros(layer.out_features, r)
    halves = (layer.lora_A[name], layer.lora_B[name])
    a, b = (half.weight.detach().float().cpu() for half in halves)
    return a, b


def _attach(model: Any, name: str, config: LoraConfig, seed: int) -> PeftModel:
    config.base_model_name_or_path = None  # the cached NF4 copy is the same model by another name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if not isinstance(model, PeftModel):
            return get_peft_model(model, config, adapter_name=name)  # pyright: ignore[reportReturnType]
        model.add_adapter(name, config)
    return model


def _named_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))


def _tensors(model: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """PEFT's file keys and parameters of one adapter."""
    for prefix, layer in _named_layers(model):
        if name in layer.lora_A:
            yield f"{prefix}.lora_A.weight", layer.lora_A[name].weight
            yield f"{prefix}.lora_B.weight", layer.lora_B[name].weight
