"""What an export leaves in a folder: every file of the recipe's `export` section, from one pass.

    plan  ->  stream to .part files  ->  compare each GGUF  ->  final names  ->  Modelfile, report

Files have their final names only once all of them were compared with the model they were made from:
if one fails, all keep their `.part` names, for whoever looks into it, and what an earlier export
left stays as it is. A kill at any instant loses nothing: the same call goes on where the journals
end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from zephyr_lite.export.check.reread import verify_weights
from zephyr_lite.export.check.verify import ExportMismatch, Messages, summary, verify_gguf
from zephyr_lite.export.folders.compressed_tensors import PackedTarget
from zephyr_lite.export.folders.sharded import MergedTarget, refuse_bnb_merged
from zephyr_lite.export.gguf.adapter_alone import adapted_ranks, write_gguf_adapter
from zephyr_lite.export.gguf.architecture import Architecture, read_architecture
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.gguf.vocabulary import read_vocabulary
from zephyr_lite.export.quants import quantise
from zephyr_lite.export.streaming import Target, stream
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.recipe import Export
from zephyr_lite.storage import digest, write_json

if TYPE_CHECKING:  # it brings PEFT, seconds that only the comparison needs
    from zephyr_lite.train.loop import Listener

REPORT = "report.json"


@dataclass(frozen=True)
class Source:
    """What is exported.

    tokenizer_folder: holds tokenizer.json. name: of the model, and what its files are called.
    identity: digest of everything that decides the bytes and is not in `Export`.
    metadata: facts for the file's header, such as `license`. device: where our own code quantises.
    """

    model: FoldedModel
    tokenizer_folder: Path
    chat_template: str
    name: str
    identity: str
    metadata: Mapping[str, str]
    device: torch.device


@dataclass(frozen=True)
class Truth:
    """What a GGUF is compared with.

    log_probs: token ids -> fp32 [len(ids), V], of the token after each position.
    render: messages -> text with the generation prompt, as training rendered them.
    prompts: dialogues that end with a user turn. answers: ids that follow each; None: greedy.
    dtype: what the model multiplies in. is_on_nf4: it multiplies by NF4 values where the files hold
    the base's 16-bit ones.
    """

    log_probs: Callable[[list[int]], torch.Tensor]
    render: Callable[[Messages], str]
    prompts: Sequence[Messages]
    answers: Sequence[list[int]] | None
    eos_token: str
    dtype: torch.dtype
    is_on_nf4: bool = False


def make(
    source: Source,
    settings: Export,
    folder: Path,
    listener: Listener,
    truth: Callable[[], Truth] | None,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Write and check everything that `settings` names into `folder`; the report, also on disk.

    Args:
        truth: loads the trained model; called once, after the files are written. None where
            llama.cpp is not installed: files are then read back and their weights compared.
        facts: entries of the report that the caller knows.
    Raises: ExportMismatch (exit 7) for a file that is not the model: the report then has its
        figures under `failed` and names no file; what `plan` and `stream` raise.
    """
    targets = plan(source, settings, folder)
    entries = _stream(source.model, targets, listener)
    report: dict[str, Any] = {**facts, "files": [], "folders": []}
    try:
        check = _checker(source, settings, listener, truth) if settings.verify else None
        for target, entry in zip(targets, entries, strict=True):
            is_file = isinstance(target, GgufTarget)
            verdict = check(target) if check is not None and is_file else {}
            report["files" if is_file else "folders"].append(entry | verdict)
        if settings.lora_gguf:
            report["files"].append(_adapter_alone(source, folder))
        for target in targets:
            target.commit()
    except ExportMismatch as error:
        failed = {**facts, "files": [], "folders": [], "failed": error.report}
        write_json(folder / REPORT, failed)
        raise
    finally:
        for target in targets:
            target.close()
    write_json(folder / REPORT, report)
    return report


def file_name(name: str, quant: str) -> str:
    """What the GGUF of a model is called."""
    return f"{name}-{quant.upper()}.gguf"


def has_llama_cpp() -> bool:
    """Whether llama.cpp can be loaded here."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


def plan(source: Source, settings: Export, folder: Path) -> list[Target]:
    """The files of one pass, nothing computed yet. Raises: RecipeError, DataError, MachineError."""
    model, tokenizer = source.model, source.tokenizer_folder
    routes = quantise.routes(settings.quantiser)
    template, identity = source.chat_template, source.identity
    if settings.merged_dtype == "nf4":
        refuse_bnb_merged()
    if settings.lora_gguf:
        adapted_ranks(model)  # what a LoRA file cannot say is refused before anything is computed
    found: list[Target] = [
        GgufTarget(
            model,
            tokenizer,
            template,
            folder / file_name(source.name, quant),
            quant,
            name=source.name,
            identity=digest([identity, {str(k): r for k, r in routes.items()}]),
            routes=routes,
            context_length=settings.context_length,
            metadata=source.metadata,
            device=source.device,
        )
        for quant in dict.fromkeys(settings.quants)
    ]
    if settings.merged:
        out = folder / "merged"
        dtype = settings.merged_dtype
        found.append(MergedTarget(model, tokenizer, template, out, dtype, identity=identity))
    if settings.w4a16:
        out = folder / "w4a16"
        dtype = settings.merged_dtype
        found.append(PackedTarget(model, tokenizer, template, out, dtype, identity=identity))
    return found


def _stream(
    model: FoldedModel, targets: Sequence[Target], listener: Listener
) -> list[dict[str, Any]]:
    listener.start(f"write {', '.join(t.label for t in targets)}", len(model.names()), 0)
    try:
        return stream(model, targets, lambda done, total: listener.step({"tensor": done}))
    finally:
        listener.end()


def _checker(
    source: Source, settings: Export, listener: Listener, truth: Callable[[], Truth] | None
) -> Callable[[GgufTarget], dict[str, Any]]:
    """How one written file is checked: `verify` and `summary` of its entry in the report.

    The trained model is loaded here, once for all files.
    """
    if truth is None:
        listener.note(
            "export: llama.cpp is not there, so weights are read back and compared; token ids, "
            "template and predictions are not (pip install 'zephyr-lite[llama]')"
        )
        return lambda target: _read_back(source, settings, target, listener)
    known = truth()
    tokenizer = Tokenizer.from_file(str(source.tokenizer_folder / "tokenizer.json"))

    def check(target: GgufTarget) -> dict[str, Any]:
        listener.start(f"check {target.label}", len(known.prompts), 0)
        try:
            found = verify_gguf(
                target.part,
                known.log_probs,
                tokenizer,
                source.chat_template,
                known.render,
                known.prompts,
                settings.verify_tokens,
                answers=known.answers,
                eos_token=known.eos_token,
                threads=torch.get_num_threads(),
                on_prompt=lambda done, total: listener.step({"prompt": done}),
                base_weights="original" if known.is_on_nf4 else "nf4",
                truth_dtype=known.dtype,
            )
        finally:
            listener.end()
        return {"verify": found, "summary": summary(found)}

    return check


def _read_back(
    source: Source, settings: Export, target: GgufTarget, listener: Listener
) -> dict[str, Any]:
    """The check without llama.cpp: weights, by a reader that is not ours. As `_checker`'s."""
    model = source.model
    listener.start(f"read back {target.label}", len(model.names()), 0)
    try:
        found = verify_weights(
            target.part,
            model,
            architecture_of(model, settings.context_length),
            read_vocabulary(source.tokenizer_folder, model.config["vocab_size"]),
            source.chat_template,
            on_tensor=lambda done, total: listener.step({"tensor": done}),
        )
    finally:
        listener.end()
    worst = found["worst"]
    text = f"weights read back, at most {worst['error']:.2g} away ({worst['tensor']})"
    kept = "".join(
        f", adapter {n} there to {a['kept']:.1%}" for n, a in enumerate(found["adapters"])
    )
    return {"verify": found, "summary": text + kept}


def _adapter_alone(source: Source, folder: Path) -> dict[str, Any]:
    out, architecture = folder / f"{source.name}-lora.gguf", architecture_of(source.model)
    names = {"name": source.name, "identity": source.identity}
    return write_gguf_adapter(source.model, architecture, out, **names)


def architecture_of(model: FoldedModel, context_length: int | None = None) -> Architecture:
    """GGUF's facts of a model. Raises: RecipeError, DataError for one that it cannot hold."""
    shapes = {name: model.shape(name) for name in model.names()}
    return read_architecture(model.config, shapes, context_length)
