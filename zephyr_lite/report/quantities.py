"""Bytes and seconds as people read them."""

from __future__ import annotations


def memory(count: float) -> str:
    """Bytes of memory: 17.4 GiB, 6.2 MiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= 0.1 * size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def disk(count: float) -> str:
    """Bytes of a file, in the units that disks are sold by: 4.4 GB, 12.0 MB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """5 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
