"""Writes the folder that all sides of a race work on; see work.py.

Token ids are random by seed, cut to the lengths of real rows (lengths/); truncation, packing and
order of the data are the project's own, made once, so that what is timed begins behind them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig

from lengths.real import dialogue_lengths, pair_lengths
from races import model
from races.model import GEOMETRIES, Geometry, count_weights, write_adapter, write_checkpoint
from races.work import SEED, write_work
from zephyr_lite.data.layout import Order, join_documents, pack_masked
from zephyr_lite.storage import cache_folder

FIRST_ID = 3  # after the special tokens


@dataclass(frozen=True)
class Setup:
    """Sizes of adapter and data of one race, as the recipes have them; but for beta, whose 0.01
    would leave the first loss near ln 2 whatever the adapter did.

    examples: pairs that exist; None: as many as the steps need. batch: pairs or packed rows of one
    optimizer step. row_length: tokens of a packed row. shrink: real lengths are divided by this.
    """

    rank: int
    batch: int
    examples: int | None = None
    row_length: int = 2048
    shrink: int = 1
    beta: float = 0.1

    @property
    def alpha(self) -> int:
        """LoRA's scale is 1."""
        return self.rank


SETUPS = {
    ("mistral-7b", "dpo"): Setup(rank=128, batch=16),
    ("mistral-7b", "sft"): Setup(rank=16, batch=8),
    ("21m", "dpo"): Setup(rank=16, batch=8, examples=24),
    ("21m", "sft"): Setup(rank=16, batch=4, row_length=1024),
    ("toy", "dpo"): Setup(rank=4, batch=2, examples=4, shrink=16),
    ("toy", "sft"): Setup(rank=4, batch=2, row_length=128, shrink=16),
}


def prepare(task: str, name: str, folder: Path, steps: int, base: Path) -> dict[str, Any]:
    """Write adapter, ids and plan for a race of so many optimizer steps; what rows say of it.

    Args: name: of a geometry, whose sizes of adapter and data another model gets too. base: the
        checkpoint that is raced.
    """
    setup, config = SETUPS[name, task], AutoConfig.from_pretrained(base)
    if config.model_type != "mistral":
        raise ValueError(f"{base}: a race runs on a Mistral, this is a {config.model_type}")
    geometry = Geometry(
        config.num_hidden_layers, config.hidden_size, config.intermediate_size,
        config.num_attention_heads, config.num_key_value_heads, config.vocab_size,
    )  # fmt: skip
    rng = np.random.default_rng(SEED)
    pairs, rows = [], []
    if task == "dpo":
        pairs = _pairs(setup, steps, geometry.vocabulary, rng)
    else:
        rows = _rows(setup, steps, geometry.vocabulary, rng)
    n_examples = len(pairs) or len(rows)
    order = Order(n_examples, setup.batch, 1 + steps * setup.batch / n_examples, SEED)
    plan = [order.step(i) for i in range(steps)]
    sizes = asdict(setup) | {"alpha": setup.alpha, "seed": SEED, "vocabulary": geometry.vocabulary}
    write_work(folder, pairs, rows, plan, sizes)
    write_adapter(geometry, folder / "adapter", rank=setup.rank, alpha=setup.alpha, seed=SEED)
    return {
        "parameters": count_weights(base),
        "quantization": "nf4" if hasattr(config, "quantization_config") else "none",
        "rank": setup.rank,
        "batch": setup.batch,
        "row_length": setup.row_length if task == "sft" else None,
        "examples": n_examples,
    }


def find_base(name: str, folder: Path, device: str) -> Path:
    """The checkpoint of a geometry; written where it is not there yet.

    fp32 in the race's own folder for a CPU; NF4 for a GPU, in the user's cache, where it stays.
    Raises: subprocess.CalledProcessError when it cannot be written.
    """
    if device == "cpu":
        _write(name, folder / "base", "none", device)
        return folder / "base"
    kept = cache_folder() / "races" / f"{name}-nf4-{SEED}"
    if not (kept / "model.safetensors").exists():
        part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
        _write(name, part, "nf4", device)
        shutil.rmtree(kept, ignore_errors=True)
        part.rename(kept)
    return kept


def _write(name: str, folder: Path, quantization: str, device: str) -> None:
    if device == "cpu":
        write_checkpoint(GEOMETRIES[name], folder, quantization=quantization, seed=SEED)
        return
    # Elsewhere: what this process took of the GPU, the sides of the race would lack.
    command = [sys.executable, model.__file__, name, str(folder), quantization, str(SEED)]
    subprocess.run([*command, device], check=True)


def _pairs(
    setup: Setup, steps: int, vocabulary: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Pairs of the first real lengths; a multiple of the batch, so that every step is whole."""
    lengths = pair_lengths()
    wanted = min(setup.examples or steps * setup.batch, len(lengths) // setup.batch * setup.batch)

    def ids(length: int) -> np.ndarray:
        return _ids(rng, max(2, length // setup.shrink), vocabulary)

    return [(ids(p), ids(c), ids(r)) for p, c, r in lengths[:wanted]]


def _rows(
    setup: Setup, steps: int, vocabulary: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """As many packed rows as the steps take, of dialogues drawn from the real lengths."""
    lengths, wanted = dialogue_lengths(), steps * setup.batch
    documents: list[tuple[np.ndarray, np.ndarray]] = []
    tokens, packed = 0, []
    # One dialogue after the other: to draw more and leave rows out would favour the long ones.
    while len(packed) < wanted:
        length = max(2, int(rng.choice(lengths)) // setup.shrink)
        documents.append((_ids(rng, length, vocabulary), np.zeros(length, bool)))
        tokens += length
        if tokens > (wanted - 1) * setup.row_length:
            packed = pack_masked(join_documents(documents), setup.row_length)
    ids = join_documents(documents).ids
    return [[ids[start:stop] for start, stop in row] for row in packed[:wanted]]


def _ids(rng: np.random.Generator, length: int, vocabulary: int) -> np.ndarray:
    return rng.integers(FIRST_ID, vocabulary, length).astype(np.int32)
