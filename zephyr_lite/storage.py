"""Writing so that a kill at any instant leaves either the old state or the new one, never a mix.

A *sealed folder* is written beside its final place, every file is fsynced, `MANIFEST.json` with the
size and SHA-256 of each file is written last, and one rename makes it exist. A folder without a
valid manifest does not exist. Rename without fsync is not safe against power loss (Pillai et al.,
OSDI'14), hence both.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import platformdirs
from safetensors import SafetensorError

from zephyr_lite.errors import StorageError

SEAL = "MANIFEST.json"
FREE_SPACE = "free some space on the disk and run the same command again"


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
    """Replace a JSON file atomically. Raises: StorageError; the old file is then untouched."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file atomically. Raises: StorageError; the old file is then untouched."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
        fsync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


@contextmanager
def sealed_folder(final: Path, meta: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `final` when the block ends without an error."""
    part: Path | None = None
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        yield part
        seal(part, meta or {})
        old = part.with_suffix(".old")
        if os.path.lexists(final):  # rename cannot replace a folder that is not empty
            os.rename(final, old)
        os.rename(part, final)
        fsync_folder(final.parent)
        _remove(old)
    except StorageError:
        raise
    except OSError as error:
        raise cannot_write(final, error) from error
    except SafetensorError as error:  # its own class for what is an OSError elsewhere
        raise StorageError(f"{final}: cannot be written: {error}", hint=FREE_SPACE) from error
    finally:
        if part is not None:
            _remove(part)


def seal(folder: Path, meta: dict[str, Any]) -> None:
    """Fsync every file and folder below `folder` and write its manifest last.

    Raises: StorageError for a link: its contents are not ours to vouch for.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise StorageError(f"{path}: a link cannot be part of a sealed folder")
        if path.is_dir():
            fsync_folder(path)
        elif path != folder / SEAL:
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
            name = path.relative_to(folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": file_digest(path)}
    write_json(folder / SEAL, {"meta": meta, "files": files})


def open_sealed(folder: Path) -> dict[str, Any]:
    """Verify a sealed folder and return its meta.

    Raises: StorageError naming the file that is missing or damaged.
    """
    manifest = _read_seal(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size != expected["size"]:
                raise StorageError(f"{path}: not a file of the size that its manifest says")
            if file_digest(path) != expected["sha256"]:
                raise StorageError(f"{path}: damaged: its SHA-256 is not the manifest's")
        except FileNotFoundError:
            raise StorageError(f"{path}: missing, though its manifest names it") from None
        except (KeyError, TypeError):
            raise StorageError(f"{folder / SEAL}: damaged at {name!r:.80}") from None
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
    return digest(_read_seal(folder)["files"])


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
        if os.path.lexists(final):
            _remove(old)
        else:
            os.rename(old, final)
    for part in parent.glob(f".{name}.*.part"):
        _remove(part)


def cannot_write(path: Path, error: OSError) -> StorageError:
    """What to raise of a failed write; a full disk comes with its hint."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    message = f"{path}: cannot be written: {error.strerror or error}"
    return StorageError(message, hint=FREE_SPACE if full else None)


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder survive a loss of power. Raises: OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_seal(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder. Raises: StorageError when there is none or it is damaged."""
    if not (folder / SEAL).is_file():
        raise StorageError(f"{folder}: has no {SEAL}; it was never completed")
    manifest = read_json(folder / SEAL)
    parts = (manifest.get("files"), manifest.get("meta")) if isinstance(manifest, dict) else ()
    if not parts or not all(isinstance(part, dict) for part in parts):
        raise StorageError(f"{folder / SEAL}: damaged: it is not a manifest of ours")
    return manifest


def _remove(path: Path) -> None:
    """Delete a file, a link (never what it points to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
