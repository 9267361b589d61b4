"""Engine unsloth: what the worker computes, what the two processes say to each other, what fails.

The worker file and the processes are real; Unsloth itself, which needs a GPU, is stood in for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.data.layout import join_documents, pack_masked, pack_wrapped
from zephyr_lite.errors import DivergedError, MachineError, Stopped, VerificationError
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.base import BaseFiles
from zephyr_lite.recipe import Lora, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train import unsloth_worker
from zephyr_lite.train.unsloth_process import (
    PYTHON,
    Environment,
    UnslothJob,
    find_environment,
    take_over,
)

CPU = torch.device("cpu")
DOCUMENTS = [40, 12, 33, 7, 55, 21, 18, 30]
WEIGHTS = unsloth_worker.WEIGHTS
LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


@pytest.fixture
def unsloth_job(
    tiny_mistral: Path, tiny_nf4: BaseFiles, random_documents: Callable, watcher: Callable
) -> Callable[..., UnslothJob]:
    """`unsloth_job(folder, watcher, python=, nf4=, tokens=, **settings)`: as `sft_job`."""

    def make(
        folder: Path,
        seen: Any = None,
        *,
        python: Path = Path(sys.executable),
        nf4: bool = False,
        tokens: int = 4096,
        dropout: float = 0.0,
        **settings: Any,
    ) -> UnslothJob:
        documents = join_documents(random_documents(DOCUMENTS))
        fields = {"batch_size": 4, "optimizer": "adamw", "learning_rate": 1e-2, **settings}
        chosen = Sft.model_validate(fields | {"lora": LORA | {"dropout": dropout}})
        pack = pack_wrapped if chosen.packing == "wrapped" else pack_masked
        return UnslothJob(
            environment=Environment(python, {"unsloth": "0"}),
            base=tiny_nf4 if nf4 else BaseFiles(tiny_mistral, {"quantization": "none"}),
            dtype=torch.float32,
            device=CPU,
            documents=documents,
            rows=pack(documents, 40),
            settings=chosen,
            memory=Memory(tokens_per_micro_batch=tokens),
            folder=folder,
            seed=11,
            listener=seen or watcher(),
            stop=Stop(),
        )

    return make


@pytest.fixture
def peft_model(load_tiny: Callable) -> Callable[..., Any]:
    """`peft_model(dropout)`: stock transformers and PEFT, its adapter begun as `sft_job`'s."""

    def make(dropout: float = 0.0) -> Any:
        model = load_tiny("none")
        return add_adapter(model, "default", Lora.model_validate(LORA | {"dropout": dropout}), 3)

    return make


@pytest.fixture
def in_worker(peft_model: Callable) -> Callable[..., list[dict[str, Any]]]:
    """`in_worker(job)`: the worker's own `train`, in this process; what it says."""

    def run(job: UnslothJob, stop_after: int | None = None) -> list[dict[str, Any]]:
        job._write_input()
        scratch, said, signals = job.folder / "checkpoints", [], unsloth_worker.Signals()

        def emit(event: str, **fields: Any) -> None:
            said.append({"event": event, **fields})
            signals.requested = fields.get("step") == stop_after and event == "step"

        settings = json.loads((scratch / "settings.json").read_text())
        rows = unsloth_worker.Rows.read(scratch)
        model = peft_model(job.settings.lora.dropout)
        unsloth_worker.train(model, rows, settings, scratch, emit, signals)
        return said

    return run


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that finds a module `unsloth` of version 0, see unsloth_stand_in.py."""
    folder = tmp_path_factory.mktemp("environment")
    source = Path(__file__).with_name("unsloth_stand_in.py")
    (folder / "unsloth.py").write_text(source.read_text())
    (folder / "unsloth-0.dist-info").mkdir()
    (folder / "unsloth-0.dist-info" / "METADATA").write_text("Name: unsloth\nVersion: 0\n")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH={folder}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


# ---------------------------------------------------------------- what the worker computes


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": 60, "epochs": 2, "weight_decay": 0.1, "max_grad_norm": 0.2},
        {"loss_on": "assistant", "tokens": 60},
        {"optimizer": "adamw_8bit", "schedule": "linear"},
        {"packing": "wrapped"},
    ],
    ids=lambda s: " ".join(s),
)
def test_the_worker_takes_the_steps_of_our_loop(
    settings, sft_job, unsloth_job, in_worker, watcher, tmp_path
) -> None:
    seen = watcher()
    ours = sft_job(tmp_path / "ours", seen, **{k: v for k, v in settings.items() if k != "packing"})
    theirs = unsloth_job(tmp_path / "theirs", **settings)
    ours.objective.rows = theirs.rows
    ours.run()
    steps = [e for e in in_worker(theirs) if e["event"] == "step"]
    assert len(steps) == len(seen.records) > 1
    for step, record in zip(steps, seen.records, strict=True):
        assert step["loss"] == pytest.approx(record["loss"], abs=1e-4)
        assert step["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-3)
    assert steps[0]["loss"] != pytest.approx(steps[-1]["loss"], abs=1e-2)
    stored = load_file(tmp_path / "theirs" / "checkpoints" / WEIGHTS)
    for name, parameter in ours.policy.trainable().items():
        other = stored[name.replace(".sft.", ".")]
        assert (parameter - other).norm() / parameter.norm() < 1e-2  # AdamW magnifies rounding


def test_a_base_that_unsloth_changed_is_refused(
    tiny_mistral: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(stand_in.parent)
    monkeypatch.setenv("STAND_IN", "tokens")
    settings = {"model": str(tiny_mistral), "vocab_size": 384, "dtype": "float32", "seed": 1}
    settings |= {"max_length": 40, "load_in_4bit": False, "checkpointing": False}
    settings |= {"lora": LORA | {"targets": ["q_proj"]}}
    try:
        with pytest.raises(RuntimeError, match="added tokens to the base"):
            unsloth_worker.load(settings)
    finally:
        sys.modules.pop("unsloth", None)


def test_documents_that_are_not_kept_apart_are_seen(peft_model: Callable) -> None:
    settings = {"vocab_size": 384, "dtype": "float32"}
    model = peft_model(0.1)
    unsloth_worker.check_packing(model, settings)
    forward = model.forward

    def leaking(position_ids: Any, **others: Any) -> Any:
        return forward(**others)

    model.forward = leaking
    with pytest.raises(RuntimeError, match="not kept apart"):
        unsloth_worker.check_packing(model, settings)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_32bit"])
def test_a_stopped_worker_goes_on_bit_for_bit(optimizer, unsloth_job, in_worker, tmp_path) -> None:
    options = {"optimizer": optimizer, "epochs": 4, "dropout": 0.1, "tokens": 60}
    whole = in_worker(unsloth_job(tmp_path / "whole", **options))
    job = unsloth_job(tmp_path / "stopped", **options)
    assert in_worker(job, stop_after=3)[-1] == {"event": "stopped", "step": 3}
    rest = in_worker(job)
    assert rest[0]["step"] == 3 and rest[0]["seconds"] > 0
    losses = [[e["loss"] for e in said if e["event"] == "step"] for said in (whole, rest)]
    assert losses[0][3:] == losses[1]
    one, other = (load_file(tmp_path / n / "checkpoints" / WEIGHTS) for n in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    unsloth_job, in_worker, tmp_path
) -> None:
    job = unsloth_job(tmp_path, epochs=4, checkpoint_every=1)
    in_worker(job, stop_after=3)
    newest = job.folder / "checkpoints" / "step-0000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    said = in_worker(job)
    assert "damaged" in said[0]["text"]
    assert said[1]["step"] == 2


def test_the_worker_imports_nothing_of_ours() -> None:
    """By its own file alone, as the other environment has it; its neighbours are out of reach."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1], run_name='worker');"
        "print(*[m for m in sys.modules if m.split('.')[0] in"
        " ('zephyr_lite', 'pydantic', 'metrics', 'transformers', 'peft', 'trl')])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, unsloth_worker.__file__],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# ---------------------------------------------------------------- two processes


def test_what_another_process_trained_comes_back(
    unsloth_job, stand_in, watcher, load_tiny, tmp_path
) -> None:
    seen = watcher()
    options = {"nf4": True, "epochs": 2, "log_every": 3, "dropout": 0.05, "checkpoint_every": 2}
    job = unsloth_job(tmp_path, seen, python=stand_in, **options)
    job.run()
    model = add_adapter(load_tiny(), "sft", job.settings.lora, seed=0)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    figures = job.finish(parameters, lambda: {"eval_loss": 1.5})
    total = len(seen.records)
    assert figures["eval_loss"] == 1.5 and figures["steps"] == total
    assert 0 < figures["seconds"] < 60
    assert any(p.any() for n, p in parameters.items() if ".lora_B." in n)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, total, total]
    wanted = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert lines[0].keys() == wanted | {"peak_memory_gib"}
    assert lines[-1] == {"step": total, "eval_loss": 1.5}
    log = (tmp_path / "unsloth.log").read_text()
    assert "Will patch your computer" in log and "on stderr too" in log


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("memory", MachineError, "died with exit code 1: .*CUDA out of memory. Tried to allocate"),
        ("diverges", DivergedError, "the loss is not finite at step 2 .* packed row"),
    ],
)
def test_a_worker_that_fails_says_how(
    fault, error, message, unsloth_job, stand_in, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("STAND_IN", fault)
    job = unsloth_job(tmp_path, python=stand_in)
    with pytest.raises(error, match=message) as caught:
        job.run()
    if error is MachineError:
        assert "unsloth.log" in (caught.value.hint or "")
    assert not (job.folder / "checkpoints" / WEIGHTS).exists()


def test_a_signal_is_passed_on_and_the_state_kept(
    unsloth_job, stand_in, in_worker, watcher, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("STAND_IN", "slow")
    seen = watcher(signal_at=(2, signal.SIGINT))
    job = unsloth_job(tmp_path, seen, python=stand_in, epochs=10)
    with job.stop.installed(), pytest.raises(Stopped, match="state is saved") as caught:
        job.run()
    assert caught.value.exit_code == 130
    done = seen.records[-1]["step"]
    assert 2 <= done < 20
    rest = in_worker(unsloth_job(tmp_path, epochs=10))
    assert rest[0] == {"event": "start", "step": done, "seconds": pytest.approx(job._seconds)}
    assert (rest[-1]["step"]) == 20


def test_a_signal_while_it_loads_does_not_wait(
    unsloth_job, stand_in, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("STAND_IN", "loads for ever")
    job, began = unsloth_job(tmp_path, python=stand_in), time.monotonic()
    log = tmp_path / "unsloth.log"

    def once_it_loads() -> None:
        while not (log.exists() and "Will patch" in log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=once_it_loads, daemon=True).start()
    with job.stop.installed(), pytest.raises(Stopped) as caught:
        job.run()
    assert caught.value.exit_code == 143
    assert time.monotonic() - began < 60


def test_an_orphan_ends_and_saves_nothing_more(
    unsloth_job, stand_in, monkeypatch, tmp_path
) -> None:
    """Its pipe is gone when who started it was killed: it must not write beside its heir."""
    monkeypatch.setenv("STAND_IN", "orphaned")
    job = unsloth_job(tmp_path, python=stand_in, epochs=50, checkpoint_every=1)
    job._write_input()
    scratch = job.folder / "checkpoints"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [stand_in, unsloth_worker.__file__, scratch], stdout=subprocess.PIPE, stderr=log
        )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=30) != 0
    assert "BrokenPipe" in (tmp_path / "log").read_text()


# ---------------------------------------------------------------- what is refused


def test_without_an_environment_it_is_said_how_to_make_one(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv(PYTHON, raising=False)
    monkeypatch.setenv("ZEPHYR_LITE_HOME", str(tmp_path))
    with pytest.raises(MachineError, match="does not exist") as caught:
        find_environment()
    hint = caught.value.hint or ""
    assert f"python3 -m venv {tmp_path}/unsloth && {tmp_path}/unsloth/bin/python -m pip" in hint
    assert "unsloth==2026.10.7" in hint and PYTHON in hint
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (f'#!/bin/sh\nexec {sys.executable} "$@"\n', "has no Unsloth"),
        ("#!/bin/sh\necho broken >&2\nexit 1\n", "does not run: broken"),
        ("#!/bin/sh\necho hello\n", "does not run"),
        ("not a program", "does not run"),
    ],
)
def test_a_python_without_unsloth_is_refused(script, message, monkeypatch, tmp_path) -> None:
    python = tmp_path / "python"
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setenv(PYTHON, str(python))
    with pytest.raises(MachineError, match=message) as caught:
        find_environment()
    assert f"{python} -m pip install unsloth==" in (caught.value.hint or "")


def test_an_environment_is_found_without_importing_unsloth(stand_in, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv(PYTHON, str(stand_in))
    found = find_environment()
    assert found.python == stand_in
    assert found.versions["unsloth"] == "0" and "torch" in found.versions
    (tmp_path / "unsloth" / "bin").mkdir(parents=True)
    (tmp_path / "unsloth" / "bin" / "python").symlink_to(stand_in)
    monkeypatch.delenv(PYTHON)
    monkeypatch.setenv("ZEPHYR_LITE_HOME", str(tmp_path))
    assert find_environment().python == tmp_path / "unsloth" / "bin" / "python"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t, k: t.pop(k), "lacks"),
        (lambda t, k: t.update(odd=torch.zeros(1)), "not asked for, odd"),
        (lambda t, k: t.update({k: t[k][:-1].contiguous()}), "expected float32"),
        (lambda t, k: t.update({k: t[k].bfloat16()}), "is torch.bfloat16"),
        (lambda t, k: t[k].view(-1)[3:4].fill_(np.nan), "not finite"),
    ],
    ids=["missing", "more", "shape", "type", "nan"],
)
def test_an_adapter_is_looked_at_before_it_is_taken(spoil, message, peft_model, tmp_path) -> None:
    model = peft_model()
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    tensors = {n: torch.randn_like(p) for n, p in unsloth_worker.trainable(model).items()}
    good = {name: tensor.clone() for name, tensor in tensors.items()}
    before = {n: p.detach().clone() for n, p in parameters.items()}
    spoil(tensors, list(tensors)[5])
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(VerificationError, match=message):
        take_over(tmp_path / WEIGHTS, parameters)
    assert all(torch.equal(before[n], p) for n, p in parameters.items())
    save_file(good, tmp_path / WEIGHTS)
    take_over(tmp_path / WEIGHTS, parameters)
    assert all(torch.equal(good[n.replace(".default.", ".")], p) for n, p in parameters.items())


def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(VerificationError, match="cannot be read"):
        take_over(tmp_path / WEIGHTS, {})
