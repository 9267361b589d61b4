"""Commands: parse, call one function, print. Everything heavy is imported inside a command."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zephyr_lite import __version__
from zephyr_lite.errors import MachineError, RecipeError, Stopped, ZephyrError

if TYPE_CHECKING:
    from zephyr_lite.stages.context import Context

app = typer.Typer(
    help="Zephyr on one GPU you own: dSFT, AI feedback, dDPO and GGUF export from one recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
recipes_app = typer.Typer(help="List, show and copy recipes.", rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes", invoke_without_command=True)

RecipeName = Annotated[str, typer.Argument(metavar="[RECIPE]", help="A built-in name or a file.")]
RunDir = Annotated[Path | None, typer.Option("--run", help="Run folder [runs/NAME].")]
SetField = Annotated[list[str] | None, typer.Option("--set", help="Override, e.g. dpo.beta=0.05.")]
Json = Annotated[bool, typer.Option("--json", help="NDJSON events on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Offline = Annotated[bool, typer.Option("--offline", help="Open no connection.")]
Device = Annotated[str, typer.Option("--device", help="auto, cuda or cpu.")]


@app.command()
def run(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Do every stage that is not done yet, from base model to GGUF."""
    began = time.monotonic()
    with _context(recipe, run_dir, set_field, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import aif, dpo, export, sft

        sft.run(ctx)
        aif.run(ctx)
        dpo.run(ctx)
        export.run(ctx)
        ctx.compare_with_expected()
        minutes = (time.monotonic() - began) / 60
        ctx.listener.note(f"done in {minutes:.1f} min; talk to it: zephyr-lite chat {recipe}")


@app.command()
def sft(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """dSFT: fine-tune on the teacher's dialogues."""
    with _context(recipe, run_dir, set_field, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import sft as stage

        _need(ctx.recipe.sft, recipe, "sft")
        stage.run(ctx)


@app.command()
def aif(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """AI feedback becomes preference pairs, with a report of what was dropped and why."""
    with _context(recipe, run_dir, set_field, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import aif as stage

        _need(ctx.recipe.data.feedback, recipe, "data.feedback")
        stage.run(ctx)


@app.command()
def ref(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Reference log-probs, once (dpo runs it when they are missing)."""
    with _context(recipe, run_dir, set_field, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import aif, reference
        from zephyr_lite.stages import sft as parent

        _need(ctx.recipe.dpo, recipe, "dpo")
        for stage in (parent, aif, reference):
            stage.run(ctx)


@app.command()
def dpo(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """dDPO: preference optimisation against the SFT model (runs what it needs first)."""
    with _context(recipe, run_dir, set_field, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import aif
        from zephyr_lite.stages import dpo as stage
        from zephyr_lite.stages import sft as parent

        _need(ctx.recipe.dpo, recipe, "dpo")
        for each in (parent, aif, stage):
            each.run(ctx)


@app.command()
def export(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    gguf: Annotated[bool, typer.Option("--gguf", help="Write GGUF (q8_0 unless --quant).")] = True,
    quant: Annotated[list[str] | None, typer.Option("--quant", help="f32, f16 or q8_0.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also merged safetensors.")] = False,
    stage: Annotated[str | None, typer.Option("--stage", help="dpo or sft.")] = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Fold the adapter in, write GGUF, load it in llama.cpp and compare."""
    overrides = list(set_field or [])
    if quant:
        overrides.append(f"export.quants=[{', '.join(quant)}]")
    if merged:
        overrides.append("export.merged=true")
    with _context(recipe, run_dir, overrides, json, quiet, offline, device) as ctx:
        from zephyr_lite.stages import export as work

        ctx.run.forget("export")
        work.run(ctx, stage)


@app.command()
def chat(
    recipe: RecipeName = "zephyr-7b", run_dir: RunDir = None, set_field: SetField = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Ask once, leave.")] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="dpo, sft or base.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 512,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Talk to the result: the exported file, or a stage with --stage."""
    with _context(recipe, run_dir, set_field, False, True, offline, device, must_exist=True) as ctx:
        from zephyr_lite.stages import chat as work

        work.run(ctx, stage, prompt, max_tokens, temperature)


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the built-in recipes."""
    if context.invoked_subcommand is not None:
        return
    from zephyr_lite import recipe_file

    for name in recipe_file.built_in():
        typer.echo(f"{name:24} {recipe_file.load(name).description}")


@recipes_app.command("show")
def show_recipe(name: str, set_field: SetField = None, resolved: bool = False) -> None:
    """Print a recipe as it is written, or every value of it with --resolved."""
    from zephyr_lite import recipe_file

    if not (resolved or set_field):
        typer.echo(recipe_file.find(name).read_text(encoding="utf-8"), nl=False)
        return
    import yaml

    loaded = recipe_file.load(name, tuple(set_field or ()))
    typer.echo(yaml.safe_dump(loaded.model_dump(mode="json"), sort_keys=False), nl=False)


@recipes_app.command("copy")
def copy_recipe(name: str, to: Annotated[Path | None, typer.Argument()] = None) -> None:
    """Write a recipe into the current folder to edit."""
    from zephyr_lite import recipe_file

    source = recipe_file.find(name)
    target = to or Path(source.name)
    if target.exists():
        raise RecipeError(f"{target} exists already", hint="give another file name")
    target.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    typer.echo(f"{target}; edit it and run: zephyr-lite run {target}")


@recipes_app.command("schema")
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from zephyr_lite.recipe import json_schema

    typer.echo(json.dumps(json_schema(), indent=1))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


@contextmanager
def _context(
    name: str, run_dir: Path | None, overrides: list[str] | None,
    json: bool, quiet: bool, offline: bool, device: str, *, must_exist: bool = False,
) -> Iterator[Context]:  # fmt: skip
    """Recipe, run folder, device, signals and progress of one command."""
    from zephyr_lite import recipe_file
    from zephyr_lite.run import Run, default_folder

    recipe = recipe_file.load(name, tuple(overrides or ()))
    folder = run_dir or default_folder(recipe)
    if must_exist and not folder.is_dir():
        raise RecipeError(f"{folder} does not exist", hint=f"zephyr-lite run {name}")
    if offline:
        _stay_offline()
    chosen = _choose_device(
        device, needs_gpu=recipe.base.build is None and not _is_local(recipe.base.model)
    )
    import torch

    from zephyr_lite.report.progress import JsonProgress, QuietProgress, TerminalProgress
    from zephyr_lite.stages.context import Context
    from zephyr_lite.stopping import Stop

    listener = JsonProgress() if json else QuietProgress() if quiet else TerminalProgress()
    stop = Stop()
    with stop.installed(), Run(recipe, folder, offline=offline) as run:
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
    """`cuda` or `cpu`. Raises: MachineError for a hub model without a GPU."""
    if asked not in ("auto", "cuda", "cpu"):
        raise RecipeError(f"--device {asked}: must be auto, cuda or cpu")
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


def _is_local(model: str) -> bool:
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def _stay_offline() -> None:
    """The libraries read these when they are imported."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ[name] = "1"


def _need(section: object, name: str, key: str) -> None:
    if section is None:
        raise RecipeError(f"recipe {name} has no section {key}")


def main(arguments: list[str] | None = None, invoke: Callable[..., object] = app) -> None:
    """Entry point: our errors become one line, a hint and an exit code."""
    _prepare_libraries()
    try:
        invoke(arguments)
    except ZephyrError as error:
        label = "stopped" if isinstance(error, Stopped) else "error"
        print(f"{label}: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
