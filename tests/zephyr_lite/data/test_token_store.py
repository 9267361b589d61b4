"""The token store: the tokens of memory, made once, whole or not at all, in little memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zephyr_lite.data import token_store
from zephyr_lite.data.chat import ChatTokenizer, load_tokenizer
from zephyr_lite.data.dialogues import load_dialogues
from zephyr_lite.data.layout import Documents, join_documents
from zephyr_lite.data.sources import PACKAGED_DATA
from zephyr_lite.data.split import hold_out
from zephyr_lite.data.token_store import Corpus, Tokens, open_tokens, token_key
from zephyr_lite.errors import DataError
from zephyr_lite.recipe import Source
from zephyr_lite.stopping import Interrupted
from zephyr_lite.storage import digest


def dialogue(number: int, answer: str = "It plays the harp.") -> dict[str, Any]:
    question = f"What does animal {number} play {'very ' * (number % 5)}well?"
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"d{number}", "messages": pair * (1 + number % 3)}


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def source(file: Path, **fields: Any) -> Source:
    return Source.model_validate({"path": str(file)} | fields)


def save_tokenizer(folder: Path, change: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """The built-in example's tokenizer as a model folder."""
    content = json.loads((PACKAGED_DATA / "tokenizer.json").read_text())
    if change:
        change(content)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """1,100 dialogues, more than two batches, and two rows that are dropped."""
    rows = [dialogue(n) for n in range(1100)]
    rows[3], rows[700] = dialogue(3, answer=" "), dialogue(700, answer="a </s> b")
    return Corpus([source(write(tmp_path / "data" / "d.jsonl", rows))], on_fault="drop")


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, tokenizer: ChatTokenizer, notes: list[str]) -> Callable[..., Tokens]:
    """`store(corpus)` opens it in this test's cache."""

    def opened(corpus: Corpus, root: str = "tokens") -> Tokens:
        return open_tokens(corpus, tokenizer, tmp_path / root, notes.append)

    return opened


def folders(tmp_path: Path, root: str = "tokens") -> list[Path]:
    """Finished stores, and whatever else lies beside them but locks."""
    return [p for p in (tmp_path / root).iterdir() if p.suffix != ".lock"]


def assert_same(found: Documents | None, expected: Documents) -> None:
    assert found is not None
    for name in ("ids", "answer", "offsets"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b), name


# --- what is in it ---


@pytest.mark.parametrize("extra_end", [False, True])
def test_the_tokens_are_those_of_everything_in_memory(corpus, store, tokenizer, extra_end) -> None:
    tokens = store(replace(corpus, holdout=0.2, extra_end=extra_end))
    every, report = load_dialogues(
        corpus.sources, on_fault="drop", special_tokens=tokenizer.special_tokens
    )
    train, held_out = (
        tokenizer.encode_dialogues([d.messages for d in side])
        for side in hold_out(every, 0.2, lambda d: d.messages)
    )
    assert len(held_out) > 100
    if extra_end:
        train = [(np.append(ids, tokenizer.eos_id), np.append(mask, False)) for ids, mask in train]
    assert_same(tokens.documents, join_documents(train))
    assert_same(tokens.held_out, join_documents(held_out))
    assert tokens.report == report.as_dict()
    rejected = [json.loads(line) for line in tokens.rejected.splitlines()]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (4, "empty_answer"),
        (701, "special_token_text"),
    ]


def test_a_side_without_a_dialogue_is_none(tmp_path: Path, store) -> None:
    rows = [dialogue(1, answer="")]
    empty = Corpus([source(write(tmp_path / "data" / "e.jsonl", rows))], on_fault="drop")
    tokens = store(empty)
    assert tokens.documents is None
    assert tokens.held_out is None
    assert tokens.report["dropped"] == {"empty_answer": 1}


# --- when it is made ---


def test_the_second_time_nothing_is_read(corpus, store, monkeypatch) -> None:
    first = store(corpus)

    def refuse(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("the dialogues were read again")

    monkeypatch.setattr(token_store, "iter_dialogues", refuse)
    second = store(corpus)
    assert_same(second.documents, first.documents)
    assert (second.report, second.rejected) == (first.report, first.rejected)


def other_source(corpus: Corpus, **fields: Any) -> Corpus:
    return replace(corpus, sources=[source(Path(corpus.sources[0].path), **fields)])


def against(corpus: Corpus, text: str = "one two", name: str = "b.jsonl", **fields: Any) -> Corpus:
    file = write(Path(corpus.sources[0].path).parent / name, [{"prompt": text}] * 2)
    return replace(corpus, decontaminate=[source(file, **fields)])


def append_row(corpus: Corpus) -> Corpus:
    with Path(corpus.sources[0].path).open("a") as handle:
        handle.write(json.dumps(dialogue(5000)) + "\n")
    return corpus


MISSES: dict[str, tuple[Callable[[Corpus], Corpus], Callable[[Corpus], Corpus]]] = {
    # name: (how it was, how it is now)
    "a row more": (lambda c: c, append_row),
    "limit": (lambda c: c, lambda c: other_source(c, limit=50)),
    "weight": (lambda c: c, lambda c: other_source(c, weight=2)),
    "a source twice": (lambda c: c, lambda c: replace(c, sources=[*c.sources, *c.sources])),
    "drawn by another seed": (
        lambda c: other_source(c, weight=0.5),
        lambda c: replace(other_source(c, weight=0.5), seed=1),
    ),
    "truecase": (lambda c: c, lambda c: replace(c, truecase=True)),
    "refusals": (lambda c: c, lambda c: replace(c, drop_refusals=True)),
    "decontaminate": (lambda c: c, against),
    "another benchmark": (against, lambda c: against(c, "three four")),
    "benchmark's limit": (against, lambda c: against(c, limit=1)),
    "benchmark's name": (against, lambda c: against(c, name="other.jsonl")),
    "on_fault": (lambda c: c, lambda c: replace(c, on_fault="stop")),
    "holdout": (lambda c: c, lambda c: replace(c, holdout=0.1)),
    "holdout's size": (
        lambda c: replace(c, holdout=0.2),
        lambda c: replace(c, holdout=0.1),
    ),
    "extra_end": (lambda c: c, lambda c: replace(c, extra_end=True)),
}


@pytest.mark.parametrize("change", MISSES)
def test_what_changes_the_tokens_misses(corpus, tokenizer, change) -> None:
    before, after = MISSES[change]
    was = digest(token_key(before(corpus), tokenizer))
    assert digest(token_key(after(corpus), tokenizer)) != was


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model"]["merges"].pop(),
        lambda t: t["normalizer"]["normalizers"].pop(0),
        lambda t: t["added_tokens"][1].update(lstrip=True),
    ],
    ids=["a merge less", "no space before the text", "a greedy control token"],
)
def test_another_tokenizer_misses(corpus, tokenizer, tmp_path, change) -> None:
    other = load_tokenizer(save_tokenizer(tmp_path / "other", change))
    assert token_key(corpus, other) != token_key(corpus, tokenizer)


def test_another_template_format_or_bos_misses(corpus, tokenizer, tmp_path, monkeypatch) -> None:
    was = token_key(corpus, tokenizer)
    folder = save_tokenizer(tmp_path / "other")
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert token_key(corpus, load_tokenizer(folder)) != was
    for name, value in (("VERSION", 0), ("template_hash", lambda: "another")):
        with monkeypatch.context() as patch:
            patch.setattr(token_store, name, value)
            assert token_key(corpus, tokenizer) != was


def test_what_changes_no_token_hits(corpus, tokenizer, tmp_path) -> None:
    was = token_key(corpus, tokenizer)
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    shutil.copyfile(corpus.sources[0].path, moved)

    def pad(content: dict[str, Any]) -> None:
        content["padding"] = {
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<unk>",
        }

    folder = save_tokenizer(tmp_path / "padded", pad)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"model_max_length": 5, "chat_template": "{{ x }}", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    spaced = save_tokenizer(tmp_path / "spaced")
    text = (spaced / "tokenizer.json").read_text()
    (spaced / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=3))
    keys = {
        "moved": token_key(replace(corpus, sources=[source(moved)]), tokenizer),
        "split of a file": token_key(other_source(corpus, split="train"), tokenizer),
        "seed": token_key(replace(corpus, seed=1), tokenizer),
        "offline": token_key(replace(corpus, offline=True), tokenizer),
        "tokenizer saved with padding": token_key(corpus, load_tokenizer(folder)),
        "tokenizer spaced otherwise": token_key(corpus, load_tokenizer(spaced)),
    }
    assert {name: key == was for name, key in keys.items()} == dict.fromkeys(keys, True)


def test_a_hit_from_elsewhere_reports_as_a_first_build_there(corpus, store, tmp_path) -> None:
    store(corpus)
    file = Path(corpus.sources[0].path)
    shutil.move(file, tmp_path / "moved.jsonl")
    moved = replace(corpus, sources=[source(tmp_path / "moved.jsonl")])
    hit, built = store(moved), store(moved, root="fresh")
    assert len(folders(tmp_path)) == 1
    assert (hit.report, hit.rejected) == (built.report, built.rejected)
    assert str(tmp_path / "moved.jsonl") in hit.report["files"]
    assert str(file) not in hit.rejected


# --- whole or not at all ---


@pytest.mark.parametrize("error", [Interrupted(2), RuntimeError("boom")], ids=["signal", "bug"])
def test_what_is_stopped_in_the_middle_leaves_nothing(
    corpus, store, tokenizer, tmp_path, monkeypatch, error
) -> None:
    calls = []
    encode = tokenizer.encode_dialogues

    def stop(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise error
        return encode(*arguments)

    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(tokenizer, "encode_dialogues", stop)
        store(corpus)
    assert len(calls) == 2
    assert folders(tmp_path) == []
    assert_same(store(corpus).documents, store(corpus, root="fresh").documents)


def test_a_faulty_row_stops_with_its_place_and_leaves_nothing(corpus, store, tmp_path) -> None:
    with pytest.raises(DataError, match=r"d\.jsonl:4: empty_answer"):
        store(replace(corpus, on_fault="stop"))
    assert folders(tmp_path) == []


def test_what_a_killed_build_left_is_swept(corpus, store, tokenizer, tmp_path) -> None:
    name = digest(token_key(corpus, tokenizer))[:32]
    left = tmp_path / "tokens" / f".{name}.abc.part"
    left.mkdir(parents=True)
    (left / "documents.ids").write_bytes(b"half")
    store(corpus)
    assert folders(tmp_path) == [tmp_path / "tokens" / name]


@pytest.mark.parametrize("file", ["documents.ids", "documents.offsets", "report.json"])
def test_a_damaged_store_is_set_aside_and_made_again(corpus, store, tmp_path, notes, file) -> None:
    sound = store(corpus)
    (folder,) = folders(tmp_path)
    expected = [np.array(sound.documents.ids), sound.report, sound.rejected]
    for _ in range(2):  # the second time, there is an older one aside
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 4
        (folder / file).unlink()  # the open map keeps the sound bytes
        (folder / file).write_bytes(content)
        again = store(corpus)
        assert np.array_equal(again.documents.ids, expected[0])
        assert [again.report, again.rejected] == expected[1:]
        assert file in notes.pop()
        assert notes == []
        assert sorted(p.suffix for p in folders(tmp_path)) == ["", ".damaged"]


# --- in little memory ---

MEMORY = """
import json, re, sys, threading
from pathlib import Path
from zephyr_lite.data.chat import load_tokenizer
from zephyr_lite.data.dialogues import load_dialogues
from zephyr_lite.data.layout import join_documents, pack_masked
from zephyr_lite.data.token_store import Corpus, open_tokens
from zephyr_lite.recipe import Source

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

how, file, tokenizer, root = sys.argv[1:]
sources, chat = [Source(path=file)], load_tokenizer(Path(tokenizer))
before, peak, over = anonymous(), [0.0], threading.Event()

def watch():
    while not over.wait(0.002):
        peak[0] = max(peak[0], anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
if how == "store":
    documents = open_tokens(Corpus(sources), chat, Path(root), print).documents
else:
    dialogues, _ = load_dialogues(sources)
    encoded = chat.encode_dialogues([d.messages for d in dialogues])
    documents = join_documents(encoded)
rows = pack_masked(documents, 2048)
over.set()
watcher.join()
print(json.dumps([len(documents), int(documents.offsets[-1]), len(rows), peak[0] - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_dialogues(tmp_path: Path) -> None:
    """8,000 dialogues through the store, and all of them in memory, in MiB above the imports."""
    file = write(tmp_path / "many.jsonl", [dialogue(n % 500, "word " * 60) for n in range(8_000)])
    folder = save_tokenizer(tmp_path / "tokenizer")

    def measure(how: str) -> list[float]:
        command = [sys.executable, "-c", MEMORY, how, str(file), str(folder), str(tmp_path / "t")]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)

    *counts, through = measure("store")
    *same, in_memory = measure("memory")
    assert counts == same
    assert counts[0] == 8_000
    # Seen: 6 MiB through the store, 58 in memory.
    assert in_memory > 40, "the comparison has become too small to say anything"
    assert through < 12
