"""Who races, at which settings, in which Python: the table of sides, and how a case is run.

    ours      engines native and hf          default: the recipe's `memory`; best: candidates below
    plain     transformers + PEFT + bitsandbytes, no trainer
    trl       TRL's trainers
    liger     TRL's trainers with Liger's kernels
    unsloth   TRL's trainers as Unsloth patches them

`best` is a list: each is raced, and the fastest counts. A library's `default` is what it does when
asked for no more than the work; a batch its default of pairs or rows, at most an optimizer step's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from races.work import Case
from zephyr_lite.recipe import Memory
from zephyr_lite.recipe_file import load

BENCHMARKS = Path(__file__).resolve().parents[1]  # modules are named from there
RIVALS = ("plain", "trl", "liger", "unsloth")
SCRIPTS = {"ours": "ours", "plain": "plain", "trl": "trl", "liger": "trl", "unsloth": "unsloth"}
NEEDS = {
    "plain": ("torch", "transformers", "peft", "bitsandbytes"),
    "trl": ("torch", "transformers", "peft", "trl"),
    "liger": ("torch", "transformers", "peft", "trl", "liger_kernel"),
    "unsloth": ("torch", "trl", "unsloth", "unsloth_zoo"),
}
# Asked without importing any of them: Unsloth takes a minute, and patches what it finds.
PROBE = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""
QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # all that is raced lies in folders
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}
Options = list[tuple[str | None, str, dict[str, Any]]]  # engine, setting, options
TOKENS = 2048  # of a micro-batch under engine hf


def variants(side: str, task: str, geometry: str, batch: int, *, on_gpu: bool) -> Options:
    """Everything a side races with: (engine, `default` or `best`, options)."""
    if side == "ours":
        return list(_ours(geometry, on_gpu))
    sizes = [n for n in _sizes(task, geometry, on_gpu) if n <= batch and batch % n == 0]
    defaults = {"plain": 4, "trl": 8, "liger": 8, "unsloth": 4}
    first = max(n for n in range(1, defaults[side] + 1) if batch % n == 0)
    make = {"plain": _plain, "trl": _trl, "liger": _liger, "unsloth": _unsloth}[side]
    default, best = make(task, first, sizes, on_gpu)
    return [(None, "default", default), *((None, "best", options) for options in best)]


def _sizes(task: str, geometry: str, on_gpu: bool) -> list[int]:
    """Examples of a forward that `best` tries; a row of 2,048 tokens is as long as four pairs."""
    if geometry == "toy":
        return [2]
    if task == "sft":
        return [1, 2]
    return [1, 2, 4] if on_gpu else [1, 2]


def _ours(geometry: str, on_gpu: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Default: what the recipe says, planned where it says `auto`. Best: planned, and beside it
    plans of fixed micro-batches; engine hf has no plan.
    """
    planned = Memory()  # pyright: ignore[reportCallIssue] - all is `auto`
    default = load("zephyr-7b").memory if geometry == "mistral-7b" else planned
    yield "native", "default", _memory(default)
    others = [{"tokens_per_micro_batch": n} for n in (2048, 4096, 8192)] if on_gpu else []
    for options in (_memory(planned), *(_memory(planned) | other for other in others)):
        if options != _memory(default):
            yield "native", "best", options
    for again in ("none", "full") if on_gpu else ("none",):
        options = {"tokens_per_micro_batch": TOKENS, "checkpointing": again}
        yield "hf", "best", _memory(planned) | options


def _memory(memory: Memory) -> dict[str, Any]:
    return memory.model_dump(mode="json", exclude={"budget", "reserve"})


def _plain(task: str, first: int, sizes: list[int], on_gpu: bool) -> tuple[dict, list[dict]]:
    default = {"batch": first, "checkpointing": True}
    return default, [_uncut(task, n) for n in sizes]


def _trl(task: str, first: int, sizes: list[int], on_gpu: bool) -> tuple[dict, list[dict]]:
    best = [_uncut(task, n) | ({"flash": True} if on_gpu else {}) for n in sizes]
    if on_gpu:  # what a card that does not hold every layer's activations is left with
        largest = best[-1] | {"checkpointing": True}
        best += [largest | {"every_n_layers": n} for n in (2, 4)] + [largest]
        best.append(best[0] | {"kernels": True})
    return {"batch": first}, best


def _liger(task: str, first: int, sizes: list[int], on_gpu: bool) -> tuple[dict, list[dict]]:
    default, best = _trl(task, first, sizes, on_gpu)
    plain = [options for options in best if "kernels" not in options]
    return default | {"liger": True}, [options | {"liger": True} for options in plain]


def _unsloth(task: str, first: int, sizes: list[int], on_gpu: bool) -> tuple[dict, list[dict]]:
    fused = {"fused": True} if on_gpu and task == "dpo" else {}
    best = [_uncut(task, n) | fused for n in sizes]
    if on_gpu:
        largest = best[-1] | {"checkpointing": "unsloth", "skip_layers": "auto"}
        best.append(largest | {"env": {"UNSLOTH_GC_PREFETCH": "1"}})
        best.append(best[0] | {"env": {"UNSLOTH_RMSNORM_SAVE_OUTPUT": "1"}})
    return {"batch": first}, best


def _uncut(task: str, batch: int) -> dict[str, Any]:
    """No layer computed twice, the reference once; pairs that pad each other least."""
    pairs = {"precompute": True, "sorted": batch > 1} if task == "dpo" else {}
    return {"batch": batch, "checkpointing": False, **pairs}


def missing(side: str, python: str) -> str:
    """Why a rival cannot race in this Python, and how to make one that can; "" if it can."""
    # A row is published: no path of this machine in it.
    whose = "this Python" if python == sys.executable else f"the Python given for {side}"
    hint = f"benchmarks/rivals/{side}.txt says how to make one for --rival-python {side}=PATH"
    command = [python, "-c", PROBE, *NEEDS[side]]
    try:
        done = subprocess.run(command, env=_environment(1, {}), capture_output=True, text=True)
    except OSError as error:
        return f"{whose} does not run: {error.strerror}; {hint}"
    if done.returncode:
        return f"{whose} does not run: {last_line(done.stderr)}; {hint}"
    lacking = json.loads(done.stdout)
    return f"{whose} lacks {', '.join(lacking)}; {hint}" if lacking else ""


def run_apart(case: Case, folder: Path, python: str) -> dict[str, Any]:
    """Do one case in a process of its own: what it reported, or `status` and `reason`."""
    out = folder / "result.json"
    out.unlink(missing_ok=True)
    script = BENCHMARKS / "races" / f"side_{SCRIPTS[case.side]}.py"
    command = [python, str(script), json.dumps(asdict(case)), str(folder), str(out)]
    environment = _environment(case.threads, case.options.get("env", {}))
    if case.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "UNSLOTH_FORCE_CPU": "1"}
    own = os.environ.get("PYTHONPATH", "") if case.side == "ours" else ""  # may stand on it
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(BENCHMARKS), own]))
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, errors="replace", cwd=folder
    )
    if done.returncode == 0:
        return {"status": "ok", **json.loads(out.read_text(encoding="utf-8"))}
    is_full = "out of memory" in done.stderr.lower() or done.returncode == -9
    status = "out of memory" if is_full else "failed"
    reason = last_line(done.stderr) or f"the process ended with code {done.returncode}"
    return {"status": status, "reason": reason}


def last_line(text: str) -> str:
    """The last line that says something: of a traceback the error, without the machine's paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _environment(threads: int, more: dict[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return kept | counts | QUIET | more
