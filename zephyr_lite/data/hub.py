"""Rows of Hugging Face datasets, from the hub or from its cache on this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zephyr_lite.errors import DataError, MachineError, StorageError

if TYPE_CHECKING:
    from datasets import Dataset

SPELLING = "check the spelling; a gated dataset needs `hf auth login`"
NOT_OFFLINE = "run once without --offline"


def read_hub(
    dataset_id: str, split: str | None, revision: str | None = None, *, offline: bool
) -> Iterator[dict[str, Any]]:
    """Rows of one split (`train_sft`, also `train_sft[:1000]`), as dictionaries."""
    for row in _load(dataset_id, split, revision, offline=offline):
        yield dict(row)


def hub_fingerprint(
    dataset_id: str, split: str | None, revision: str | None = None, *, offline: bool
) -> str:
    """SHA-256 (hex) of id, split, revision, row count and the fingerprint `datasets` gives."""
    dataset = _load(dataset_id, split, revision, offline=offline)
    parts = f"{dataset_id}\n{split}\n{revision}\n{len(dataset)}\n{dataset._fingerprint}\n"
    return hashlib.sha256(parts.encode()).hexdigest()


def fetch_file(dataset_id: str, file: str, revision: str | None = None, *, offline: bool) -> Path:
    """Where one file of a dataset's repository lies in the hub's cache, downloaded if need be.

    Raises: DataError where the hub has no such repository, revision or file; StorageError where it
    cannot be reached, or where the file is not in the cache and `offline` forbids to fetch it.
    """
    from huggingface_hub import errors, hf_hub_download

    where = f"{dataset_id}/{file}" + (f" at {revision}" if revision else "")
    try:
        found = hf_hub_download(
            dataset_id, file, repo_type="dataset", revision=revision, local_files_only=offline
        )
    except errors.LocalEntryNotFoundError as error:
        hint = NOT_OFFLINE if offline else "check the connection"
        raise StorageError(f"hub dataset {where}: not in the cache", hint=hint) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.EntryNotFoundError,
        errors.HFValidationError,
    ) as error:
        raise DataError(_describe(where, error), hint=SPELLING) from error
    except OSError as error:
        hint = "check the connection and the disk"
        raise StorageError(_describe(where, error), hint=hint) from error
    return Path(found)


def _load(dataset_id: str, split: str | None, revision: str | None, *, offline: bool) -> Dataset:
    """`datasets.load_dataset`, its failures as ours. No dataset's own code is ever run."""
    if split is None:
        hint = "write {path: OWNER/NAME, split: train}; a local file needs its suffix or ./"
        raise DataError(f"hub dataset {dataset_id} needs a split", hint=hint)
    if offline:
        _require_offline()
    import datasets
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    try:
        commit = _resolve_revision(dataset_id, revision, offline=offline) if revision else None
        dataset = datasets.load_dataset(dataset_id, split=split, revision=commit)
    except (
        DatasetNotFoundError,
        FileNotFoundError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        raise DataError(_describe(dataset_id, error), hint=SPELLING) from error
    except StorageError:
        raise
    except (ConnectionError, OSError) as error:
        hint = NOT_OFFLINE if offline else "check the connection and the name"
        raise StorageError(_describe(dataset_id, error), hint=hint) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(_describe(dataset_id, error), hint="check the split's name") from error
    if commit:
        _check_commit(dataset, dataset_id, commit, offline=offline)
    return dataset


def _resolve_revision(dataset_id: str, revision: str, *, offline: bool) -> str:
    """The commit that a branch or tag means, from the hub or as its cache remembers it."""
    if re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if not offline:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(dataset_id, revision=revision).sha or revision
    import huggingface_hub.constants

    folder = "--".join(("datasets", *dataset_id.split("/")))
    ref = Path(huggingface_hub.constants.HF_HUB_CACHE, folder, "refs", revision)
    if not ref.is_file():
        message = f"hub dataset {dataset_id}: the cache does not know revision {revision}"
        raise StorageError(message, hint=NOT_OFFLINE)
    return ref.read_text(encoding="utf-8").strip()


def _check_commit(dataset: Dataset, dataset_id: str, commit: str, *, offline: bool) -> None:
    """`datasets` takes the newest copy of its cache, whatever its commit, where it cannot connect.

    Its cache keeps each commit's rows in a folder of that name.
    """
    found = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if found == {commit}:
        return
    message = f"hub dataset {dataset_id}: the cache holds {', '.join(sorted(found))}, not {commit}"
    raise StorageError(message, hint=NOT_OFFLINE if offline else "check the connection")


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
