"""What leaves in a forward comes back in its backward: the same bits, one layer ahead."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from random_bases import BASES, CPU, documents, policy_on

from zephyr_lite.model import host_store
from zephyr_lite.model.host_store import Held, HostStore

DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()
LAYERS = 5


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device there is: streams are tried where there are some."""
    return request.param


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(to, from) of every copy that is begun."""
    log: list[Any] = []
    copy = host_store._copy

    def spy(to: torch.Tensor, source: torch.Tensor, stream: Any) -> Any:
        log.append((to, source))
        return copy(to, source, stream)

    monkeypatch.setattr(host_store, "_copy", spy)
    return log


def inputs(device: torch.device, seed: int = 0) -> list[torch.Tensor]:
    """A layer's input each; no two alike, the last of another size as a cut row's may be."""
    torch.manual_seed(seed)
    return [torch.randn(3 if n == LAYERS - 1 else 4, 8, device=device) for n in range(LAYERS)]


def forward(xs: list[torch.Tensor], store: HostStore | None = None) -> list[Held]:
    store = store or HostStore()
    return [store.put(x.clone()) for x in xs]


def test_what_comes_back_in_reverse_is_what_left(device: torch.device) -> None:
    xs = inputs(device)
    for held, x in zip(reversed(forward(xs)), reversed(xs), strict=True):
        assert torch.equal(held.get(), x) and held.host.device == CPU


def test_exactly_one_comes_back_ahead(device: torch.device, copies: list[Any]) -> None:
    held = forward(inputs(device))
    assert len(copies) == LAYERS
    for at in reversed(range(LAYERS)):
        held[at].get()
        back = [source.data_ptr() for _, source in copies[LAYERS:]]
        # The last one never had to: it was still there. The first has none before it.
        wanted = [held[n].host.data_ptr() for n in reversed(range(max(at - 1, 0), LAYERS - 1))]
        assert back == wanted, at


def test_a_backward_that_skips_layers_gets_the_right_ones(device, copies: list[Any]) -> None:
    xs = inputs(device)
    held = forward(xs)
    for at in (3, 0, 4, 4, 1):
        assert torch.equal(held[at].get(), xs[at]), at
    assert len(copies) - LAYERS == 2 + 1 + 2 + 2 + 2, "what came ahead in vain is let go"


def test_two_graphs_at_once_do_not_mix(device: torch.device) -> None:
    one, two = inputs(device, 1), inputs(device, 2)
    shared = HostStore()
    for stores in ((None, None), (shared, shared)):
        first, second = forward(one, stores[0]), forward(two, stores[1])
        for at in reversed(range(LAYERS)):
            assert torch.equal(first[at].get(), one[at])
            assert torch.equal(second[at].get(), two[at])


def test_a_second_backward_gets_them_again(device: torch.device) -> None:
    xs = inputs(device)
    held = forward(xs)
    for _ in range(2):
        assert all(torch.equal(held[n].get(), xs[n]) for n in reversed(range(LAYERS)))


def test_a_forward_without_a_backward_leaves_nothing_behind(device: torch.device) -> None:
    held = forward(inputs(device))
    host, store = weakref.ref(held[2].host), weakref.ref(held[0].store)
    gc.disable()  # no circle that only the collector would find
    try:
        del held
        assert host() is None and store() is None
    finally:
        gc.enable()


def test_what_is_done_with_is_freed_one_by_one(device: torch.device) -> None:
    held = forward(inputs(device))
    hosts = [weakref.ref(h.host) for h in held]
    while held:
        held[-1].get()
        held.pop()
        assert [host() is not None for host in hosts] == [True] * len(held) + [False] * (
            LAYERS - len(held)
        )


def test_it_holds_no_graph_that_holds_it(device: torch.device) -> None:
    """The input of a layer has a history, whose nodes hold the store."""
    leaf = torch.ones(4, 8, device=device, requires_grad=True)
    store = HostStore()
    held = store.put(leaf * 2)
    assert held.get().grad_fn is None


def test_copies_of_a_step_and_none_in_evaluation(copies: list[Any]) -> None:
    policy = policy_on("native", BASES["mistral"](), saved="offload")
    layers = len(policy.engine.layers)  # type: ignore[attr-defined]
    logp_N = policy.log_probs(documents(40, 9), training=True)
    assert len(copies) == layers
    logp_N.sum().backward()
    assert len(copies) == layers + layers - 1
    policy.log_probs(documents(40, 9))
    assert len(copies) == 2 * layers - 1


def test_two_steps_graphs_at_once_have_their_own_gradients() -> None:
    found = {}
    for saved in ("none", "offload"):
        policy = policy_on("native", BASES["mistral"](), saved=saved)
        parameters = list(policy.trainable().values())
        first = policy.log_probs(documents(20, 9, seed=1), training=True).sum()
        second = policy.log_probs(documents(11, 30, seed=2), training=True).sum()
        grads = [torch.autograd.grad(y, parameters) for y in (first, second)]
        found[saved] = [g for grad in grads for g in grad]
    assert all(torch.equal(*pair) for pair in zip(found["none"], found["offload"], strict=True))
