"""A rehearsal: every stage for a few steps in a scratch folder, before the run of two days.

recipe, cut to 20 steps -> base, aif, sft, reference, dpo, export, a chat turn -> what a run takes

The rows are the first ones of each source, and a few of our own that are as long as the recipe lets
a row be, so the largest micro-batch is rehearsed whatever the data's longest row is. The base that
is prepared on the way stays in the cache for the run, and so do the tokens of the cut data. Not
covered: the rows that were not read by a stage (every one is parsed once, as far as time allows),
memory that other programs take later, and whether what is learnt is any good.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from zephyr_lite.data.sources import read_rows, read_source
from zephyr_lite.errors import Stopped, StorageError
from zephyr_lite.recipe import Dpo, Recipe, Sft, Source
from zephyr_lite.report.quantities import disk, duration
from zephyr_lite.run import Run
from zephyr_lite.stages import aif, chat, export, reference
from zephyr_lite.stages import dpo as dpo_stage
from zephyr_lite.stages import sft as sft_stage
from zephyr_lite.stages.context import Context
from zephyr_lite.stopping import Interrupted
from zephyr_lite.storage import cache_folder, write_text
from zephyr_lite.train.loop import Listener
from zephyr_lite.train.metrics import peak_memory_gib

STEPS = 20
DIALOGUES = 400  # at least: packed rows hold several short ones
LONGEST = 4  # rows of our own, of the greatest length
HELD_OUT, PROMPTS, QUESTIONS = 16, 2, 2
COUNT_SECONDS = 20.0  # for counting the rows of a run: a projection is not worth more
CHAT_PROMPT, CHAT_TOKENS = "Hello! Who are you?", 32
Counts = dict[str, list[int] | None]


@dataclass
class Act:
    """One part of a rehearsal: seconds it took and GiB at its peak."""

    name: str
    seconds: float
    peak_gib: float


@dataclass
class Watch:
    """Passes on what stages say, and times the reference pass without its loading of the model."""

    audience: Listener
    seconds: dict[str, float] = field(default_factory=dict)
    _began: tuple[str, float] | None = None

    def start(self, label: str, total: int, done: int) -> None:
        """See `train.loop.Listener`."""
        self._began = label, time.monotonic()
        self.audience.start(label, total, done)

    def step(self, record: dict[str, Any]) -> None:
        """See `train.loop.Listener`."""
        self.audience.step(record)

    def note(self, text: str) -> None:
        """See `train.loop.Listener`."""
        self.audience.note(text)

    def end(self) -> None:
        """See `train.loop.Listener`."""
        if self._began is not None:
            label, began = self._began
            self.seconds[label] = time.monotonic() - began
            self._began = None
        self.audience.end()


def run(ctx: Context, command: str) -> None:
    """Rehearse the recipe of `ctx`, whose run folder is not touched, and say what a run takes.

    Args:
        command: what starts the real run.
    Raises: what a stage raises; its scratch folder is then kept and named.
    """
    export.check_inputs(ctx)
    sft_stage.check_inputs(ctx)
    dpo_stage.check_inputs(ctx)
    counts = count_rows(ctx.recipe, offline=ctx.run.offline)
    with _scratch(ctx.listener.note) as folder:
        ctx.listener.note(f"rehearsing {STEPS} steps of each stage in {folder} (TMPDIR moves it)")
        recipe = cut(ctx.recipe, folder, offline=ctx.run.offline)
        watch = Watch(ctx.listener)
        with Run(recipe, folder / "run", ctx.run.offline) as scratch:
            rehearsal = Context(scratch, ctx.device, watch, ctx.stop)
            try:
                acts = _perform(rehearsal)
                lines = _table(ctx.recipe, rehearsal, acts, watch, counts)
            finally:
                _forget_reference(rehearsal)
        lines += _disk(scratch.folder, ctx.run.folder)
    for line in (*lines, "every stage works on this machine; start the run:", f"  {command}"):
        ctx.listener.note(line)


# ---------------------------------------------------------------- before


def cut(recipe: Recipe, folder: Path, *, offline: bool = False) -> Recipe:
    """The recipe with 20 steps of each training, few rows, and the longest rows that it allows.

    Args:
        folder: where rows of our own are written.
    """
    tree = recipe.model_dump(mode="json")
    for stage in filter(None, (tree["sft"], tree["dpo"])):
        stage["max_steps"] = min(STEPS, stage["max_steps"] or STEPS)
        stage["epochs"] = STEPS  # a few rows are enough for 20 steps
        stage["log_every"] = 1
        if stage["eval_every"]:
            stage["eval_every"] = max(1, stage["max_steps"] // 2)
    data = tree["data"]
    sft, dpo = recipe.sft or Sft.model_validate({}), recipe.dpo or Dpo.model_validate({})
    if data["dialogues"]:
        wanted = max(DIALOGUES, STEPS * sft.batch_size)
        rows = [_long_dialogue(sft.max_length, i) for i in range(LONGEST)]
        _cut_split(data["dialogues"], wanted, folder / "longest-dialogues.jsonl", rows)
    if data["feedback"]:
        wanted = max(LONGEST, STEPS * dpo.batch_size - LONGEST)  # one epoch sees them all
        rows = [_long_pair(dpo.max_length, i) for i in range(LONGEST)]
        _cut_split(data["feedback"], wanted, folder / "longest-pairs.jsonl", rows)
    if recipe.export.questions:
        found = itertools.islice(read_rows(recipe.export.questions, offline=offline), QUESTIONS)
        path = _write_rows(folder / "questions.jsonl", [row.data for row in found])
        tree["export"]["questions"] = str(path)
    tree["export"]["verify_prompts"] = min(PROMPTS, recipe.export.verify_prompts)
    tree["expect"] = {}  # published figures of a whole run
    return Recipe.model_validate(tree)


def count_rows(recipe: Recipe, *, offline: bool = False) -> Counts:
    """Rows of each training source of `sft` and `dpo`; None where counting took too long.

    Raises: DataError at a malformed row, as the run would.
    """
    found: Counts = {}
    for stage, split in (("sft", recipe.data.dialogues), ("dpo", recipe.data.feedback)):
        if split is not None:
            found[stage] = _count(split.train, time.monotonic() + COUNT_SECONDS, offline=offline)
    return found


def _count(sources: Sequence[Source], until: float, *, offline: bool) -> list[int] | None:
    counts = []
    for source in sources:
        rows = 0
        for rows, _ in enumerate(read_source(source, offline=offline), start=1):
            if rows % 1000 == 0 and time.monotonic() > until:
                return None
        counts.append(rows)
    return counts


def _cut_split(split: dict[str, Any], wanted: int, path: Path, rows: list[Any]) -> None:
    """Keep `wanted` training rows, evenly from every source, and add rows of our own."""
    for side, limit in (("train", wanted), ("eval", HELD_OUT)):
        share = math.ceil(limit / max(1, len(split[side])))
        for source in split[side]:
            source["limit"] = min(share, source["limit"] or share)
    split["train"].append({"path": str(_write_rows(path, rows))})


def _long_dialogue(tokens: int, number: int) -> dict[str, Any]:
    question = {"role": "user", "content": f"Count on from {number}."}
    return {"messages": [question, {"role": "assistant", "content": _numbers(tokens, number, 1)}]}


def _long_pair(tokens: int, number: int) -> dict[str, str]:
    up, down = _numbers(tokens, number, 1), _numbers(tokens, number, -1)
    return {"prompt": f"Go on: {up}", "chosen": up, "rejected": down}


def _numbers(tokens: int, first: int, direction: int) -> str:
    """A text of at least so many tokens: a number of four digits and its blank are two or more."""
    count = math.ceil(tokens / 2)
    return " ".join(str(5000 + direction * ((first + i) % 4000)) for i in range(count))


def _write_rows(path: Path, rows: list[Any]) -> Path:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@contextmanager
def _scratch(note: Callable[[str], None]) -> Iterator[Path]:
    """A folder that goes when the block ends, and stays for a look when it fails.

    Raises: Stopped where a signal ended the block; nothing of a rehearsal can be resumed.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="zephyr-lite-"))
    except OSError as error:
        hint = "TMPDIR names another place"
        raise StorageError(f"no scratch folder: {error.strerror or error}", hint=hint) from error
    ended = False
    try:
        yield folder
        ended = True
    except (Stopped, Interrupted) as error:
        ended = True
        code = error.exit_code if isinstance(error, Stopped) else error.stopped.exit_code
        raise Stopped("rehearsal stopped; nothing of it is kept", exit_code=code) from error
    finally:
        if ended:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            note(f"the rehearsal failed; what it wrote is kept in {folder}")


# ---------------------------------------------------------------- the stages


def _perform(ctx: Context) -> list[Act]:
    """Every part in the order of a run, timed."""
    parts: dict[str, Callable[[], Any]] = {"base": lambda: ctx.base}
    if ctx.recipe.data.feedback:
        parts["aif"] = lambda: aif.run(ctx)
    if ctx.recipe.sft:
        parts["sft"] = lambda: sft_stage.run(ctx)
    if ctx.recipe.dpo:
        parts["reference"] = lambda: reference.run(ctx)
        parts["dpo"] = lambda: dpo_stage.run(ctx)
    parts["export"] = lambda: export.run(ctx)
    parts["chat"] = lambda: _chat(ctx)
    return [_time(ctx, name, part) for name, part in parts.items()]


def _time(ctx: Context, name: str, part: Callable[[], Any]) -> Act:
    if ctx.device.type == "cuda":
        torch.cuda.init()  # nothing can be reset before
        torch.cuda.reset_peak_memory_stats(ctx.device)
    began = time.monotonic()
    part()
    return Act(name, time.monotonic() - began, peak_memory_gib(ctx.device))


def _chat(ctx: Context) -> None:
    """One turn against the exported file; without llama.cpp against the trained model."""
    has_llama = importlib.util.find_spec("xllamacpp") is not None
    stage = None if has_llama else export.final_stage(ctx)
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(io.StringIO()):
        chat.run(ctx, stage, CHAT_PROMPT, CHAT_TOKENS, 0.0)
    answer = " ".join(said.getvalue().split())
    ctx.listener.note(f"chat: {CHAT_PROMPT} -> {answer[:40] or '(nothing yet)'}")


def _forget_reference(ctx: Context) -> None:
    """Remove the log-probs under an adapter that is thrown away from the shared cache.

    Under the base itself, or a ready adapter, they are the run's own and stay.
    """
    entry = ctx.run.manifest["stages"].get("reference", {})
    if ctx.recipe.sft and not ctx.recipe.sft.start:
        for name in entry.get("sets", ()):
            shutil.rmtree(cache_folder() / "reference" / name, ignore_errors=True)


# ---------------------------------------------------------------- after


def _table(
    recipe: Recipe, rehearsal: Context, acts: list[Act], watch: Watch, counts: Counts
) -> list[str]:
    """What each part took, and what it is projected to take in a run."""
    peak = "GPU peak" if rehearsal.device.type == "cuda" else "RAM so far"
    lines = [f"{'stage':10}{'seconds':>9}{peak:>12}   projection for the run"]
    whole: float | None = 0.0
    for act in acts:
        seconds, text = _project(recipe, rehearsal, act, watch, counts)
        whole = None if whole is None or seconds is None else whole + seconds
        lines.append(f"{act.name:10}{act.seconds:9.1f}{act.peak_gib:8.1f} GiB   {text}".rstrip())
    if whole is not None:
        lines.append(
            f"projection for the whole run: about {duration(whole)}, evaluations not counted"
        )
    return lines


def _project(
    recipe: Recipe, rehearsal: Context, act: Act, watch: Watch, counts: Counts
) -> tuple[float | None, str]:
    """Seconds of a part in a run, and how they come about; None where its steps are not known."""
    if act.name == "base":
        return 0.0, "done: the cache keeps it"
    if act.name == "reference":
        return _project_reference(rehearsal.run, watch, counts)
    settings = {"sft": recipe.sft, "dpo": recipe.dpo}.get(act.name)
    figures = rehearsal.run.manifest["stages"].get(act.name, {}).get("figures", {})
    if settings is None or not figures.get("steps"):
        return act.seconds, ""
    seconds = figures["seconds"] / figures["steps"]
    steps = settings.max_steps
    if (share := _share(rehearsal.run, act.name, counts)) is not None:
        per_epoch = math.ceil(_examples(rehearsal, act.name) / share / settings.batch_size)
        steps = min(math.ceil(settings.epochs * per_epoch), steps or math.inf)
    if steps is None:
        return None, f"{duration(1000 * seconds)} per 1,000 steps of {seconds:.2g} s"
    text = f"about {duration(steps * seconds)} ({steps:,} steps of {seconds:.2g} s)"
    return act.seconds + (steps - figures["steps"]) * seconds, text


def _project_reference(rehearsal: Run, watch: Watch, counts: Counts) -> tuple[float | None, str]:
    """Seconds of a pair, loading the model left out, times the pairs of a run."""
    if "reference" not in watch.seconds:
        return None, "not measured: the cache has these pairs"
    pairs: int = rehearsal.output("reference", "computed")
    seconds = watch.seconds["reference"] / pairs
    share = _share(rehearsal, "dpo", counts)
    if share is None:
        return None, f"{duration(1000 * seconds)} per 1,000 pairs"
    whole = max(1.0, (pairs - LONGEST) / share)
    return whole * seconds, f"about {duration(whole * seconds)} ({whole:,.0f} pairs)"


def _share(rehearsal: Run, stage: str, counts: Counts) -> float | None:
    """Fraction of a run's training rows that was rehearsed; None where they were not counted."""
    whole = counts.get(stage)
    split = {"sft": rehearsal.recipe.data.dialogues, "dpo": rehearsal.recipe.data.feedback}[stage]
    if not whole or split is None:
        return None
    read = [min(rows, source.limit or 0) for rows, source in zip(whole, split.train, strict=False)]
    return sum(read) / sum(whole)


def _examples(rehearsal: Context, stage: str) -> float:
    """Packed rows or pairs of one epoch of the rehearsal, without those of our own.

    From the last step's epoch, as the loop logged it; an epoch's last step is half full on average.
    """
    text = rehearsal.run.path(stage, "metrics.jsonl").read_text(encoding="utf-8")
    last = [line for line in map(json.loads, text.splitlines()) if "epoch" in line][-1]
    sft, dpo = rehearsal.recipe.sft, rehearsal.recipe.dpo
    own, batch = LONGEST, dpo.batch_size if dpo else 1
    if stage == "sft" and sft:
        row = _long_dialogue(sft.max_length, 0)
        tokens = len(rehearsal.tokenizer.encode_dialogue(row["messages"]).ids)
        own, batch = LONGEST * math.ceil(tokens / sft.max_length), sft.batch_size
    return max(1.0, last["step"] / last["epoch"] * batch - (batch - 1) / 2 - own)


def _disk(outputs: Path, place: Path) -> list[str]:
    """What the outputs take, and what is free where the run will put them."""
    sizes = {
        stage: sum(f.stat().st_size for f in (outputs / stage).rglob("*") if f.is_file())
        for stage in ("sft", "dpo", "export")
    }
    parts = ", ".join(f"{stage} {disk(size)}" for stage, size in sizes.items() if size)
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
    free = disk(shutil.disk_usage(there).free)
    return [f"disk: {parts}; checkpoints while it trains", f"disk: {free} free for {place}"]
