"""Engine `native` against engine `hf` and plain composition, and its products counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from layer_truth import log_probs, relative
from random_bases import ADAPTERS, BASES, CPU, documents, pairs, policy_on, random_model
from torch.nn.functional import logsigmoid
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from zephyr_lite.data.layout import Layout
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.frozen_weights import Gemm
from zephyr_lite.model.group import Group
from zephyr_lite.model.policy import Policy, make_policy
from zephyr_lite.recipe import Memory

# Nats, and relative of one tensor: what two ways of rounding the same sums may differ by in fp32.
LOGP, GRADIENT = 1e-5, 1e-5

REAL = "stories260k"


def base_named(name: str, request: pytest.FixtureRequest) -> PreTrainedConfig | Path:
    """A random config of a family, or the folder of a small model that was trained."""
    if name != REAL:
        return BASES[name]()
    folder: Path = request.getfixturevalue("shared_data") / "models" / "stories260k-mistral"
    return folder


@pytest.fixture(params=[*BASES, REAL])
def base(request: pytest.FixtureRequest) -> PreTrainedConfig | Path:
    """Every one of them."""
    return base_named(request.param, request)


LAYOUTS: dict[str, Callable[..., Layout]] = {
    "sft": lambda **x: documents(12, 1, 40, 9, 2, 130, 33, **x),
    "sft, answers only": lambda **x: documents(12, 3, 40, 9, 2, 130, 33, loss_on="assistant", **x),
    "dpo": lambda **x: pairs((9, 4, 12), (1, 1, 1), (30, 1, 2), (3, 60, 5), (133, 8, 8), **x),
}


def layout_for(base: Any, kind: str) -> Layout:
    """A trained model is given text, on which its attention is not saturated."""
    if not isinstance(base, Path):
        return LAYOUTS[kind]()
    return LAYOUTS[kind](text=story(base))


def story(base: Path) -> np.ndarray:
    """201 ids that the model wrote."""
    golden = base.parent / "stories260k" / "golden.json"
    return np.array(json.loads(golden.read_text())["greedy_token_ids"])


Result = tuple[torch.Tensor, dict[str, torch.Tensor]]


def result(logp_N: torch.Tensor, named: dict[str, torch.nn.Parameter]) -> Result:
    """Log-probs, and every adapter gradient of a random projection of them."""
    weight_N = torch.randn(len(logp_N), generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(logp_N @ weight_N.to(logp_N.dtype), list(named.values()))
    return logp_N.detach(), dict(zip(named, grads, strict=True))


def by_engine(engine: str, base: Any, layout: Layout) -> Result:
    policy = policy_on(engine, base)
    return result(policy.log_probs(layout, training=True), policy.trainable())


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_log_probs_and_gradients_are_those_of_hf(base: Any, kind: str) -> None:
    """Directly; and against plain composition in fp64, where hf itself is no closer.

    A trained model's gradients are differences of larger terms: hf's own error in fp32 there is
    the yardstick, twice of which is allowed.
    """
    layout = layout_for(base, kind)
    ours, theirs = by_engine("native", base, layout), by_engine("hf", base, layout)
    model = random_model(base, ADAPTERS, ("sft", "dpo"), "dpo", torch.float64)
    truth = result(
        log_probs(model, layout), {n: p for n, p in model.named_parameters() if p.requires_grad}
    )
    assert ours[1].keys() == theirs[1].keys() == truth[1].keys() and len(truth[1]) >= 40
    far = [(x[0] - truth[0]).abs().max().item() for x in (ours, theirs)]
    assert far[0] < max(LOGP, 2 * far[1])
    is_random = not isinstance(base, Path)
    assert not is_random or (ours[0] - theirs[0]).abs().max() < LOGP
    for name, gradient in truth[1].items():
        error, own = (relative(x[1][name], gradient) for x in (ours, theirs))
        assert error < max(GRADIENT, 2 * own), f"{name}: {error:.2g}, hf {own:.2g}"
        assert not is_random or relative(ours[1][name], theirs[1][name]) < GRADIENT, name


def test_every_row_is_that_of_hf(base: Any) -> None:
    for layout in (to_device(layout_for(base, kind), CPU) for kind in LAYOUTS):
        with torch.no_grad():
            ours, theirs = (policy_on(e, base).engine.hidden(layout) for e in ("native", "hf"))
        assert relative(ours, theirs) < GRADIENT


# ---------------------------------------------------------------- training

STEPS = 30
# Of a loss of order 1, in nats, between the engines in the same steps. Seen: 2e-6. Rounding that
# AdamW divides by the gradient's size grows with the steps: a start that differs by 1e-7 moves hf's
# own curve by 1e-6.
CURVE = 2e-5


def curve(policy: Policy, objective: Callable[[Policy, Layout], torch.Tensor], batches: Any):
    """The losses of 30 steps of AdamW."""
    parameters = list(policy.trainable().values())
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        loss = objective(policy, batches[step % len(batches)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def sft_loss(policy: Policy, layout: Layout) -> torch.Tensor:
    return -policy.log_probs(layout, training=True).mean()


def dpo_loss(policy: Policy, layout: Layout) -> torch.Tensor:
    policy.use(["sft"])
    reference = policy.sequence_log_probs(layout).view(-1, 2)
    policy.use(["sft", "dpo"], "dpo")
    won = policy.sequence_log_probs(layout, training=True).view(-1, 2) - reference
    return -logsigmoid(0.3 * (won[:, 0] - won[:, 1])).mean()


def fresh(policy: Policy) -> Policy:
    for name, parameter in policy.model.named_parameters():
        if "lora_B.dpo" in name:
            parameter.data.zero_()
    return policy


@pytest.mark.parametrize("name", ["mistral", REAL])
def test_loss_curves_are_indistinguishable(name: str, request: pytest.FixtureRequest) -> None:
    base = base_named(name, request)
    text = story(base) if isinstance(base, Path) else None
    work = {
        sft_loss: [documents(20, 7, 33, 11, seed=i, text=text) for i in range(3)],
        dpo_loss: [pairs((9, 4, 12), (20, 9, 5), seed=i, text=text) for i in range(3)],
    }
    for objective, batches in work.items():
        ours, theirs = (
            curve(fresh(policy_on(engine, base)), objective, batches) for engine in ("native", "hf")
        )
        assert theirs[-3:].mean() < 0.8 * theirs[:3].mean(), "it learns"
        assert np.abs(ours - theirs).max() < CURVE, f"{objective.__name__}"


# ---------------------------------------------------------------- before the first step


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("checkpointing", ["none", "full", "offload"])
def test_policy_and_reference_are_equal_bit_for_bit(threads: int, checkpointing: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    base = BASES["mistral"]()
    try:
        for sizes in ([(1, 1, 1)], [(7, 3, 5), (1, 9, 1)], [(131, 17, 30), (5, 1, 2)]):
            layout, policy = pairs(*sizes), fresh(policy_on("native", base, saved=checkpointing))
            ours = policy.sequence_log_probs(layout, training=True)
            policy.use(["sft"])
            assert torch.equal(policy.sequence_log_probs(layout), ours.detach())
            policy.use([])
            assert not torch.equal(policy.sequence_log_probs(layout), ours.detach())
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- dropout


def test_no_two_masks_of_a_forward_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, seeds = pairs((7, 3, 5)), []
    policy = policy_on("native", BASES["mistral"](), lora_dropout=0.2)
    stack_of = Group.outline

    def spy(group: Group, seed: int | None, gemm: Gemm) -> Any:
        found = stack_of(group, seed, gemm)
        seeds.extend(drop.seed for *_, drop in found.spans)
        return found

    monkeypatch.setattr(Group, "outline", spy)
    for _ in range(3):
        policy.log_probs(layout, training=True)
    assert len(seeds) == len(set(seeds)) == 3 * 4 * 5
    policy.log_probs(layout)
    assert len(seeds) == 3 * 4 * 5, "none without training"


def test_dropout_is_drawn_from_torch_s_generator() -> None:
    layout, found = pairs((7, 3, 5)), []
    policy = policy_on("native", BASES["mistral"](), lora_dropout=0.2)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(policy.log_probs(layout, training=True).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---------------------------------------------------------------- products


class BaseProducts(TorchDispatchMode):
    """Counts what is computed from a frozen matrix: multiply-adds, products, and other readers."""

    def __init__(self, matrices: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.names = {x.untyped_storage()._cdata: name for name, x in matrices.items()}
        self.work: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.other_readers: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [x for x in args if isinstance(x, torch.Tensor)]
        read = [self.names.get(x.untyped_storage()._cdata) for x in operands]
        name = next((n for n in read if n is not None), None)
        is_view = isinstance(out, torch.Tensor) and out.untyped_storage()._cdata in self.names
        if name is None or is_view:
            return out
        operation = func.overloadpacket.__name__
        if operation in ("mm", "addmm", "addmm_"):
            left, right = operands[-2:]
            self.work[name] += left.shape[0] * left.shape[1] * right.shape[1]
            self.calls[name] += 1
        else:
            self.other_readers.add(operation)
        return out


def frozen_matrices(policy: Policy) -> dict[str, torch.Tensor]:
    found = {"head": policy.head_VD}
    for number, layer in enumerate(policy.engine.layers):  # type: ignore[attr-defined]
        for name in ("qkv", "o", "gate_up", "down"):
            found[f"{number}.{name}"] = getattr(layer, name).frozen.weight()
    return found


def counted(
    checkpointing: str, layout: Layout, *, training: bool, keep: int | None = None
) -> tuple[BaseProducts, Policy]:
    model = random_model(BASES["mistral"](), ADAPTERS, ("sft", "dpo"), "dpo")
    settings = {"checkpointing": checkpointing, "head_rows": 4096, "keep_layers": keep}
    memory = Memory.model_validate(settings)
    policy = make_policy(model, torch.float32, CPU, memory, self_test=False)
    policy.use(["sft", "dpo"], "dpo")
    assert policy.engine.name == "native"
    with BaseProducts(frozen_matrices(policy)) as mode:
        logp_N = policy.log_probs(layout, training=training)
        if training:
            logp_N.sum().backward()
    return mode, policy


def one_pass(policy: Policy, layout: Layout) -> dict[str, int]:
    """Multiply-adds of one product with each matrix; the last layer's for the rows it computes."""
    moved, found = to_device(layout, CPU), {}
    tokens, last = layout.n_tokens, len(policy.engine.layers) - 1  # type: ignore[attr-defined]
    needed = tokens if moved.last is None else len(moved.last.rows_U)
    for name, matrix in frozen_matrices(policy).items():
        rows = needed if name.startswith(f"{last}.") else tokens
        found[name] = rows * matrix.numel()
        if name == f"{last}.qkv":  # keys and values are all rows'
            found[name] = (needed * 64 + tokens * 32) * 64
    found["head"] = len(layout.rows_N) * policy.head_VD.numel()
    return found


# How often each matrix is multiplied with in a step.
PASSES = {
    "none": {"qkv": 2, "o": 2, "gate_up": 2, "down": 2, "head": 2},
    "full": {"qkv": 3, "o": 3, "gate_up": 3, "down": 2, "head": 2},
    "offload": {"qkv": 3, "o": 3, "gate_up": 3, "down": 2, "head": 2},
}


@pytest.mark.parametrize("kind", ["documents", "pairs"])
@pytest.mark.parametrize("checkpointing", list(PASSES))
def test_base_products_of_a_step(checkpointing: str, kind: str) -> None:
    """Two passes under `keep`, three minus down under `lean`; nobody wants the first layer's dX."""
    layout = pairs((9, 4, 12), (20, 9, 5)) if kind == "pairs" else documents(40, 9)
    mode, policy = counted(checkpointing, layout, training=True)
    expected = {
        name: work * (PASSES[checkpointing][name.split(".")[-1]] - (name == "0.qkv"))
        for name, work in one_pass(policy, layout).items()
    }
    assert dict(mode.work) == expected
    assert mode.other_readers <= {"index"}, "the head's rows of the targets, and nothing else"


@pytest.mark.parametrize("keep", [1, 3, 4, 9])
@pytest.mark.parametrize("checkpointing", ["full", "offload"])
def test_the_last_layers_may_keep_what_the_others_compute_again(
    checkpointing: str, keep: int
) -> None:
    """Which layers keep is counted; what comes out is the same bit for bit."""
    layout = pairs((9, 4, 12), (20, 9, 5))
    _, whole = counted("none", layout, training=True)
    mode, policy = counted(checkpointing, layout, training=True, keep=keep)
    expected = {}
    for name, work in one_pass(policy, layout).items():
        layer, _, group = name.rpartition(".")
        keeps = not layer or int(layer) >= 4 - keep
        passes = PASSES["none" if keeps else checkpointing][group] - (name == "0.qkv")
        expected[name] = work * passes
    assert dict(mode.work) == expected
    named = whole.trainable()
    for name, parameter in policy.trainable().items():
        assert torch.equal(parameter.grad, named[name].grad), name  # type: ignore[arg-type]
    kept = "keep" if keep >= 4 else f"{4 - keep} {policy.engine.rest}, {keep} keep"  # type: ignore[attr-defined]
    assert policy.engine.report()[0] == f"4 layers of model/layer.py, {kept}"


def test_base_products_of_the_reference_pass() -> None:
    layout = pairs((9, 4, 12), (20, 9, 5))
    mode, policy = counted("none", layout, training=False)
    assert dict(mode.work) == one_pass(policy, layout)
    calls = {name: 2 if name == "3.qkv" else 1 for name in mode.calls}  # q, then k and v
    assert dict(mode.calls) == calls
