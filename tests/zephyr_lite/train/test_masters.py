"""Masters in host memory: the same training, with other bytes on the device."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from zephyr_lite.data.layout import join_documents, pack_masked
from zephyr_lite.errors import DivergedError, RecipeError, Stopped
from zephyr_lite.model.adapters import add_adapter, save_adapter
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Lora, Memory, Sft
from zephyr_lite.stopping import Stop
from zephyr_lite.train.loop import Job
from zephyr_lite.train.masters import HostMasters, check_place
from zephyr_lite.train.objectives import LanguageModelling

CPU = torch.device("cpu")


def on_host(job: Job) -> Job:
    """The job with its masters in host memory."""
    job.masters = "host"
    return job


def values(tensors: dict[str, torch.nn.Parameter]) -> dict[str, bytes]:
    """Tensors, byte for byte."""
    return {name: p.detach().numpy().tobytes() for name, p in tensors.items()}


def checkpoint(job: Job) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint."""
    folder = sorted((job.folder / "checkpoints").glob("step-*"))[-1]
    files = ("weights.safetensors", "optimizer.safetensors")
    return {f"{file}/{k}": t for file in files for k, t in load_file(folder / file).items()}


@pytest.fixture
def bf16_policy(load_tiny: Callable) -> Callable[..., Policy]:
    """`bf16_policy(engine)`: the tiny model with an adapter, as on a GPU but for the device."""

    def make(engine: str = "native") -> Policy:
        lora = Lora(r=3, alpha=6, targets=("q_proj", "down_proj"))
        model = add_adapter(load_tiny("none", "bfloat16"), "sft", lora, seed=3)
        policy = make_policy(model, torch.bfloat16, CPU, Memory(head_rows=64), engine=engine)
        policy.use(["sft"], "sft")
        return policy

    return make


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_in_fp32_host_is_device_bit_for_bit(kind, sft_job, dpo_job, tmp_path) -> None:
    make = {"sft": sft_job, "dpo": dpo_job}[kind]
    options = {"tokens": 60, "dropout": 0.1, "weight_decay": 0.1, "epochs": 3, "eval_every": 2}
    device = make(tmp_path / "device", **options)
    host = on_host(make(tmp_path / "host", **options))
    ours, truth = host.run(), device.run()
    assert values(host.policy.trainable()) == values(device.policy.trainable())
    assert ours | {"seconds": 0} == truth | {"seconds": 0}
    here, there = checkpoint(host), checkpoint(device)
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_a_training_begun_on_the_device_goes_on_in_host_memory(sft_job, watcher, tmp_path) -> None:
    whole = sft_job(tmp_path / "whole", epochs=4)
    whole.run()
    for place, other in (("device", "host"), ("host", "device")):
        folder = tmp_path / place
        stopped = sft_job(folder, watcher(signal_at=(3, signal.SIGTERM)), epochs=4)
        stopped.masters = place
        with stopped.stop.installed(), pytest.raises(Stopped):
            stopped.run()
        resumed = sft_job(folder, epochs=4)
        resumed.masters = other
        resumed.run()
        assert values(resumed.policy.trainable()) == values(whole.policy.trainable())


def test_the_best_weights_are_masters(dpo_job, tmp_path) -> None:
    def run(place: str) -> tuple[dict[str, Any], dict[str, bytes]]:
        job = dpo_job(tmp_path / place, epochs=3, eval_every=1, learning_rate=0.3)
        job.masters, job.rank = place, lambda figures: (-figures["eval_loss"],)
        figures = job.run()
        return figures | {"seconds": 0}, values(job.policy.trainable())

    figures, kept = run("device")
    assert figures["step"] < figures["steps"]
    assert run("host") == (figures, kept)


def test_a_gradient_that_is_not_finite_stops_before_the_masters(sft_job, tmp_path) -> None:
    job = on_host(sft_job(tmp_path))
    before = values(job.policy.trainable())
    loss = job.objective.loss

    def overflowing(*arguments: Any) -> Any:
        total, sums = loss(*arguments)
        return total * torch.inf, sums

    job.objective.loss = overflowing
    with pytest.raises(DivergedError):
        job.run()
    after = {n: p for n, p in job.policy.model.named_parameters() if p.requires_grad}
    assert values(after) == before


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_in_bf16_the_masters_are_finer_than_the_copies(engine, bf16_policy, tmp_path) -> None:
    policy = bf16_policy(engine)
    parameters = policy.trainable()
    masters = HostMasters(Sft(optimizer="adamw"), parameters, torch.bfloat16)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    assert {p.dtype for p in before.values()} == {torch.bfloat16}
    for parameter in parameters.values():
        parameter.grad.fill_(1.0)
    masters.step(1e-6)  # below half a step of bf16 at most values
    moved = [masters.tensors[n].detach() - b.float() for n, b in before.items()]
    assert all((m != 0).all() for m in moved)
    assert any(torch.equal(parameters[n], b) and b.any() for n, b in before.items())
    for name, parameter in parameters.items():
        assert torch.equal(parameter, masters.tensors[name].to(torch.bfloat16))
        assert not parameter.grad.any()
    masters.release()
    assert {p.dtype for p in policy.trainable().values()} == {torch.float32}
    save_adapter(policy.model, ["sft"], tmp_path, "base")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32}
    for name, master in masters.tensors.items():
        assert torch.equal(stored[name.replace(".sft.", ".")], master)


@pytest.mark.parametrize("engine", ["native", "hf"])
def test_gradients_of_bf16_copies_add_up_in_fp32(
    engine, bf16_policy, random_documents, tolerance
) -> None:
    """Many micro-batches in one buffer are the fp64 sum of each alone; in bf16 they are not."""
    policy = bf16_policy(engine)
    parameters = policy.trainable()
    HostMasters(Sft(optimizer="adamw"), parameters, torch.bfloat16)
    documents = join_documents(random_documents([24] * 12))
    objective = LanguageModelling(documents, pack_masked(documents, 24), "all", 24)
    micros, divisor = objective.step(range(objective.n_examples))
    alone = {name: [] for name in parameters}

    def backward(micro: Any) -> None:
        loss, _ = objective.loss(policy.log_probs(micro.layout, training=True), micro)
        (loss / divisor).backward()

    for micro in micros:
        backward(micro)
        for name, parameter in parameters.items():
            alone[name].append(parameter.grad.double().clone())
            parameter.grad.zero_()
    for micro in micros:
        backward(micro)
    coarse = 0.0
    for name, parameter in parameters.items():
        truth = torch.stack(alone[name]).sum(0)
        if not truth.any():
            continue
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - truth).norm() / truth.norm() < tolerance.gradient
        in_bf16 = torch.zeros_like(truth, dtype=torch.bfloat16)
        for part in alone[name]:
            in_bf16 += part.to(torch.bfloat16)
        coarse = max(coarse, ((in_bf16 - truth).norm() / truth.norm()).item())
    assert coarse > 100 * tolerance.gradient, "the tolerance would not see a sum in bf16"


def test_a_training_in_bf16_keeps_fp32(bf16_policy, random_documents, watcher, tmp_path) -> None:
    """Checkpoints, the best weights and what is left at the end are masters, not copies."""
    documents = join_documents(random_documents([24] * 6))
    policy, losses = bf16_policy(), iter((1.0, 0.5, 2.0, 3.0))
    job = Job(
        label="sft",
        policy=policy,
        objective=LanguageModelling(documents, pack_masked(documents, 24), "all", 24),
        settings=Sft(
            optimizer="adamw", batch_size=2, max_steps=4, epochs=9, eval_every=1, warmup_ratio=0
        ),
        folder=tmp_path,
        seed=1,
        listener=watcher(),
        stop=Stop(),
        evaluate=lambda: {"eval_loss": next(losses)},
        rank=lambda figures: (-figures["eval_loss"],),
        masters="host",
    )
    assert job.run()["step"] == 2
    saved = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    last, best = (load_file(saved / f"{n}.safetensors") for n in ("weights", "best"))
    for tensors in (last, best, policy.trainable()):
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        finer = [not torch.equal(t, t.bfloat16().float()) for n, t in tensors.items()]
        assert all(finer)
    assert values(policy.trainable()) == values(best)
    assert values(last) != values(best)


def test_the_device_holds_what_is_said(bf16_policy: Callable) -> None:
    """2 + 4 bytes a weight, counted from the storages."""
    policy = bf16_policy()
    parameters = policy.trainable()
    HostMasters(Sft(optimizer="adamw"), parameters, torch.bfloat16)
    on_device = {}
    for parameter in parameters.values():
        for tensor in (parameter.data, parameter.grad):
            storage = tensor.untyped_storage()
            on_device[storage.data_ptr()] = storage.nbytes()
    count = sum(p.numel() for p in parameters.values())
    assert len(on_device) == 2
    assert 6 * count <= sum(on_device.values()) <= 6 * (count + 64 * len(parameters))


def test_an_optimizer_for_the_gpu_is_refused(sft_job, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"sft\.optimizer is paged_adamw_32bit") as caught:
        check_place("sft", Sft(optimizer="paged_adamw_32bit"), "host")
    assert caught.value.hint == "set sft.optimizer=adamw"
    check_place("sft", Sft(optimizer="paged_adamw_32bit"), "device")
    with pytest.raises(RecipeError):
        on_host(sft_job(tmp_path, optimizer="adamw_8bit")).run()
