"""Writing so that a kill at any instant leaves either the old state or the new one, never a mix.

A *sealed folder* is written beside its final place, every file is fsynced, `MANIFEST.json` with the
size and SHA-256 of each file is written last, and one rename makes it exist. A folder without a
valid manifest does not exist. Rename without fsync is not safe against power loss (Pillai et al.,
OSDI'14), hence both.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs

from zephyr_lite.errors import StorageError

SEAL = "MANIFEST.json"


def cache_folder() -> Path:
    """Where quantised bases, built models and reference log-probs are shared between runs."""
    home = os.environ.get("ZEPHYR_LITE_HOME")
    return Path(home) if home else Path(platformdirs.user_cache_dir("zephyr-lite"))


def canonical(value: Any) -> str:
    """JSON with one spelling per value: what hashes are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`, hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file of ours. Raises: StorageError when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path}: cannot be read: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as handle:
        json.dump(value, handle, indent=1, sort_keys=False, ensure_ascii=False)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)
    _fsync_folder(path.parent)


@contextmanager
def sealed_folder(final: Path, meta: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` when the block ends without an error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    try:
        yield part
        seal(part, meta or {})
        old = part.with_suffix(".old")
        if final.exists():  # rename cannot replace a folder that is not empty
            os.rename(final, old)
        os.rename(part, final)
        _fsync_folder(final.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"{final}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Fsync every file of a folder and write its manifest last."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / SEAL, {"meta": meta, "files": files})


def open_sealed(folder: Path) -> dict[str, Any]:
    """Verify a sealed folder and return its meta.

    Raises: StorageError naming the file that is missing or damaged.
    """
    if not (folder / SEAL).is_file():
        raise StorageError(f"{folder}: has no {SEAL}; it was never completed")
    manifest = read_json(folder / SEAL)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != expected["size"]:
            raise StorageError(f"{path}: missing or of another size than its manifest says")
        if file_digest(path) != expected["sha256"]:
            raise StorageError(f"{path}: damaged: its SHA-256 is not the manifest's")
    return manifest["meta"]


def is_sealed(folder: Path) -> bool:
    """Whether a folder is complete and undamaged."""
    try:
        open_sealed(folder)
    except StorageError:
        return False
    return True


def seal_digest(folder: Path) -> str:
    """One hash for the contents of a sealed folder: names and SHA-256 of its files."""
    return digest(read_json(folder / SEAL)["files"])


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, waiting for it; the kernel frees it when we die."""
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sweep(parent: Path, name: str = "*") -> None:
    """Remove what a killed writer of `name` left behind; call where no other writer is at work.

    A folder that was renamed aside while its successor was not yet in place is put back.
    """
    for old in parent.glob(f".{name}.*.old"):
        final = parent / old.name[1:].rsplit(".", 2)[0]
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, final)
    for part in parent.glob(f".{name}.*.part"):
        shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
