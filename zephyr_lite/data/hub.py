"""Rows of Hugging Face datasets, from the hub or from its cache on this machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from zephyr_lite.errors import DataError, MachineError, StorageError

if TYPE_CHECKING:
    from datasets import Dataset


def read_hub(dataset_id: str, split: str | None, *, offline: bool) -> Iterator[dict[str, Any]]:
    """Rows of one split (`train_sft`, also `train_sft[:1000]`), as dictionaries."""
    for row in _load(dataset_id, split, offline=offline):
        yield dict(row)


def hub_fingerprint(dataset_id: str, split: str | None, *, offline: bool) -> str:
    """SHA-256 (hex) of id, split, row count and the fingerprint `datasets` gives the data."""
    dataset = _load(dataset_id, split, offline=offline)
    parts = f"{dataset_id}\n{split}\n{len(dataset)}\n{dataset._fingerprint}\n"
    return hashlib.sha256(parts.encode()).hexdigest()


def _load(dataset_id: str, split: str | None, *, offline: bool) -> Dataset:
    """`datasets.load_dataset`, its failures as ours. No dataset's own code is ever run."""
    if split is None:
        hint = "write {path: OWNER/NAME, split: train}; a local file needs its suffix or ./"
        raise DataError(f"hub dataset {dataset_id} needs a split", hint=hint)
    if offline:
        _require_offline()
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    try:
        return datasets.load_dataset(dataset_id, split=split)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        hint = "check the spelling; a gated dataset needs `hf auth login`"
        raise DataError(_describe(dataset_id, error), hint=hint) from error
    except (ConnectionError, OSError) as error:
        hint = "run once without --offline" if offline else "check the connection and the name"
        raise StorageError(_describe(dataset_id, error), hint=hint) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(_describe(dataset_id, error), hint="check the split's name") from error


def _describe(dataset_id: str, error: Exception) -> str:
    return f"hub dataset {dataset_id}: {str(error)[:300]}"


def _require_offline() -> None:
    """Make sure that `datasets` cannot connect: it reads its switch once, when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import datasets.config
    import huggingface_hub.constants

    if not (datasets.config.HF_HUB_OFFLINE and huggingface_hub.constants.HF_HUB_OFFLINE):
        hint = "set HF_HUB_OFFLINE=1 before the start"
        raise MachineError("`datasets` was imported with connections allowed", hint=hint)
