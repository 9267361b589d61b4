"""What every stage is handed: the recipe, the run folder, the device, and who watches."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.sources import fingerprint
from zephyr_lite.model.base import BaseFiles, compute_dtype, load_base, locate, prepare
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Base, Recipe, Source
from zephyr_lite.run import Run
from zephyr_lite.stopping import Stop
from zephyr_lite.storage import write_json
from zephyr_lite.tiny.base import build_base
from zephyr_lite.train.loop import Listener

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "numpy", "gguf")


@dataclass
class Context:
    """One command's surroundings."""

    run: Run
    device: torch.device
    listener: Listener
    stop: Stop

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.run.recipe

    @cached_property
    def base_settings(self) -> Base:
        """The recipe's base; one that is to be built has become a local folder."""
        base = self.recipe.base
        if base.build is None:
            return base
        folder = build_base(base.build, self.device, self.recipe.seed, self.listener, self.stop)
        return base.model_copy(update={"model": str(folder)})

    @cached_property
    def base(self) -> BaseFiles:
        """The base model's files, quantised."""
        files = prepare(self.base_settings, self.device, offline=self.run.offline)
        self.run.record(base=files.identity)
        return files

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The base's tokenizer, from its own bytes; the base itself is not quantised for it."""
        return load_tokenizer(locate(self.base_settings, offline=self.run.offline)[0])

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype on this device."""
        return compute_dtype(self.recipe.base, self.device)

    def load_model(self) -> torch.nn.Module:
        """The frozen base, freshly loaded."""
        return load_base(self.base, self.base_settings, self.device)

    def policy(self, model: Any) -> Policy:
        """A policy over a model."""
        return make_policy(model, self.dtype, self.device, self.recipe.memory)

    def data_fingerprints(self, *groups: tuple[Source, ...]) -> dict[str, str]:
        """`path[split]` -> hash of contents, for the inputs of a stage."""
        return {
            f"{s.path}[{s.split}]" if s.split else s.path: fingerprint(
                s.path, s.split, offline=self.run.offline
            )
            for group in groups
            for s in group
        }

    def machine(self) -> dict[str, Any]:
        """Versions and hardware, for the manifest."""
        found: dict[str, Any] = {
            "python": platform.python_version(),
            "platform": platform.platform(),
        }
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = None
        found |= {"device": str(self.device), "threads": torch.get_num_threads()}
        found |= {"engine": self.recipe.engine, "attention": "sdpa", "dtype": str(self.dtype)}
        if self.device.type == "cuda":
            found |= {"gpu": torch.cuda.get_device_name(self.device), "cuda": torch.version.cuda}
        return found

    @contextmanager
    def stage(self, name: str, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Run a stage: note its begin, time it, and record what the block puts into the dict."""
        self.run.begin(name, inputs)
        began = time.monotonic()
        figures: dict[str, Any] = {}
        try:
            yield figures
        except BaseException:
            self.run.add_seconds(name, time.monotonic() - began)
            raise
        seconds = time.monotonic() - began
        self.run.finish(name, seconds=seconds, machine=self.machine(), **figures)

    def compare_with_expected(self) -> None:
        """Say of each published band whether this run's figure lies in it."""
        verdicts = {}
        for name, (low, high) in self.recipe.expect.items():
            stage, _, figure = name.partition(".")
            value = self.run.manifest["stages"].get(stage, {}).get("figures", {}).get(figure)
            if value is None:
                continue
            verdicts[name] = {"value": value, "low": low, "high": high, "in": low <= value <= high}
            side = "in" if low <= value <= high else "OUTSIDE"
            self.listener.note(f"{name} {value:.4g}: {side} the expected {low:g} to {high:g}")
        if verdicts:
            self.run.record(expected=verdicts)

    def write(self, value: Any, *parts: str) -> Path:
        """Write a JSON file of the run folder."""
        path = self.run.path(*parts)
        write_json(path, value)
        return path
