"""Export of adapters that somebody else trained: any PEFT LoRA folder, and its base.

adapters + base -> which tokenizer and template -> fold, write, compare -> a folder, report.json

The truth that files are compared with is PEFT's own forward over the base: nothing of our engines
stands between an adapter and its file.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from zephyr_lite import __version__
from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import LockedError, RecipeError, StorageError
from zephyr_lite.export import ollama
from zephyr_lite.export.artefacts import (
    REPORT,
    Source,
    Truth,
    architecture_of,
    file_name,
    has_llama_cpp,
    make,
)
from zephyr_lite.export.folders.sharded import refuse_bnb_merged
from zephyr_lite.export.weights.fold import EMBEDDING, FoldedModel
from zephyr_lite.export.weights.foreign import Chat, ForeignAdapter, find_chat, read_foreign
from zephyr_lite.model.adapters import set_dropout
from zephyr_lite.model.base import BaseFiles, compute_dtype, load_base, prepare
from zephyr_lite.recipe import Base, Export, result_fields
from zephyr_lite.storage import digest, file_digest, is_sealed, read_json, sweep, write_text
from zephyr_lite.train.loop import Listener

# Asked of the model and of each file; the answer that is followed is the model's own.
PROMPTS = (
    "What is the difference between a virus and a bacterium?",
    "Write a short poem about the sea in autumn.",
    "Explain in two sentences how a bicycle stays upright.",
    "Give me a recipe for tomato soup.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Who wrote Faust, and what is it about?",
    "Translate into French: The train leaves at nine.",
    "List three arguments for and three against remote work.",
)


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    adapters: in the order in which they were trained on top of each other. base: folder or hub id;
    None takes what the adapters name. out: the folder that is filled. template: a Jinja file, or
    `zephyr`; None takes what lies beside adapter or base.
    """

    adapters: tuple[Path, ...]
    base: str | None
    out: Path
    settings: Export
    template: str | None = None


def run(
    request: Request,
    device: torch.device,
    listener: Listener,
    *,
    offline: bool = False,
    to_ollama: bool = False,
) -> None:
    """Write and check every file that the request names, unless that was done before.

    Raises: RecipeError and DataError (exit 2) for adapters, bases, tokenizers and templates that do
        not fit together, before a byte is written; LockedError where another process exports here.
    """
    settings = request.settings
    if settings.merged_dtype == "nf4":
        refuse_bnb_merged()
    foreign = read_foreign(request.adapters, request.base)
    quantization = "nf4" if settings.base_weights == "nf4" else "none"
    base = Base.model_validate({"model": foreign.base, "quantization": quantization})
    template = _template(request.template)
    files = prepare(base, device, offline=offline)
    if settings.base_weights == "original" and files.identity["quantization"] != "none":
        raise RecipeError(
            f"--base-weights original, but {foreign.base} is quantised already",
            hint="leave it at nf4, or name the 16-bit base with --base",
        )
    model = FoldedModel(files.folder, foreign.folders)
    chat = find_chat(foreign.folders, files.folder, model.shape(EMBEDDING)[0], template)
    if chat.template is None:
        raise RecipeError(
            f"{chat.tokenizer}: no chat template, in the adapter's folder or the base's",
            hint="give the one it was trained with: --chat-template FILE, or zephyr",
        )
    for note in (*foreign.notes, *chat.notes, _merge_note(files, settings)):
        listener.note(f"export: {note}")
    sources = _sources(foreign, files, chat)
    name = _name(request.out)
    source = Source(model, chat.tokenizer, chat.template, name, digest(sources), {}, device)
    rows = model.shape(EMBEDDING)[0]
    truth = _truth(foreign, files, base, chat, device, rows) if has_llama_cpp() else None
    inputs = {**sources, "settings": result_fields(settings)}
    facts = {"inputs": inputs, "base_weights": settings.base_weights}
    modelfile = _modelfile(source, chat, settings)
    with _held(request.out):
        if _is_done(request.out, inputs):
            listener.note(f"export: {request.out} is up to date: nothing to do")
        else:
            report = make(source, settings, request.out, listener, truth, facts)
            write_text(request.out / "Modelfile", modelfile)
            for file in report["files"]:
                verdict = file.get("summary", "not verified")
                listener.note(f"export: {request.out / file['file']} {verdict}")
        if to_ollama:
            listener.note(ollama.create(name.lower(), request.out))


def _name(out: Path) -> str:
    """What the files are called: the folder's name, of letters that every tool takes."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", out.resolve().name).strip("-._")
    return name[:96] or "adapter"


def _modelfile(source: Source, chat: Chat, settings: Export) -> str:
    """Raises: RecipeError for an end token that a Modelfile cannot hold."""
    return ollama.modelfile(
        file_name(source.name, settings.quants[0]),
        architecture_of(source.model, settings.context_length).context_length,
        chat_template=source.chat_template,
        eos=chat.end_of_turn,
    )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """The folder, made and locked; the kernel lets go when we die."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StorageError(
            f"{folder}: cannot be written: {error.strerror or error}",
            hint="give a folder that can be written with --out DIR",
        ) from None
    try:
        _lock(handle, folder)
        sweep(folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LockedError(
            f"{folder} is in use by another zephyr-lite",
            hint="wait for it, or give another folder with --out DIR",
        ) from None


def _is_done(folder: Path, inputs: dict[str, Any]) -> bool:
    """Whether an export from these inputs was finished here, and its files are as they were."""
    try:
        report = read_json(folder / REPORT)
        if report["inputs"] != inputs or "failed" in report or not (folder / "Modelfile").exists():
            return False
        files = {folder / entry["file"]: entry["sha256"] for entry in report["files"]}
        folders = [folder / entry["folder"] for entry in report["folders"]]
    except (StorageError, KeyError, TypeError):
        return False  # none, or none of ours
    same = all(path.is_file() and file_digest(path) == sha256 for path, sha256 in files.items())
    return same and all(map(is_sealed, folders))


def _template(named: str | None) -> str | None:
    if named is None or named == "zephyr":
        return named and ZEPHYR_TEMPLATE
    try:
        return Path(named).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(f"--chat-template {named}: cannot be read: {error}") from None


def _merge_note(files: BaseFiles, settings: Export) -> str:
    if settings.base_weights == "original":
        return "folded into the base's 16-bit weights"
    return (
        "folded into the base's NF4 values, as QLoRA trains; for an adapter that was trained on "
        "16-bit weights give --base-weights original"
    )


def _sources(foreign: ForeignAdapter, files: BaseFiles, chat: Chat) -> dict[str, Any]:
    """Everything that decides the bytes and is no setting."""
    return {
        "version": __version__,
        "base": files.identity["sha256"],
        "adapters": [
            {path.name: file_digest(path) for path in sorted(folder.glob("adapter_*"))}
            for folder in foreign.folders
        ],
        "tokenizer": file_digest(chat.tokenizer / "tokenizer.json"),
        "special": dict(chat.special),
        "template": digest(chat.template),
    }


def _truth(
    foreign: ForeignAdapter,
    files: BaseFiles,
    base: Base,
    chat: Chat,
    device: torch.device,
    rows: int,
) -> Callable[[], Truth]:
    def load() -> Truth:
        model: Any = load_base(files, base, device)
        if rows != model.get_input_embeddings().weight.shape[0]:  # the adapters bring their own
            model.resize_token_embeddings(rows, mean_resizing=False)
        return Truth(
            _peft_log_probs(model, foreign.folders),
            chat.render,
            [[{"role": "user", "content": prompt}] for prompt in PROMPTS],
            None,
            chat.end_of_turn,
            compute_dtype(base, device),
        )

    return load


def _peft_log_probs(model: Any, adapters: Sequence[Path]) -> Callable[[list[int]], torch.Tensor]:
    """PEFT's forward over all adapters: ids -> log-probabilities [len(ids), V], fp32."""
    names = [f"adapter{number}" for number in range(len(adapters))]
    first, *later = zip(names, map(str, adapters), strict=True)
    peft = PeftModel.from_pretrained(model, first[1], adapter_name=first[0])
    for name, folder in later:
        peft.load_adapter(folder, adapter_name=name)
    peft.base_model.set_adapter(names)  # pyright: ignore[reportCallIssue] - a tuner takes several
    peft.requires_grad_(False)
    peft.train()  # bitsandbytes repacks weights in eval mode: see model/base.py
    set_dropout(peft, None)

    def log_probs(ids: list[int]) -> torch.Tensor:
        device = next(peft.parameters()).device
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([ids], device=device)).logits[0]
        return logits.float().log_softmax(-1)

    return log_probs
