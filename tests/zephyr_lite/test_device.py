"""The mathematics on the device that runs it: ZEPHYR_LITE_TEST_DEVICE=cuda, else the CPU.

Everything here goes through the code that a run uses, in the dtype that it uses there, and is held
against fp64 on the CPU or against itself laid out another way.
"""

from __future__ import annotations

import pytest
import torch
from zephyr_kernels.attention import attention
from zephyr_kernels.linear_logprob import log_probs
from zephyr_kernels.reference import linear_log_probs

from zephyr_lite.data.layout import document_layout, pair_layout
from zephyr_lite.model.adapters import add_adapter
from zephyr_lite.model.attention import to_device
from zephyr_lite.model.base import BaseFiles, load_base
from zephyr_lite.model.policy import make_policy, sum_by_sequence
from zephyr_lite.recipe import Base, Lora, Memory
from zephyr_lite.train.optimizer import make_optimizer

SIZES = [(7, 5, 9), (1, 12, 3), (33, 2, 1), (4, 40, 17)]


@pytest.fixture
def dtypes(device):
    """What computes there: bf16 on a GPU beside fp32; fp32 alone on a CPU."""
    return (torch.float32, torch.bfloat16) if device.type == "cuda" else (torch.float32,)


@pytest.fixture
def make(device, tiny_mistral, tiny_nf4, shake):
    """`make(dtype)` -> a policy of the NF4 tiny model on the device; its adapter does something."""

    def build(dtype, *, checkpointing="none", quantised=True):
        base = Base.model_validate(
            {"model": str(tiny_mistral), "dtype": str(dtype).removeprefix("torch.")}
        )
        files = tiny_nf4 if quantised else BaseFiles(tiny_mistral, {})
        model = add_adapter(load_base(files, base, device), "tested", Lora(r=4, alpha=8), seed=1)
        shake(model, "tested", 2)
        policy = make_policy(model, dtype, device, Memory(checkpointing=checkpointing))
        policy.use(["tested"], "tested")
        return policy

    return build


def _dense(q, k, v, layout):
    """fp64 attention by a mask over the whole row, from the layout's definition."""
    n = layout.n_tokens
    seen = torch.zeros(n, n, dtype=torch.bool)
    columns = (layout.q_start_S, layout.q_len_S, layout.c_start_S, layout.c_len_S)
    for start, length, c_start, c_length in zip(*columns, strict=True):
        for i in range(length):
            seen[start + i, c_start : c_start + c_length] = True
            seen[start + i, start : start + i + 1] = True
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v)


def test_attention_and_its_gradient_against_fp64(device, dtypes, random_pairs):
    layout = pair_layout(random_pairs(SIZES))
    generator = torch.Generator().manual_seed(0)
    shapes = [(layout.n_tokens, heads, 64) for heads in (4, 2, 2, 4)]
    q, k, v, up = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    truth = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = _dense(*truth, layout)
    expected.backward(up)
    for dtype in dtypes:
        mine = [x.to(device, dtype).requires_grad_() for x in (q, k, v)]
        out = attention(*mine, to_device(layout, device).plan, 64**-0.5)
        out.backward(up.to(device, dtype))
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for got, want in zip([out, *(x.grad for x in mine)], [expected, *(x.grad for x in truth)]):  # noqa: B905
            assert got is not None and want is not None
            error = (got.double().cpu() - want).norm() / want.norm()
            assert error < bound, (dtype, float(error))


def test_head_and_its_gradient_against_fp64(device, dtypes):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(512, 64, generator=generator, dtype=torch.float64) * 0.3
    target = torch.randint(0, 512, (37,), generator=generator)
    up = torch.randn(37, generator=generator, dtype=torch.float64)
    for dtype in dtypes:
        rounded, head = hidden.to(dtype), weight.to(dtype)
        true_input = rounded.double().requires_grad_()
        truth = linear_log_probs(true_input, head.double(), target)
        truth.backward(up)
        mine = rounded.to(device).requires_grad_()
        got = log_probs(mine, head.to(device), target.to(device), chunk_rows=16)
        got.backward(up.to(device, got.dtype))
        assert got.dtype == torch.float32
        assert (got.double().cpu() - truth).abs().max() < 1e-4
        assert mine.grad is not None and true_input.grad is not None
        error = (mine.grad.double().cpu() - true_input.grad).norm() / true_input.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), (dtype, float(error))


def test_packed_is_alone_and_shared_is_two_sequences(make, dtypes, random_documents, random_pairs):
    documents, pairs = random_documents([5, 31, 1, 18]), random_pairs(SIZES)
    for dtype in dtypes:
        policy = make(dtype)
        bound = 1e-4 if dtype == torch.float32 else 0.5  # nats of a sum in bf16
        packed = policy.sequence_log_probs(document_layout(documents))
        alone = [policy.sequence_log_probs(document_layout([d])) for d in documents]
        assert (packed - torch.cat(alone)).abs().max() < bound
        shared = policy.sequence_log_probs(pair_layout(pairs))
        apart = policy.sequence_log_probs(pair_layout(pairs, share_prompt=False))
        assert (shared - apart).abs().max() < bound


def test_the_same_micro_batch_gives_the_same_bits(make, dtypes, random_pairs):
    """What the audit before DPO's first step rests on."""
    layout = pair_layout(random_pairs(SIZES))
    for dtype in dtypes:
        policy = make(dtype)
        first, second = policy.sequence_log_probs(layout), policy.sequence_log_probs(layout)
        assert torch.equal(first, second)
        logp = policy.log_probs(layout)
        assert torch.equal(sum_by_sequence(logp, layout), sum_by_sequence(logp, layout))


def test_checkpointing_changes_no_gradient(make, dtypes, random_pairs):
    layout = pair_layout(random_pairs(SIZES))
    for dtype in dtypes:
        gradients = []
        for checkpointing in ("none", "full"):
            policy = make(dtype, checkpointing=checkpointing)
            policy.sequence_log_probs(layout, training=True).sum().backward()
            gradients.append({n: p.grad for n, p in policy.trainable().items()})
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        for name, plain in gradients[0].items():
            again = gradients[1][name]
            assert plain is not None and again is not None
            assert (plain - again).norm() <= bound * plain.norm() + 1e-12, name


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit"])
def test_every_optimizer_lowers_the_loss_there(make, dtypes, random_documents, kind):
    """Paged optimizers are left out: managed memory can hang a shared GPU."""
    from zephyr_lite.recipe import Training

    layout = document_layout(random_documents([40, 25]))
    for dtype in dtypes:
        policy = make(dtype)
        parameters = policy.trainable()
        settings = Training.model_validate({"optimizer": kind, "learning_rate": 1e-2})
        optimizer = make_optimizer(settings, parameters)
        losses = []
        for _ in range(6):
            loss = -policy.log_probs(layout, training=True).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(torch.isfinite(p).all() for p in parameters.values())
