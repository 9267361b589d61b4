"""Reference log-probs, computed once per (pair, reference) and shared between runs.

    CACHE/reference/<set key>/key.json                         what the set depends on, readable
    CACHE/reference/<set key>/<sha256 of bytes>.safetensors    one shard: keys, sums, lengths

The *set key* covers everything that changes a log-prob (base, SFT adapter, template, truncation,
dtype, engine) and nothing else: not the learning rate, beta, epochs, seed, batch, folder or DPO
rank. The *pair key* is the SHA-256 of the pair's token ids, so adding rows computes new rows only.
A shard is named by its own hash: a damaged one is seen, set aside and computed again; a kill costs
at most one; two runs may write beside each other.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from zephyr_lite.data.encoded import EncodedPair
from zephyr_lite.storage import digest, write_json


@dataclass(frozen=True)
class ReferenceLogProbs:
    """Summed log-probs of P pairs under the reference, float32 nats, and scored tokens, int32."""

    chosen_P: np.ndarray
    rejected_P: np.ndarray
    chosen_len_P: np.ndarray
    rejected_len_P: np.ndarray


def pair_key(pair: EncodedPair) -> bytes:
    """SHA-256 of a pair's token ids, lengths included, 32 bytes."""
    parts = [np.ascontiguousarray(x, np.int32) for x in (pair.prompt, pair.chosen, pair.rejected)]
    head = struct.pack("<III", *(len(x) for x in parts))
    return hashlib.sha256(head + b"".join(x.tobytes() for x in parts)).digest()


class ReferenceCache:
    """One set of reference log-probs on disk.

    Args:
        root: the folder shared by all sets.
        key: what the set depends on; JSON-serialisable.
    """

    def __init__(self, root: Path, key: dict[str, Any]) -> None:
        self.set_key = digest(key)
        self.folder = root / self.set_key
        self.damaged: list[Path] = []
        self._rows: dict[bytes, tuple[float, float, int, int]] = {}
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", key)
        for shard in sorted(self.folder.glob("*.safetensors")):
            self._load(shard)

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Indices of the keys that are not known yet; of equal keys, the first only."""
        first: dict[bytes, int] = {}
        for index, key in enumerate(keys):
            if key not in self._rows:
                first.setdefault(key, index)
        return list(first.values())

    def get(self, keys: Sequence[bytes]) -> ReferenceLogProbs:
        """Log-probs of known keys, in their order. Raises: KeyError for an unknown one."""
        rows = [self._rows[key] for key in keys]
        columns = list(zip(*rows, strict=True)) if rows else [(), (), (), ()]
        return ReferenceLogProbs(
            np.array(columns[0], np.float32),
            np.array(columns[1], np.float32),
            np.array(columns[2], np.int32),
            np.array(columns[3], np.int32),
        )

    def add(self, keys: Sequence[bytes], values: ReferenceLogProbs) -> None:
        """Write one shard and learn it.

        Raises: ValueError when a value is not finite, or when there is not one of each per key.
        """
        if not (np.isfinite(values.chosen_P).all() and np.isfinite(values.rejected_P).all()):
            raise ValueError("reference log-probs must be finite")
        tensors = {
            "key": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32),
            "chosen": values.chosen_P.astype(np.float32),
            "rejected": values.rejected_P.astype(np.float32),
            "chosen_len": values.chosen_len_P.astype(np.int32),
            "rejected_len": values.rejected_len_P.astype(np.int32),
        }
        # safetensors writes the buffer as it lies: a strided view would be saved wrong.
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        if any(len(tensor) != len(keys) for tensor in tensors.values()):
            raise ValueError(f"{len(keys)} keys need as many values of each kind")
        content = save(tensors)
        final = self.folder / f"{hashlib.sha256(content).hexdigest()}.safetensors"
        part = final.with_suffix(f".{os.getpid()}.part")
        with part.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, final)
        self._learn(tensors)

    def _load(self, shard: Path) -> None:
        content = shard.read_bytes()
        if hashlib.sha256(content).hexdigest() != shard.stem:
            self._set_aside(shard)
            return
        try:
            self._learn(load(content))
        except (SafetensorError, KeyError):
            self._set_aside(shard)

    def _set_aside(self, shard: Path) -> None:
        """Rename a damaged shard; the caller reports `damaged`."""
        os.replace(shard, shard.with_suffix(".damaged"))
        self.damaged.append(shard)

    def _learn(self, tensors: dict[str, np.ndarray]) -> None:
        columns = (
            tensors[n].tolist() for n in ("chosen", "rejected", "chosen_len", "rejected_len")
        )
        for key, *row in zip(tensors["key"], *columns, strict=True):
            self._rows[key.tobytes()] = (row[0], row[1], row[2], row[3])
