"""What a command works in: recipe, run folder, device, signals, progress; and its errors."""

from __future__ import annotations

import logging
import operator
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zephyr_lite.errors import (
    MachineError,
    RecipeError,
    StorageError,
    ZephyrError,
    is_out_of_memory,
)
from zephyr_lite.stopping import Interrupted, Stop

if TYPE_CHECKING:
    from zephyr_lite.recipe import Recipe
    from zephyr_lite.stages.context import Context
    from zephyr_lite.train.loop import Listener


@contextmanager
def opened(
    name: str, run_dir: Path | None, overrides: list[str] | None,
    json: bool, quiet: bool, offline: bool, device: str,
    *, needs: str | None = None, must_exist: bool = False,
    writes: bool = True, trains: bool = True, reuse: bool = False,
) -> Iterator[Context]:  # fmt: skip
    """Recipe, run folder, device, signals and progress of one command.

    Args:
        needs: a section that the recipe must have, or several joined by " or ".
        must_exist: the run folder must be there already.
        writes: False looks only: it takes no lock.
        trains: a large base needs a GPU.
        reuse: stages that a run beside this one finished are taken over.
    """
    from zephyr_lite import recipe_file
    from zephyr_lite.run import Run, default_folder

    check_choice("--device", device, ("auto", "cuda", "cpu"))
    recipe = recipe_file.load(name, tuple(overrides or ()))
    if needs:
        _check_section(recipe, needs)
    folder = run_dir or default_folder(recipe)
    if must_exist and not folder.is_dir():
        raise RecipeError(f"{folder} does not exist", hint=f"zephyr-lite run {name}")
    if offline:
        stay_offline()
    chosen = choose_device(device, needs_gpu=trains and _needs_gpu(recipe))
    import torch

    from zephyr_lite.stages.context import Context

    stop = Stop()
    listener = watching(json, quiet, stop)
    with stop.installed(), Run(recipe, folder, offline, writes, reuse, listener.note) as run:
        try:
            yield Context(run, torch.device(chosen), listener, stop)
        finally:
            listener.end()


def watching(json: bool, quiet: bool, stop: Stop) -> Listener:
    """Who is told how far the work is, and hears there of a signal that was lost."""
    from zephyr_lite.report import progress

    plain = progress.QuietProgress() if quiet else progress.TerminalProgress()
    return progress.AttentiveProgress(progress.JsonProgress() if json else plain, stop.safe_point)


def prepare_libraries() -> None:
    """What must stand before torch and bitsandbytes are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while being imported
    if not Path("/dev/nvidia0").exists():
        # Spinning OpenMP threads make a shared CPU several times slower; a user's choice stands.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def choose_device(asked: str, *, needs_gpu: bool) -> str:
    """`cuda` or `cpu`. Raises: MachineError where a GPU is needed or asked for and is not there."""
    has_gpu = False
    if asked != "cpu":
        import torch

        has_gpu = torch.cuda.is_available()
    if asked == "cuda" and not has_gpu:
        raise MachineError("--device cuda: torch sees no CUDA GPU here")
    if asked == "auto" and not has_gpu and needs_gpu:
        raise MachineError(
            "no CUDA GPU here, and this recipe trains a full-size model",
            hint="zephyr-lite run tiny needs none; --device cpu insists",
        )
    return "cuda" if has_gpu else "cpu"


def _needs_gpu(recipe: Recipe) -> bool:
    """Whether the model is too large for a CPU: on the hub, or a folder of large weights."""
    from zephyr_lite.recipe import is_large

    start = recipe.sft.start if recipe.sft else None
    if start and Path(start).expanduser().is_dir() and is_large(start):
        return True
    return recipe.base.build is None and is_large(recipe.base.model)


def stay_offline() -> None:
    """The libraries read these when they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def check_choice(option: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        names = ", ".join(choice for choice in choices if choice)
        raise RecipeError(f"{option} {value}: must be one of {names}")


def _check_section(recipe: Recipe, needs: str) -> None:
    if all(operator.attrgetter(key)(recipe) is None for key in needs.split(" or ")):
        raise RecipeError(f"recipe {recipe.name} has no section {needs}: there is nothing to do")


def as_ours(error: BaseException, signalled: int | None) -> ZephyrError:
    """What Python or a library raised, in our family: a signal, memory, I/O, else a bug."""
    if isinstance(error, KeyboardInterrupt):  # before our handler stood
        signalled = signal.SIGINT
    if signalled is not None:  # a library may have made another error of what our handler raised
        return Interrupted(signalled).stopped
    text = next(iter(str(error).splitlines()), "")[:200]
    is_memory = isinstance(error, MemoryError) or is_out_of_memory(error)
    if is_memory or "can't allocate memory" in text:
        hint = "lower memory.tokens_per_micro_batch, or set memory.checkpointing=full"
        return MachineError(f"out of memory: {text}", hint=hint)
    if isinstance(error, OSError):
        return StorageError(text)
    package = Path(__file__).parent
    frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(error.__traceback__)]
    ours = [f"{p.relative_to(package)}:{n}" for p, n in frames if p.is_relative_to(package)]
    return ZephyrError(
        f"unexpected {type(error).__name__}: {text} (at {' > '.join(ours[-3:])})",
        hint="this is a bug, please report it; ZEPHYR_LITE_DEBUG=1 shows the whole traceback",
    )
