"""Tokenised dialogues on disk: made once per content, read through memory maps.

    CACHE/tokens/<key>/
      key.json                       what the tokens depend on, readable
      documents.ids .answer .offsets   int32, bool, int64: one dialogue after the other
      held_out.ids .answer .offsets    those held out by hash of the prompt
      report.json  rejected.jsonl    what became of every row

The key covers what makes other ids, other documents or another report: contents of the sources,
the filters and what they filter against, tokenizer, template. Not: where the sources lie, the
packing's length, the loss, the learning rate. Dialogues stream through in batches, so memory does
not grow with their number; a kill leaves nothing that could be taken for a whole store.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import tokenizers

from zephyr_lite.data.chat import BATCH, ChatTokenizer, template_hash
from zephyr_lite.data.decontaminate import Decontaminator
from zephyr_lite.data.dialogues import Dialogue, DialogueRule, iter_dialogues
from zephyr_lite.data.layout import Documents
from zephyr_lite.data.report import OnFault, Report
from zephyr_lite.data.sources import find_files, is_local, resolve, source_fingerprint
from zephyr_lite.data.split import is_held_out
from zephyr_lite.errors import StorageError
from zephyr_lite.recipe import Source
from zephyr_lite.storage import (
    digest,
    held,
    is_sealed,
    open_sealed,
    read_json,
    sealed_folder,
    sweep,
    write_json,
)

VERSION = 1  # raise when the same rows would become other ids, or other files
NOTE_SECONDS = 10.0
DTYPES = {"ids": np.dtype("<i4"), "answer": np.dtype(np.bool_), "offsets": np.dtype("<i8")}


@dataclass(frozen=True)
class Corpus:
    """What a store is made from.

    holdout: fraction of the dialogues that goes to the second side, see `split.is_held_out`.
    extra_end: the first side's documents get one more end token, as the published packer put it
        between documents.
    """

    sources: Sequence[Source]
    truecase: bool = False
    drop_refusals: bool = False
    decontaminate: Sequence[Source] = ()
    on_fault: OnFault = "stop"
    seed: int = 42
    holdout: float = 0.0
    extra_end: bool = False
    offline: bool = False


@dataclass(frozen=True)
class Tokens:
    """An open store. A side without a dialogue is None; `rejected` is JSON lines."""

    documents: Documents | None
    held_out: Documents | None
    report: dict[str, Any]
    rejected: str

    def rejected_of(self, side: str) -> str:
        """`rejected` with the side of the recipe's split that these rows are from."""
        rows = (json.loads(line) for line in self.rejected.split("\n")[:-1])
        return "".join(_line({"side": side} | row) for row in rows)


def open_tokens(
    corpus: Corpus, tokenizer: ChatTokenizer, root: Path, note: Callable[[str], None]
) -> Tokens:
    """The tokens of a corpus; makes them unless `root` has them.

    Args:
        root: folder shared by all stores.
        note: told of progress, and of a damaged store that was set aside.
    Raises: DataError at an unsound row; StorageError when the store cannot be written.
    """
    key = token_key(corpus, tokenizer)
    folder = root / digest(key)[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{root}: cannot be made: {error.strerror or error}") from error
    with held(root / f"{folder.name}.lock"):
        meta = _verify(folder, note)
        if meta is None:
            sweep(root, folder.name)
            meta = {"files": _local_files(corpus)}
            with sealed_folder(folder, meta) as part:
                write_json(part / "key.json", key)
                _build(corpus, tokenizer, part, note)
    return _open(folder, dict(zip(meta["files"], _local_files(corpus), strict=True)))


def known_tokens(corpus: Corpus, tokenizer: ChatTokenizer, root: Path) -> Tokens | None:
    """The tokens of a corpus where `root` has them; nothing is made, nor hashed again.

    Raises: as `token_key`.
    """
    folder = root / digest(token_key(corpus, tokenizer))[:32]
    return _open(folder, {}) if is_sealed(folder) else None


def token_key(corpus: Corpus, tokenizer: ChatTokenizer) -> dict[str, Any]:
    """Everything the store's files depend on, and nothing else."""
    return {
        "version": VERSION,
        "sources": [_source_key(s, corpus) for s in corpus.sources],
        "truecase": corpus.truecase,
        "drop_refusals": corpus.drop_refusals,
        "decontaminate": [_benchmark_key(s, corpus) for s in corpus.decontaminate],
        "on_fault": corpus.on_fault,
        "holdout": corpus.holdout,
        "extra_end": corpus.extra_end,
        "template": template_hash(),
        "tokenizer": tokenizer.identity,
        "tokenizers": tokenizers.__version__,
    }


def _source_key(source: Source, corpus: Corpus) -> dict[str, Any]:
    content = source_fingerprint(source, offline=corpus.offline)
    key = {"content": content, "limit": source.limit, "weight": source.weight}
    if source.weight % 1:  # which rows are drawn depends on these too, see `mixture`
        key |= {"seed": corpus.seed, "names": [Path(file).name for file in _files(source)]}
    return key


def _benchmark_key(source: Source, corpus: Corpus) -> dict[str, Any]:
    """Its name too: rejected rows are reported under it."""
    content = source_fingerprint(source, offline=corpus.offline)
    names = [Path(file).stem for file in _files(source)]
    return {"content": content, "limit": source.limit, "names": names}


def _files(source: Source) -> list[str]:
    """Local files, as rows name them; none for the hub, where ids do not move."""
    if not is_local(source.path):
        return []
    if source.file:
        return [str(resolve(source.path) / PurePosixPath(source.file))]
    return [str(file) for file in find_files(source.path, source.split)]


def _local_files(corpus: Corpus) -> list[str]:
    return [file for source in corpus.sources for file in _files(source)]


def _verify(folder: Path, note: Callable[[str], None]) -> dict[str, Any] | None:
    """Meta of a sound store; None where there is none, a damaged one being renamed aside.

    The whole content is hashed: about 1 s for the 1.4 GB of ultrachat_200k, paid only by a command
    that is about to train, and a flipped bit would train on another token without a word.
    """
    if not os.path.lexists(folder):
        return None
    try:
        return open_sealed(folder)
    except StorageError as error:
        aside = folder.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        note(f"tokens: damaged store set aside, made again: {error}")
        return None


def _build(
    corpus: Corpus, tokenizer: ChatTokenizer, part: Path, note: Callable[[str], None]
) -> None:
    """Write the sides, the report and the rejected rows into `part`, a batch at a time."""
    report, began = Report(corpus.on_fault), time.monotonic()
    told = began
    with ExitStack() as stack:
        sides = [stack.enter_context(_Side(part, name)) for name in ("documents", "held_out")]
        for batch in _batches(read_corpus(corpus, tokenizer, report)):
            names = [f"row {d.id} of {d.source}" for d in batch]
            encoded = tokenizer.encode_dialogues([d.messages for d in batch], names)
            for dialogue, (ids, answer) in zip(batch, encoded, strict=True):
                side = is_held_out(dialogue.messages, corpus.holdout)
                if corpus.extra_end and not side:
                    ids, answer = np.append(ids, np.int32(tokenizer.eos_id)), np.append(answer, 0)
                sides[side].add(ids, answer)
            if time.monotonic() - told > NOTE_SECONDS:
                told = time.monotonic()
                note(_progress(sides, told - began))
    report.check()
    write_json(part / "report.json", report.as_dict())
    report.write_rejected(part / "rejected.jsonl")


def read_corpus(corpus: Corpus, tokenizer: ChatTokenizer, report: Report) -> Iterator[Dialogue]:
    """The dialogues that a store of this corpus holds, both sides, in its order.

    Raises: DataError as `iter_dialogues`.
    """
    against = corpus.decontaminate
    rule = DialogueRule(
        truecase=corpus.truecase,
        drop_refusals=corpus.drop_refusals,
        special_tokens=tokenizer.special_tokens,
        decontaminator=Decontaminator.load(against, offline=corpus.offline) if against else None,
        seed=corpus.seed,
    )
    return iter_dialogues(corpus.sources, rule, report, offline=corpus.offline)


def _batches(dialogues: Iterator[Dialogue]) -> Iterator[list[Dialogue]]:
    while batch := list(itertools.islice(dialogues, BATCH)):
        yield batch


def _progress(sides: Sequence[_Side], seconds: float) -> str:
    dialogues = sum(side.documents for side in sides)
    tokens = sum(side.tokens for side in sides)
    return f"tokenise: {dialogues:,} dialogues, {tokens:,} tokens, {dialogues / seconds:,.0f}/s"


class _Side:
    """Appends documents to the three files of one side."""

    def __init__(self, folder: Path, name: str) -> None:
        self.documents = self.tokens = 0
        self._ids, self._answer, self._offsets = (
            (folder / f"{name}.{kind}").open("wb") for kind in DTYPES
        )
        self._offsets.write(np.zeros(1, DTYPES["offsets"]).tobytes())

    def __enter__(self) -> _Side:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in (self._ids, self._answer, self._offsets):
            handle.close()

    def add(self, ids: np.ndarray, answer: np.ndarray) -> None:
        self.documents += 1
        self.tokens += len(ids)
        self._ids.write(ids.astype(DTYPES["ids"]).tobytes())
        self._answer.write(answer.astype(DTYPES["answer"]).tobytes())
        self._offsets.write(np.array([self.tokens], DTYPES["offsets"]).tobytes())


def _open(folder: Path, names: dict[str, str]) -> Tokens:
    """Map a store's sides. `names`: file as it was called when the store was made -> as it is now.

    A store made from files that lay elsewhere then reports as if it had been made from these.
    """
    report = read_json(folder / "report.json")
    report["files"] = {names.get(file, file): row for file, row in report["files"].items()}
    rejected = (folder / "rejected.jsonl").read_text(encoding="utf-8")
    if any(old != new for old, new in names.items()):
        rejected = "".join(_rename(line, names) for line in rejected.split("\n")[:-1])
    return Tokens(_map(folder, "documents"), _map(folder, "held_out"), report, rejected)


def _rename(line: str, names: dict[str, str]) -> str:
    row = json.loads(line)
    return _line(row | {"file": names.get(row["file"], row["file"])})


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _map(folder: Path, side: str) -> Documents | None:
    offsets = np.fromfile(folder / f"{side}.offsets", DTYPES["offsets"])
    if len(offsets) == 1:
        return None
    # Plain arrays over the map: np.memmap would hand its class on to what is computed from it.
    ids, answer = (
        np.asarray(np.memmap(folder / f"{side}.{kind}", DTYPES[kind], mode="r"))
        for kind in ("ids", "answer")
    )
    return Documents(ids=ids, answer=answer, offsets=offsets)
