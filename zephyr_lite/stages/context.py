"""What every stage is handed: the recipe, the run folder, the device, and who watches."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.sources import source_fingerprint
from zephyr_lite.model.base import BaseFiles, compute_dtype, load_base, locate, prepare
from zephyr_lite.model.engines import choose, choose_gemm, choose_kernels
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.gemm_probe import probe
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.model.starting_point import StartingPoint, find_start
from zephyr_lite.recipe import Base, Memory, Recipe, Source
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
    used: dict[str, Any] = field(default_factory=dict)  # engine, kernels, ... of the last policy
    planned: Memory | None = None  # what a plan made of the recipe's, see `fit.py`
    plans_said: dict[str, str] = field(default_factory=dict)  # by stage, shared by copies
    _gemm_figures: dict[str, Any] | None = None  # of the probe, once it has run

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return self.run.recipe

    @property
    def memory(self) -> Memory:
        """How the work is cut: as planned, else as the recipe says."""
        return self.planned or self.recipe.memory

    @cached_property
    def start(self) -> StartingPoint | None:
        """What `sft.from` names; None where dSFT trains, or where there is none."""
        sft = self.recipe.sft
        if sft is None or sft.start is None:
            return None
        return find_start(sft.start, offline=self.run.offline)

    @property
    def sft_model(self) -> StartingPoint | None:
        """The finished SFT model that `sft.from` names: the base of all that follows."""
        return self.start if self.start is not None and self.start.kind == "model" else None

    @cached_property
    def base_settings(self) -> Base:
        """The base that is loaded: the SFT model in place of the recipe's, a built one's folder."""
        base, model = self.recipe.base, self.sft_model
        if model is not None:
            place = {"model": model.name, "revision": model.revision, "build": None}
            return base.model_copy(update=place)
        if base.build is None:
            return base
        folder = build_base(base.build, self.device, self.recipe.seed, self.listener, self.stop)
        return base.model_copy(update={"model": str(folder)})

    @property
    def base_name(self) -> str:
        """What an adapter calls the base that it is relative to."""
        return self.recipe.base.model if self.sft_model is None else self.sft_model.name

    def adapter(self, stage: str) -> Path | None:
        """Folder of a stage's adapter; None for `sft` where there is none over the base.

        That is without dSFT, and where the base itself is the SFT model.
        """
        if stage == "sft" and (self.recipe.sft is None or self.sft_model is not None):
            return None
        return self.run.path(stage, "adapter")

    @cached_property
    def base(self) -> BaseFiles:
        """The base model's files, quantised."""
        files = prepare(self.base_settings, self.device, offline=self.run.offline)
        if departure := files.departure(self.base_settings):
            self.listener.note(departure)
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

    def training_policy(self, model: Any) -> Policy:
        """A policy that trains, or computes what training compares itself with.

        Raises: MachineError where the recipe's `gemm` is not for this machine.
        """
        return self.policy(model, choose_gemm(self.recipe.gemm, self.engine, self.device))

    def policy(self, model: Any, gemm: Gemm = "exact") -> Policy:
        """A policy over a model; what is only measured needs no other `gemm` than exact."""
        kernels, memory = self.kernels, self.memory
        policy = make_policy(
            model,
            self.dtype,
            self.device,
            memory,
            engine=self.engine,
            gemm=gemm,
            attention=self.recipe.attention,
        )
        if policy.attention == "dense" and "attention" not in self.used:
            self.listener.note(
                f"attention: this GPU has no flash kernel for {self.dtype}; "
                "the plain definition computes, slower and in memory quadratic in a row's tokens"
            )
        # In place: a training's planned copy of the context shares it with the stage's record.
        self.used.clear()
        self.used |= {"engine": self.engine, "kernels": kernels, "attention": policy.attention}
        self.used |= {"gemm": gemm, "layers": policy.engine.report()}
        if gemm != "exact":
            self.used["gemm_probe"] = self._probe(policy)
        return policy

    def _probe(self, policy: Policy) -> dict[str, Any]:
        """Figures of the probe of the recipe's `gemm`, once per command."""
        if self._gemm_figures is None:
            self._gemm_figures = probe(policy.engine, self.memory.tokens)
            gain = self._gemm_figures["gain"]
            self.listener.note(f"gemm: {policy.gemm}: {gain:.2f} times as fast as exact products")
        return self._gemm_figures

    @cached_property
    def engine(self) -> str:
        """What runs the base: the recipe's engine, or `hf`, with a note, where it cannot."""
        found, reason = choose(self.recipe.engine, self.base.folder)
        if reason:
            self.listener.note(f"engine {found}: {reason}")
        return found

    @cached_property
    def kernels(self) -> str:
        """What the engine's operations are computed by: `triton` or `torch`."""
        return choose_kernels(self.recipe.kernels, self.engine, self.device)

    def data_fingerprints(self, *groups: Sequence[Source]) -> dict[str, str]:
        """Source -> hash of its contents, for the inputs of a stage."""
        return {
            _source_name(source): source_fingerprint(source, offline=self.run.offline)
            for group in groups
            for source in group
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
        found |= {"dtype": str(self.dtype)} | self.used
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


def _source_name(source: Source) -> str:
    """`path[split]` or `path/file`, and `@revision` of the hub."""
    name = f"{source.path}/{source.file}" if source.file else source.path
    split = f"[{source.split}]" if source.split and not source.file else ""
    return name + split + (f"@{source.revision}" if source.revision else "")
