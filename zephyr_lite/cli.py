"""Commands: parse, call one function, print. Everything heavy is imported inside a command."""

from __future__ import annotations

import importlib
import logging
import operator
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zephyr_lite import __version__
from zephyr_lite.errors import MachineError, RecipeError, Stopped, StorageError, ZephyrError
from zephyr_lite.stopping import Interrupted, Stop

if TYPE_CHECKING:
    from zephyr_lite.recipe import Recipe
    from zephyr_lite.stages.context import Context

SMALL_BYTES = 2 << 30  # weights that a CPU can train in hours

app = typer.Typer(
    help="Zephyr on one GPU you own: dSFT, AI feedback, dDPO and GGUF export from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="List, show and copy recipes.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A built-in name or a file.")]
RunDir = Annotated[
    Path | None, typer.Option("--run", metavar="DIR", help="Run folder [runs/NAME].")
]
SetField = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, e.g. dpo.beta=0.05."),
]
Json = Annotated[bool, typer.Option("--json", help="NDJSON events on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only what must be known.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no connection.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Take no stage over from other runs.")]
Device = Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")]


@app.command()
def run(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="20 steps of all stages first, in a scratch folder.")
    ] = False,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
    fresh: Fresh = False,
) -> None:  # fmt: skip
    """Do every stage that is not done yet, from base model to GGUF."""
    began = time.monotonic()
    with _context(
        recipe, run_dir, set_field, json, quiet, offline, device,
        needs="sft or dpo", writes=not rehearse, reuse=not fresh,
    ) as ctx:  # fmt: skip
        from zephyr_lite.stages import aif, dpo, export, sft

        where = ["--run", str(run_dir)] if run_dir else []
        where += [word for text in set_field or () for word in ("--set", text)]
        where += [] if device == "auto" else ["--device", device]
        if rehearse:
            from zephyr_lite.stages import rehearse as rehearsal

            flags = {"--offline": offline, "--fresh": fresh}
            words = ["zephyr-lite", "run", recipe, *where, *(f for f, on in flags.items() if on)]
            rehearsal.run(ctx, shlex.join(words))
            return
        export.check_inputs(ctx)
        dpo.check_inputs(ctx)
        aif.run(ctx)  # first: a faulty row of feedback must not surface after a day of dSFT
        sft.run(ctx)
        dpo.run(ctx)
        export.run(ctx)
        ctx.compare_with_expected()
        minutes = (time.monotonic() - began) / 60
        chat = shlex.join(["zephyr-lite", "chat", recipe, *where])
        ctx.listener.note(f"done in {minutes:.1f} min; talk to it: {chat}")


@app.command()
def sft(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
    fresh: Fresh = False,
) -> None:  # fmt: skip
    """dSFT: fine-tune on the teacher's dialogues."""
    _do(("sft",), "sft", recipe, run_dir, set_field, json, quiet, offline, device, fresh)


@app.command()
def aif(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
    fresh: Fresh = False,
) -> None:  # fmt: skip
    """AI feedback: make preference pairs and report what was dropped."""
    _do(("aif",), "data.feedback", recipe, run_dir, set_field, json, quiet, offline, device, fresh)


@app.command()
def ref(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
    fresh: Fresh = False,
) -> None:  # fmt: skip
    """Reference log-probs, once (dpo runs it when they are missing)."""
    stages = ("aif", "sft", "reference")
    _do(stages, "dpo", recipe, run_dir, set_field, json, quiet, offline, device, fresh)


@app.command()
def dpo(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
    fresh: Fresh = False,
) -> None:  # fmt: skip
    """dDPO: preference optimisation (runs what it needs first)."""
    stages = ("aif", "sft", "dpo")
    _do(stages, "dpo", recipe, run_dir, set_field, json, quiet, offline, device, fresh)


@app.command()
def export(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write GGUF (always done).")] = True,
    quant: Annotated[list[str] | None, typer.Option("--quant", help="f32, f16 or q8_0.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also merged safetensors.")] = False,
    stage: Annotated[str | None, typer.Option("--stage", help="dpo or sft.")] = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Fold the adapter in, write GGUF, compare it in llama.cpp."""
    _check_choice("--stage", stage, (None, "dpo", "sft"))
    overrides = list(set_field or [])
    if quant:
        overrides.append(f"export.quants=[{', '.join(quant)}]")
    if merged:
        overrides.append("export.merged=true")
    with _context(recipe, run_dir, overrides, json, quiet, offline, device, must_exist=True) as ctx:
        from zephyr_lite.stages import export as work

        work.run(ctx, stage)


@app.command()
def chat(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, leave.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="dpo, sft or base.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Talk to the exported file, or to a stage with --stage."""
    _check_choice("--stage", stage, (None, "dpo", "sft", "base"))
    with _context(
        recipe, run_dir, set_field, False, True, offline, device,
        must_exist=True, writes=False, trains=False,
    ) as ctx:  # fmt: skip
        from zephyr_lite.stages import chat as work

        work.run(ctx, stage, prompt, max_tokens, temperature)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is not None:
        return
    from zephyr_lite import recipe_file

    found = {name: recipe_file.load(name) for name in recipe_file.built_in()}
    width = max(map(len, found), default=0)
    for name, recipe in found.items():
        typer.echo(f"{name:{width}}  {recipe.description}")


@recipes_app.command("show")
def show_recipe(name: str, set_field: SetField = None, resolved: bool = False) -> None:
    """Print a recipe as written, or with --resolved every value."""
    from zephyr_lite import recipe_file

    if not (resolved or set_field):
        typer.echo(recipe_file.find(name).read_text(encoding="utf-8"), nl=False)
        return
    import yaml

    loaded = recipe_file.load(name, tuple(set_field or ()))
    typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)


@recipes_app.command("copy")
def copy_recipe(name: str, to: Annotated[Path | None, typer.Argument()] = None) -> None:
    """Write a recipe into the current folder, or where you say, to edit."""
    from zephyr_lite import recipe_file

    source = recipe_file.find(name)
    target = to or Path(source.name)
    if target.is_dir():
        target /= source.name
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        raise RecipeError(f"{target} exists already", hint="give another file name") from None
    except OSError as error:
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from None
    typer.echo(f"{target}; edit it and run: zephyr-lite run {target}")


@recipes_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from zephyr_lite.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
]


@app.callback()
def options(version: Version = False) -> None:
    """What stands before a command."""


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def _do(
    stages: tuple[str, ...], needs: str, recipe: str, run_dir: Path | None,
    set_field: list[str] | None, json: bool, quiet: bool, offline: bool, device: str, fresh: bool,
) -> None:  # fmt: skip
    """Run some stages, each unless it is done, in this order."""
    with _context(
        recipe, run_dir, set_field, json, quiet, offline, device, needs=needs, reuse=not fresh
    ) as ctx:
        modules = [importlib.import_module(f"zephyr_lite.stages.{name}") for name in stages]
        for module in modules:
            if hasattr(module, "check_inputs"):  # what must not surface after a day of dSFT
                module.check_inputs(ctx)
        for module in modules:
            module.run(ctx)


@contextmanager
def _context(
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

    _check_choice("--device", device, ("auto", "cuda", "cpu"))
    recipe = recipe_file.load(name, tuple(overrides or ()))
    if needs:
        _check_section(recipe, needs)
    folder = run_dir or default_folder(recipe)
    if must_exist and not folder.is_dir():
        raise RecipeError(f"{folder} does not exist", hint=f"zephyr-lite run {name}")
    if offline:
        _stay_offline()
    chosen = _choose_device(device, needs_gpu=trains and _needs_gpu(recipe))
    import torch

    from zephyr_lite.report.progress import JsonProgress, QuietProgress, TerminalProgress
    from zephyr_lite.stages.context import Context

    listener = JsonProgress() if json else QuietProgress() if quiet else TerminalProgress()
    stop = Stop()
    with stop.installed(), Run(recipe, folder, offline, writes, reuse, listener.note) as run:
        try:
            yield Context(run, torch.device(chosen), listener, stop)
        finally:
            listener.end()


def _prepare_libraries() -> None:
    """What must stand before torch and bitsandbytes are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns while being imported
    if not Path("/dev/nvidia0").exists():
        # Spinning OpenMP threads make a shared CPU several times slower; a user's choice stands.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _choose_device(asked: str, *, needs_gpu: bool) -> str:
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
    start = recipe.sft.start if recipe.sft else None
    if start and Path(start).expanduser().is_dir() and _is_large(start):
        return True
    return recipe.base.build is None and _is_large(recipe.base.model)


def _is_large(model: str) -> bool:
    folder = Path(model).expanduser()
    if folder.is_dir():
        return sum(f.stat().st_size for f in folder.glob("*.safetensors")) > SMALL_BYTES
    return not model.startswith((".", "/", "~"))


def _stay_offline() -> None:
    """The libraries read these when they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def _check_choice(option: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        names = ", ".join(choice for choice in choices if choice)
        raise RecipeError(f"{option} {value}: must be one of {names}")


def _check_section(recipe: Recipe, needs: str) -> None:
    if all(operator.attrgetter(key)(recipe) is None for key in needs.split(" or ")):
        raise RecipeError(f"recipe {recipe.name} has no section {needs}: there is nothing to do")


def main(arguments: list[str] | None = None, invoke: Callable[..., object] = app) -> None:
    """Entry point: an error becomes one line, a hint and an exit code, never a traceback.

    ZEPHYR_LITE_DEBUG=1 shows the traceback too.
    """
    stop = Stop()
    try:
        _prepare_libraries()
        with stop.installed():
            invoke(arguments)
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        if os.environ.get("ZEPHYR_LITE_DEBUG") == "1":
            traceback.print_exception(error)
        ours = error if isinstance(error, ZephyrError) else _as_ours(error, stop.requested)
        label = "stopped" if isinstance(ours, Stopped) else "error"
        print(f"{label}: {ours}", file=sys.stderr)
        if ours.hint:
            print(f"hint: {ours.hint}", file=sys.stderr)
        sys.exit(ours.exit_code)


def _as_ours(error: BaseException, signalled: int | None) -> ZephyrError:
    """What Python or a library raised, in our family: a signal, memory, I/O, else a bug."""
    if isinstance(error, KeyboardInterrupt):  # before our handler stood
        signalled = signal.SIGINT
    if signalled is not None:  # a library may have made another error of what our handler raised
        return Interrupted(signalled).stopped
    text = next(iter(str(error).splitlines()), "")[:200]
    is_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
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


if __name__ == "__main__":
    main()
