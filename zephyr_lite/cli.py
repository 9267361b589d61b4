"""Commands: parse, call one function, print. Everything heavy is imported inside a command."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from zephyr_lite import __version__
from zephyr_lite.errors import RecipeError, Stopped, StorageError, ZephyrError
from zephyr_lite.session import (
    as_ours,
    check_choice,
    choose_device,
    opened,
    prepare_libraries,
    stay_offline,
    watching,
)
from zephyr_lite.stopping import Interrupted, Stop

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
    with opened(
        recipe, run_dir, set_field, json, quiet, offline, device,
        needs="sft or dpo", writes=not rehearse, reuse=not fresh,
    ) as ctx:  # fmt: skip
        from zephyr_lite.stages import aif, dpo, export, plan, sft

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
        sft.check_inputs(ctx)
        dpo.check_inputs(ctx)
        plan.check_inputs(ctx)
        aif.run(ctx)  # first: a faulty row of feedback must not surface after a day of dSFT
        sft.run(ctx)
        dpo.run(ctx)
        export.run(ctx)
        ctx.compare_with_expected()
        minutes = (time.monotonic() - began) / 60
        chat = shlex.join(["zephyr-lite", "chat", recipe, *where])
        ctx.listener.note(f"done in {minutes:.1f} min; talk to it: {chat}")


@app.command()
def plan(
    recipe: RecipeName = "zephyr-7b",
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Plan for a card by name, e.g. 4090; none needed.")
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", help="Plan for a card of so much memory, e.g. 24GB.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Time two steps of the longest batch here.")
    ] = False,
    run_dir: RunDir = None, set_field: SetField = None, json: Json = False, quiet: Quiet = False,
    offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Memory, time and disk of a recipe, before anything loads; exit 3 if it does not fit."""
    with opened(
        recipe, run_dir, set_field, False, quiet, offline, device,
        needs="sft or dpo", writes=False, trains=False,
    ) as ctx:  # fmt: skip
        from zephyr_lite.stages import plan as work

        work.run(ctx, vram=vram, gpu=gpu, measure=probe, as_json=json, pick=recipe)


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
    quant: Annotated[
        list[str] | None, typer.Option("--quant", help="q4_k_m, q8_0, f16, ...; repeatable.")
    ] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Also merged safetensors.")] = False,
    w4a16: Annotated[bool, typer.Option("--w4a16", help="Also 4 bits for vLLM.")] = False,
    lora: Annotated[bool, typer.Option("--lora-gguf", help="Also the adapter alone.")] = False,
    base_weights: Annotated[
        str | None, typer.Option("--base-weights", help="Fold into nf4 or original.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare each GGUF with the model.")] = True,
    ollama: Annotated[bool, typer.Option("--ollama", help="Also run `ollama create`.")] = False,
    stage: Annotated[str | None, typer.Option("--stage", help="dpo or sft.")] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", metavar="DIR", help="Not a run's: any PEFT adapter; repeatable."),
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Its base: folder or hub id [what it names].")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where its files go.")
    ] = None,
    template: Annotated[
        str | None, typer.Option("--chat-template", metavar="FILE", help="Its template; or zephyr.")
    ] = None,
    json: Json = False, quiet: Quiet = False, offline: Offline = False, device: Device = "auto",
) -> None:  # fmt: skip
    """Fold the adapter in, write GGUF, compare it in llama.cpp."""
    check_choice("--stage", stage, (None, "dpo", "sft"))
    settings: dict[str, object] = {"quants": f"[{', '.join(quant)}]"} if quant else {}
    flags = {"merged": merged, "w4a16": w4a16, "lora_gguf": lora, "verify": not verify}
    settings |= {name: name != "verify" for name, is_given in flags.items() if is_given}
    settings |= {"base_weights": base_weights} if base_weights else {}
    overrides = [*(set_field or ()), *(f"export.{k}={v}" for k, v in settings.items())]
    if adapter or base or out or template:
        if run_dir or stage:
            raise RecipeError("--run and --stage name a run's adapter: leave them or --adapter out")
        _export_adapters(
            adapter, base, out, template, recipe, overrides, json, quiet, offline, device, ollama
        )
        return
    with opened(recipe, run_dir, overrides, json, quiet, offline, device, must_exist=True) as ctx:
        from zephyr_lite.stages import export as work

        work.run(ctx, stage, to_ollama=ollama)


def _export_adapters(
    adapters: list[Path] | None, base: str | None, out: Path | None, template: str | None,
    recipe: str, overrides: list[str], json: bool, quiet: bool, offline: bool, device: str,
    to_ollama: bool,
) -> None:  # fmt: skip
    """Export adapters that are no run's, by the `export` section of a recipe."""
    if not (adapters and out):
        raise RecipeError(
            "an adapter that is not a run's needs --adapter and --out",
            hint="zephyr-lite export --adapter DIR --out DIR [--base BASE] [--quant TYPE]",
        )
    check_choice("--device", device, ("auto", "cuda", "cpu"))
    from zephyr_lite import recipe_file

    settings = recipe_file.load(recipe, tuple(overrides)).export
    if offline:
        stay_offline()
    chosen = choose_device(device, needs_gpu=False)
    import torch

    from zephyr_lite.stages import export_adapter

    stop = Stop()
    listener = watching(json, quiet, stop)
    request = export_adapter.Request(tuple(adapters), base, out, settings, template)
    with stop.installed():
        try:
            export_adapter.run(
                request, torch.device(chosen), listener, offline=offline, to_ollama=to_ollama
            )
        finally:
            listener.end()


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
    check_choice("--stage", stage, (None, "dpo", "sft", "base"))
    with opened(
        recipe, run_dir, set_field, False, True, offline, device,
        must_exist=True, writes=False, trains=False,
    ) as ctx:  # fmt: skip
        from zephyr_lite.stages import chat as work

        work.run(ctx, stage, prompt, max_tokens, temperature)


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    subject: Annotated[
        str, typer.Argument(metavar="SUBJECT", help="sft, dpo, kernels, export, page or submit.")
    ],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPTIONS]...", help="The subject's own; `-- --help` lists them."),
    ] = None,
    rival_python: Annotated[
        list[str] | None,
        typer.Option(
            "--rival-python", metavar="NAME=PATH",
            help="plain, trl, liger or unsloth in its own environment; repeatable.",
        ),
    ] = None,
    toy: Annotated[bool, typer.Option("--toy", help="Tiny sizes: does it work here?")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="[bench.jsonl; a page: bench.md]")
    ] = None,
    device: Device = "auto",
) -> None:  # fmt: skip
    """Speed and memory here beside rivals; `page` shows, `submit` prints rows.

    zephyr-lite bench dpo --rival-python trl=envs/trl/bin/python && zephyr-lite bench page
    """
    check_choice("--device", device, ("auto", "cuda", "cpu"))
    from zephyr_lite.stages import bench as work

    words = [word for text in rival_python or () for word in ("--rival-python", text)]
    words += [] if device == "auto" else ["--device", device]
    words += ["--toy"] * toy
    raise typer.Exit(work.run(subject, [*words, *(options or ())], out=out))


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

    from zephyr_lite.recipe_schema import json_schema

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
    with opened(
        recipe, run_dir, set_field, json, quiet, offline, device, needs=needs, reuse=not fresh
    ) as ctx:
        modules = [importlib.import_module(f"zephyr_lite.stages.{name}") for name in stages]
        for module in modules:
            if hasattr(module, "check_inputs"):  # what must not surface after a day of dSFT
                module.check_inputs(ctx)
        for module in modules:
            module.run(ctx)


def main(arguments: list[str] | None = None, invoke: Callable[..., object] = app) -> None:
    """Entry point: an error becomes one line, a hint and an exit code, never a traceback.

    ZEPHYR_LITE_DEBUG=1 shows the traceback too.
    """
    stop = Stop()
    try:
        prepare_libraries()
        with stop.installed():
            invoke(arguments)
    except (Exception, KeyboardInterrupt, Interrupted) as error:
        if os.environ.get("ZEPHYR_LITE_DEBUG") == "1":
            traceback.print_exception(error)
        ours = error if isinstance(error, ZephyrError) else as_ours(error, stop.requested)
        label = "stopped" if isinstance(ours, Stopped) else "error"
        print(f"{label}: {ours}", file=sys.stderr)
        if ours.hint:
            print(f"hint: {ours.hint}", file=sys.stderr)
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    main()
