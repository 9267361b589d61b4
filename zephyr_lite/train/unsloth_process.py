"""Engine `unsloth`: dSFT by Unsloth in a process of its own, and what comes back checked.

It patches every library that it touches, so it never enters this process: another Python runs
`unsloth_worker` over our token ids, micro-batches and learning rates, says each step in a line of
JSON, and leaves an adapter. That one is held against the tensors it must fill before it is ours,
and is saved by the code that saves every adapter.

    FOLDER/checkpoints/   what the worker reads, its checkpoints, the adapter that it leaves
    FOLDER/unsloth.log    what Unsloth and its libraries print
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from zephyr_lite.data.layout import Documents, Order, Row, fill
from zephyr_lite.errors import DivergedError, MachineError, VerificationError
from zephyr_lite.model.base import BaseFiles
from zephyr_lite.recipe import Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.storage import cache_folder, read_json, write_json
from zephyr_lite.train import unsloth_worker
from zephyr_lite.train.checkpoint import Figures
from zephyr_lite.train.loop import Listener
from zephyr_lite.train.masters import Parameters
from zephyr_lite.train.metrics import MetricsLog
from zephyr_lite.train.optimizer import learning_rate

PYTHON = "ZEPHYR_LITE_UNSLOTH_PYTHON"
# The newest that pip resolves; its API was read in the wheel.
REQUIREMENTS = "unsloth==2026.10.7 unsloth_zoo==2026.10.7 trl==1.15.0"
# Asked without importing any of them: Unsloth takes a minute, and may need the GPU.
VERSIONS = """
import importlib.metadata, json
found = {}
for name in ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # the base lies in a folder
    "PYTHONSAFEPATH": "1",  # its neighbours are modules of ours, none of its business
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
CHECKPOINTING = {"auto": "unsloth", "none": False, "full": True, "offload": "unsloth"}
POLL_SECONDS = 0.2
LOG_LINES = 4


@dataclass(frozen=True)
class Environment:
    """A Python that can import Unsloth, and the versions of what matters there."""

    python: Path
    versions: dict[str, str]


def find_environment() -> Environment:
    """The one that `ZEPHYR_LITE_UNSLOTH_PYTHON` names, else CACHE/unsloth.

    Raises: MachineError that says how to make it.
    """
    named = os.environ.get(PYTHON)
    folder = cache_folder() / "unsloth"
    python = Path(named) if named else folder / "bin" / "python"
    install = f"{'' if named else f'python3 -m venv {folder} && '}{python} -m pip install"
    hint = f"{install} {REQUIREMENTS}" + ("" if named else f"; or let {PYTHON} name another Python")
    if not python.is_file():
        whose = f"{PYTHON} names {python}, which" if named else f"{python}"
        raise MachineError(f"engine unsloth: {whose} does not exist", hint=hint)
    try:
        done = subprocess.run(
            [str(python), "-c", VERSIONS], env=_environment(), capture_output=True, text=True
        )
        versions = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError) as error:
        raise MachineError(f"engine unsloth: {python} does not run: {error}", hint=hint) from None
    if versions is None:
        raise MachineError(
            f"engine unsloth: {python} does not run: {_last(done.stderr)}", hint=hint
        )
    if "unsloth" not in versions:
        raise MachineError(f"engine unsloth: {python} has no Unsloth", hint=hint)
    return Environment(python, versions)


@dataclass
class UnslothJob:
    """One dSFT, trained elsewhere: `run`, then `finish` over a model in this process.

    folder: the stage's. seed: of order, adapter and dropout.
    """

    environment: Environment
    base: BaseFiles
    dtype: torch.dtype
    device: torch.device
    documents: Documents
    rows: list[Row]
    settings: Sft
    memory: Memory
    folder: Path
    seed: int
    listener: Listener
    stop: Stop
    _seconds: float = field(default=0.0, init=False)
    _log: MetricsLog | None = field(default=None, init=False)

    def run(self) -> None:
        """Train to the end, from the worker's last checkpoint where there is one.

        Raises: Stopped on a signal; DivergedError; MachineError when the process died.
        """
        self._write_input()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the GPU is the worker's alone
        ended = False
        try:
            with self.stop.deferred(), self._worker() as events:
                for event in events:
                    ended = self._take(event)
        finally:
            self._close_log()
            self.listener.end()
        self.stop.check("sft stopped; what Unsloth trained so far is saved")
        if not ended:
            raise self._death("ended without a word")

    def finish(self, parameters: Parameters, evaluate: Callable[[], Figures]) -> dict[str, Any]:
        """Put the adapter's weights into fp32 parameters; its held-out figures.

        Args: parameters: name -> tensor of what would train here.
        Raises: VerificationError when it is not the adapter that was asked for.
        """
        take_over(self._scratch / unsloth_worker.WEIGHTS, parameters)
        figures = evaluate()
        steps = self._order.total_steps
        self._open_log(steps).write({"step": steps} | figures)
        self._close_log()
        return figures | {"steps": steps, "seconds": round(self._seconds, 3)}

    @property
    def _scratch(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def _order(self) -> Order:
        s = self.settings
        return Order(len(self.rows), s.batch_size, s.epochs, self.seed, s.max_steps)

    def _write_input(self) -> None:
        """Everything the worker trains on, cut into the micro-batches of our own loop."""
        order, budget = self._order, self.memory.tokens
        spans: list[tuple[int, int]] = []
        micro_batches, steps = [0], [0]
        for step in range(order.total_steps):
            examples = order.step(step)
            sizes = [sum(stop - start for start, stop in self.rows[i]) for i in examples]
            for members in fill(sizes, budget):
                spans += [span for m in members for span in self.rows[examples[m]]]
                micro_batches.append(len(spans))
            steps.append(len(micro_batches) - 1)
        rates = [learning_rate(self.settings, i, order.total_steps) for i in range(len(steps) - 1)]
        self._scratch.mkdir(parents=True, exist_ok=True)
        arrays = {
            "ids": self.documents.ids,
            "answer": self.documents.answer,
            "spans": np.array(spans, np.int64),
            "micro_batches": np.array(micro_batches, np.int64),
            "steps": np.array(steps, np.int64),
            "rates": np.array(rates, np.float64),
        }
        for name, array in arrays.items():
            np.save(self._scratch / f"{name}.npy", array)
        write_json(self._scratch / "settings.json", self._settings())

    def _settings(self) -> dict[str, Any]:
        s = self.settings
        names = ("max_length", "loss_on", "weight_decay", "max_grad_norm", "optimizer",
                 "checkpoint_every", "checkpoint_minutes", "checkpoint_keep")  # fmt: skip
        return {
            "model": str(self.base.folder),
            "load_in_4bit": self.base.identity["quantization"] != "none",
            "vocab_size": read_json(self.base.folder / "config.json")["vocab_size"],
            "dtype": str(self.dtype).removeprefix("torch."),
            "seed": self.seed,
            "checkpointing": CHECKPOINTING[self.memory.checkpointing],
            "lora": s.lora.model_dump(mode="json"),
            **{name: getattr(s, name) for name in names},
        }

    @contextmanager
    def _worker(self) -> Iterator[Iterator[dict[str, Any]]]:
        """Start the process; its events. It does not outlive the block."""
        command = [str(self.environment.python), unsloth_worker.__file__, str(self._scratch)]
        with self._log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self._scratch,  # Unsloth writes what it compiled to where it stands
                env=_environment(self.device),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )
        try:
            yield self._events(process)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with those that it started to compile
            process.wait()

    def _events(self, process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
        """What the worker says until it ends; a signal that we got is passed on, once.

        Raises: MachineError when it ended badly, unless we asked it to stop.
        """
        asked_to_stop = False
        for line in _lines(process.stdout):
            if self.stop.requested is not None and not asked_to_stop:
                asked_to_stop = True
                process.terminate()
            if line is not None:
                yield json.loads(line)
        code = process.wait()
        if code != 0 and not asked_to_stop:
            raise self._death(f"died with exit code {code}")

    def _take(self, event: dict[str, Any]) -> bool:
        """Pass one event on; True at the last one. Raises: Stopped, DivergedError."""
        kind, order = event.pop("event"), self._order
        if kind == "start":
            self._seconds = event["seconds"]
            self._open_log(event["step"])
            self.listener.start("sft", order.total_steps, event["step"])
        elif kind == "note":
            self.listener.note(event["text"])
        elif kind == "diverged":
            raise self._divergence(event["step"], "loss" if event["is_loss"] else "gradient")
        elif kind == "stopped":
            self.stop.check(f"sft stopped after step {event['step']}; state is saved")
        elif kind == "step":
            record, is_last = self._record(event), event["step"] == order.total_steps
            if self._log and (is_last or event["step"] % self.settings.log_every == 0):
                self._log.write(record)
            self.listener.step(record)
        return kind == "done"

    def _open_log(self, step: int) -> MetricsLog:
        self._log = MetricsLog(self.folder / "metrics.jsonl", step)
        return self._log

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
        self._log = None

    def _record(self, event: dict[str, Any]) -> dict[str, Any]:
        """A step's metrics under our names."""
        order, step = self._order, event["step"]
        self._seconds += event["seconds"]
        return {
            "step": step,
            "epoch": round(step / order.steps_per_epoch, 4),
            "loss": event["loss"],
            "learning_rate": learning_rate(self.settings, step - 1, order.total_steps),
            "grad_norm": event["grad_norm"],
            "tokens_per_second": round(event["tokens"] / event["seconds"], 1),
            "peak_memory_gib": event["peak_memory_gib"],
        }

    def _divergence(self, step: int, what: str) -> DivergedError:
        rows = ", ".join(f"packed row {i}" for i in self._order.step(step - 1)[:16])
        return DivergedError(
            f"sft: the {what} is not finite at step {step} under engine unsloth; rows: {rows}",
            hint="look at these rows, or lower the learning rate; no update was applied and the "
            "last checkpoint is kept",
        )

    def _death(self, how: str) -> MachineError:
        """How the process ended, and the last lines that it printed."""
        lines = _last(self._log_path.read_text(encoding="utf-8", errors="replace"))
        return MachineError(
            f"engine unsloth: its process {how}: {lines}",
            hint=f"all that it printed is in {self._log_path}",
        )

    @property
    def _log_path(self) -> Path:
        return self.folder / "unsloth.log"


def take_over(path: Path, parameters: Parameters) -> None:
    """Fill fp32 parameters from an adapter that another process wrote.

    Raises: VerificationError naming the tensor that is missing, of other shape or type, or not
        finite; nothing is changed then.
    """
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{path}: cannot be read: {error}") from None
    # PEFT's file has no adapter name where the model has one: lora_A.sft.weight.
    wanted = {".".join(n.split(".")[:-2]) + ".weight": p for n, p in parameters.items()}
    if odd := sorted(wanted.keys() ^ stored.keys()):
        side = "lacks" if odd[0] in wanted else "has a tensor that was not asked for,"
        raise VerificationError(f"{path}: the adapter {side} {odd[0]}")
    for name, tensor in stored.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32:
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise VerificationError(
                f"{path}: {name} is {found}, expected float32 {tuple(wanted[name].shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise VerificationError(f"{path}: {name} is not finite")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def _environment(device: torch.device | None = None) -> dict[str, str]:
    """Our environment without what speaks of our Python, and with Unsloth kept quiet."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    if device is not None and device.type == "cpu":
        kept["UNSLOTH_FORCE_CPU"] = "1"
    return kept | QUIET


def _lines(stream: IO[str] | None) -> Iterator[str | None]:
    """Lines of a pipe as they come, and None now and then while none does."""
    if stream is None:
        raise ValueError("not a pipe")
    found: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            found.put(line)
        found.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = found.get(timeout=POLL_SECONDS)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        yield line


def _last(text: str) -> str:
    """The last lines that say something, in one."""
    return " | ".join([line.strip() for line in text.splitlines() if line.strip()][-LOG_LINES:])
