"""`zephyr-lite bench`: the benchmark scripts, run from where the user stands.

The scripts stay scripts: they lie in `benchmarks/` of a checkout, or in the share folder that a
wheel fills, and each runs in a process of its own with the terminal's stdout and stderr. Rows are
appended to `bench.jsonl` in the current folder, unless `--out` names another file; `page` and
`submit` read that file.
"""

from __future__ import annotations

import difflib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from zephyr_lite import __version__
from zephyr_lite.errors import MachineError, RecipeError, Stopped
from zephyr_lite.stopping import Interrupted

ROWS, PAGE = "bench.jsonl", "bench.md"
GRACE_SECONDS = 10.0  # a script that was told to stop ends its own processes first


@dataclass(frozen=True)
class Script:
    """What runs for a subject: the file, the words before the user's, its default `--out`."""

    file: str
    words: tuple[str, ...] = ()
    out: str | None = ROWS
    needs_gpu: bool = False  # without one its sizes say nothing about speed


SUBJECTS = {
    "sft": Script("race.py", ("sft",)),
    "dpo": Script("race.py", ("dpo",)),
    "kernels": Script(
        "gpu_suite.py", ("--only", "kernels_correct", "kernels_speed"), needs_gpu=True
    ),
    "export": Script("export_cost.py"),
    "page": Script("page.py", out=PAGE),
    "submit": Script("submit.py", out=None),
}


def folders() -> list[Path]:
    """Where the scripts lie: in this checkout, else in the installed share folder.

    Beside an installed package a folder called `benchmarks` would be somebody else's.
    """
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return [checkout / "benchmarks"]
    return [f for f in (Path(sys.prefix) / "share/zephyr-lite/benchmarks",) if f.is_dir()]


def run(
    subject: str,
    options: Sequence[str] = (),
    *,
    out: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> int:
    """Run a subject's script to its end. Returns its exit code, 128 + n where signal n ended it.

    Args:
        subject: a key of SUBJECTS.
        options: the script's own, as they are; it refuses those that it does not know (exit 2).
        out: file for what it writes [bench.jsonl, for a page bench.md, in the current folder].
        note: who is told what a user should know; standard error when None.
    Raises: RecipeError for an unknown subject, MachineError where the scripts are not installed,
        Stopped after a signal, when the script has ended.
    """
    command = command_of(subject, options, out)
    say = note or _say
    if SUBJECTS[subject].needs_gpu and not _has_gpu():
        say("no CUDA GPU here: toy sizes on the CPU, which show that it works and nothing more")
    try:
        return _call(command, _environment(Path(command[1]).parent))
    except (Interrupted, KeyboardInterrupt) as stop:
        number = stop.args[0] if isinstance(stop, Interrupted) else signal.SIGINT
        hint = "rows that were written are kept" if SUBJECTS[subject].out == ROWS else None
        raise Stopped("stopped", exit_code=128 + number, hint=hint) from None


def command_of(subject: str, options: Sequence[str], out: Path | None = None) -> list[str]:
    """The command line of a subject. Raises: as `run` does."""
    if subject not in SUBJECTS:
        near = difflib.get_close_matches(subject, SUBJECTS, 1)
        hint = f"did you mean {near[0]}?" if near else None
        raise RecipeError(f"bench {subject}: must be one of {', '.join(SUBJECTS)}", hint=hint)
    script = SUBJECTS[subject]
    if out and script.out is None:
        raise RecipeError(f"bench {subject} writes no file: leave --out {out} away")
    words = [*script.words]
    if script.out is not None:
        words += ["--out", str((out or Path(script.out)).absolute())]
    return [sys.executable, str(_find(script.file)), *words, *options]


def _find(file: str) -> Path:
    places = folders()
    for folder in places:
        if (folder / file).is_file():
            return folder / file
    where = f" in {places[0]}" if places else ""
    raise MachineError(
        f"the benchmark scripts are not installed: there is no {file}{where}",
        hint="they come with the wheel, or with a clone of the repository",
    )


def _environment(scripts: Path) -> dict[str, str]:
    """The process's variables: scripts name their modules from the folder that they lie in.

    An installed copy names its release as its commit. git is kept from the folders above it, where
    the user's own project may lie.
    """
    paths = [str(scripts), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if not (scripts.parent / "pyproject.toml").is_file():
        variables.setdefault("ZEPHYR_LITE_COMMIT", f"v{__version__}")
        variables["GIT_CEILING_DIRECTORIES"] = str(scripts.parent.resolve().parent)
    return variables


def _call(command: Sequence[str], variables: dict[str, str]) -> int:
    """Exit code of a child that has our terminal. No child outlives this call."""
    child = subprocess.Popen(command, env=variables)
    is_told = False  # by the terminal, whose Ctrl-C reaches parent and child alike
    try:
        code = child.wait()
    except KeyboardInterrupt:
        is_told = True
        raise
    except Interrupted as stop:
        is_told = stop.args[0] == signal.SIGINT
        raise
    finally:
        _end(child, is_told)
    return 128 - code if code < 0 else code


def _end(child: subprocess.Popen[bytes], is_told: bool) -> None:
    """End a child: politely, so that it ends what it started; a second signal to us, at once."""
    try:
        if is_told:
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
        if child.poll() is None:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_SECONDS)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
