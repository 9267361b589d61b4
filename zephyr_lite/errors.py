"""One family of errors: each carries its exit code and, where there is one, the way out.

Raise the narrowest class. The message says what is wrong, where, and the value seen; `hint` says
what to do about it. `cli.main` prints both and exits with `exit_code`; nothing else catches them.

    exit code   0 ok   1 bug   2 recipe or data   3 machine   4 diverged   5 I/O   6 locked
                7 verification failed             130 / 143 stopped by a signal, resumable
"""

from __future__ import annotations

from pathlib import Path


class ZephyrError(Exception):
    """Base class. Args: message (what, where, value seen); hint (what to do about it)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class RecipeError(ZephyrError, ValueError):
    """The recipe, an override or a command-line argument is wrong."""

    exit_code = 2


class DataError(ZephyrError, ValueError):
    """A data file or row is wrong. `file` and `line` (1-based) lead the message when known."""

    exit_code = 2

    def __init__(
        self,
        message: str,
        *,
        file: Path | str | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        place = "" if file is None else f"{file}:{line}: " if line is not None else f"{file}: "
        super().__init__(place + message, hint=hint)
        self.file, self.line = file, line


class MachineError(ZephyrError, RuntimeError):
    """This machine lacks something: a GPU, memory, disk, an optional package."""

    exit_code = 3


class DivergedError(ZephyrError, ArithmeticError):
    """A loss or gradient is not finite; the last good checkpoint was kept."""

    exit_code = 4


class StorageError(ZephyrError, OSError):
    """Reading or writing failed, or what was read is damaged."""

    exit_code = 5


class LockedError(ZephyrError, RuntimeError):
    """Another process works in this run folder."""

    exit_code = 6


class VerificationError(ZephyrError, AssertionError):
    """A check of our own work failed: the step-0 audit, the cache check, an export gate."""

    exit_code = 7


class Stopped(ZephyrError):
    """A signal asked us to stop; everything is saved. 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, message: str, *, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


# How a GPU says it where torch's allocator was not asked: cuBLAS for its workspace, the driver for
# what a kernel needs beside its arguments. In all of them an allocation was refused and nothing was
# begun, so the context lives. Any other CUDA error (an illegal address, a failed assert) is sticky:
# every later call fails by it, and to do a step again would only hide where it began.
REFUSED = (
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "cudaErrorMemoryAllocation",
    "Triton Error [CUDA]: out of memory",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch says by an error that a device's memory is full, and the device works on.

    Beside its own class torch has plain RuntimeErrors (cuBLAS) and AcceleratorErrors (the driver,
    also at a kernel's launch), which bear other news too: they are told by their text, `REFUSED`.
    All by the classes' names, so that nobody imports torch to ask; what is derived from them is
    not looked at, for errors of ours may quote such a text.
    """
    kind = type(error).__name__
    told = kind in ("RuntimeError", "AcceleratorError")
    return kind == "OutOfMemoryError" or (told and any(text in str(error) for text in REFUSED))
