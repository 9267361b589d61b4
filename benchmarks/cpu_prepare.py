"""Writes the folder that both sides of cpu_vs_trl.py work on; see cpu_work.py.

Token ids are made once, by this project's tokenizer and truncation rule, so that both sides train
on the same numbers. What is timed begins behind tokenisation and packing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_work import ADAPTER_TARGETS, write_work
from safetensors.torch import load_file, save_file
from transformers import MistralConfig, MistralForCausalLM

from zephyr_lite.data.chat import load_tokenizer
from zephyr_lite.data.feedback import load_pairs
from zephyr_lite.data.layout import Order, join_documents, pack_masked
from zephyr_lite.model.adapters import add_adapter, save_adapter
from zephyr_lite.recipe import Lora, Source

MAX_STEPS = 100
# B of a fresh adapter is 0; this makes one that moves an answer's log-prob by a few nats.
B_SCALE = 0.1


@dataclass(frozen=True)
class Setup:
    """Sizes of model, adapter and data.

    pairs: rows of the preference file. row_length: tokens of a packed row.
    dpo_batch, sft_batch: pairs and packed rows of one optimizer step.
    """

    vocab_size: int = 32_000
    hidden: int = 256
    ffn: int = 896
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    r: int = 16
    alpha: int = 16
    pairs: int = 24
    max_length: int = 1024
    max_prompt_length: int = 512
    row_length: int = 1024
    dpo_batch: int = 8
    sft_batch: int = 4
    seed: int = 42


TOY = Setup(
    vocab_size=256, hidden=32, ffn=64, layers=2, heads=4, r=4, alpha=4, pairs=4,
    max_length=64, max_prompt_length=32, row_length=64, dpo_batch=2, sft_batch=2,
)  # fmt: skip

Texts = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def prepare(setup: Setup, folder: Path, tokenizer: Path | None, pairs: Path | None) -> int:
    """Write the folder; returns the model's parameters. Without files the ids are random."""
    if tokenizer is None or pairs is None:
        triples, documents = _random_ids(setup)
    else:
        triples, documents = _encode(setup, tokenizer, pairs)
    joined = join_documents([(ids, np.zeros(len(ids), bool)) for ids in documents])
    rows = pack_masked(joined, setup.row_length)
    rows = rows[: len(rows) - len(rows) % setup.sft_batch]  # whole optimizer steps only
    plan = {
        "dpo": _steps(len(triples), setup.dpo_batch, setup.seed),
        "sft": _steps(len(rows), setup.sft_batch, setup.seed),
    }
    write_work(folder, triples, joined.ids, rows, plan, vars(setup))
    return _write_model(setup, folder)


def _steps(n_examples: int, batch: int, seed: int) -> list[list[int]]:
    """The project's own order of data; the other side is given it as a list."""
    if n_examples == 0 or n_examples % batch:
        raise ValueError(f"{n_examples} examples do not make whole steps of {batch}")
    order = Order(n_examples, batch, MAX_STEPS, seed)
    return [order.step(i) for i in range(MAX_STEPS)]


def _encode(setup: Setup, folder: Path, file: Path) -> tuple[Texts, list[np.ndarray]]:
    """The first usable rows of the file as pairs, and their chosen dialogues as documents."""
    tokenizer = load_tokenizer(folder)
    source = Source(path=str(file))  # pyright: ignore[reportCallIssue]
    special = tokenizer.special_tokens
    rows, _ = load_pairs(
        [source], setup.pairs, ties="keep", on_fault="drop", special_tokens=special
    )
    if len(rows) != setup.pairs:
        raise ValueError(f"{file}: {len(rows)} usable rows, {setup.pairs} are needed")
    encoded = tokenizer.encode_pairs(
        [(row.prompt, row.chosen, row.rejected) for row in rows],
        max_length=setup.max_length,
        max_prompt_length=setup.max_prompt_length,
    )
    dialogues = [[*row.prompt, {"role": "assistant", "content": row.chosen}] for row in rows]
    documents = [dialogue.ids for dialogue in tokenizer.encode_dialogues(dialogues)]
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in encoded], documents


def _random_ids(setup: Setup) -> tuple[Texts, list[np.ndarray]]:
    """Ids of random lengths within the limits."""
    rng = np.random.default_rng(setup.seed)

    def ids(longest: int) -> np.ndarray:
        length = int(rng.integers(longest // 4, longest))
        return rng.integers(3, setup.vocab_size, length).astype(np.int32)

    room = setup.max_length - setup.max_prompt_length
    limits = (setup.max_prompt_length, room, room)
    triples: Texts = [tuple(map(ids, limits)) for _ in range(setup.pairs)]  # pyright: ignore[reportAssignmentType]
    return triples, [np.concatenate(triple[:2]) for triple in triples]


def _write_model(setup: Setup, folder: Path) -> int:
    """Base and adapter with random weights by seed, both fp32."""
    torch.manual_seed(setup.seed)
    config = MistralConfig(
        vocab_size=setup.vocab_size,
        hidden_size=setup.hidden,
        intermediate_size=setup.ffn,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.kv_heads,
        head_dim=setup.hidden // setup.heads,
        max_position_embeddings=4096,
        sliding_window=None,
        initializer_range=setup.hidden**-0.5,  # by width, so that layers do something
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: Any = MistralForCausalLM(config).float()
    model.save_pretrained(folder / "base")
    parameters = sum(p.numel() for p in model.parameters())
    lora = Lora(r=setup.r, alpha=setup.alpha, targets=ADAPTER_TARGETS)
    adapted = add_adapter(model, "policy", lora, setup.seed)
    (folder / "adapter").mkdir()
    save_adapter(adapted, ["policy"], folder / "adapter", "base")
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.normal_(std=B_SCALE)
    save_file(tensors, path, metadata={"format": "pt"})
    return parameters
