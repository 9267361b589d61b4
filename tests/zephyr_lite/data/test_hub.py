"""Hub datasets: from the cache without a connection, and from a server that answers like it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from zephyr_lite.data import sources
from zephyr_lite.data.sources import Row, read_source, source_fingerprint
from zephyr_lite.errors import DataError, StorageError
from zephyr_lite.recipe import Source

GOOD = b'{"a": 1}\n'
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with the dataset owner/name in two revisions, laid out as huggingface_hub does:
    contents under blobs/, a folder of links to them for each commit, branches and tags in refs/.
    """
    root = tmp_path / "hub" / "datasets--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    for i, (ref, commit) in enumerate(COMMITS.items()):
        text = json.dumps([{"instruction": f"row {j} of {ref}"} for j in range(i + 2)])
        (root / "blobs" / (f"{i}" * 40)).write_text(text)
        (root / "refs" / ref).write_text(commit)
        (root / "snapshots" / commit / "eval").mkdir(parents=True)
        link = root / "snapshots" / commit / "eval" / "prompts.json"
        link.symlink_to(Path("../../../blobs", f"{i}" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root.parent))
    return root


def hub_file(revision: str | None = None, **changes: Any) -> Source:
    return Source(path="owner/name", file="eval/prompts.json", revision=revision, **changes)


def test_a_hub_file_from_the_cache(hub_cache: Path) -> None:
    rows = list(read_source(hub_file(), offline=True))
    place = "owner/name/eval/prompts.json"
    assert rows == [Row(place, 1, {"instruction": f"row {j} of main"}) for j in range(2)]
    for revision in ("v1", COMMITS["v1"]):
        pinned = list(read_source(hub_file(revision, limit=1), offline=True))
        assert pinned == [Row(place, 1, {"instruction": "row 0 of v1"})]


def test_a_hub_files_fingerprint_covers_file_revision_and_bytes(hub_cache: Path) -> None:
    def prints() -> list[str]:
        sources = (hub_file(), hub_file("v1"), hub_file(COMMITS["v1"]), hub_file(limit=1))
        return [source_fingerprint(source, offline=True) for source in sources]

    before = prints()
    assert before[0] == before[3]  # a limit is a field of the recipe, not of the data
    assert len(set(before)) == 3
    (hub_cache / "blobs" / ("0" * 40)).write_text('[{"instruction": "other"}]')
    after = prints()
    assert after[0] != before[0]
    assert after[1:3] == before[1:3]
    link = hub_cache / "snapshots" / COMMITS["v1"] / "eval" / "prompts.json"
    link.with_name("same.json").symlink_to(link.readlink())
    same = Source(path="owner/name", file="eval/same.json", revision="v1")
    assert source_fingerprint(same, offline=True) != after[1]


@pytest.mark.parametrize(
    "source",
    [
        hub_file("v2"),
        hub_file("c" * 40),
        Source(path="owner/name", file="gone.json"),
        Source(path="owner/other", file="prompts.json"),
    ],
)
def test_hub_files_that_are_not_in_the_cache(hub_cache: Path, source: Source) -> None:
    with pytest.raises(StorageError) as error:
        list(read_source(source, offline=True))
    assert str(error.value).startswith(f"hub dataset {source.path}/{source.file}")
    assert str(error.value).endswith(": not in the cache")
    assert error.value.hint == "run once without --offline"


def test_an_unsound_hub_file_is_refused_by_line(hub_cache: Path) -> None:
    (hub_cache / "blobs" / ("0" * 40)).write_text('[{"a": 1},\n {"a": NaN}]')
    with pytest.raises(DataError, match=r"prompts\.json:2: NaN is not JSON"):
        list(read_source(hub_file(), offline=True))
    (hub_cache / "blobs" / ("0" * 40)).unlink()
    with pytest.raises((DataError, StorageError), match=r"prompts\.json: (a link|not in)"):
        list(read_source(hub_file(), offline=True))


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as answers for one file, and says what is missing as the hub does."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def _answer(self) -> bytes:
        missing = {"other/": "RepoNotFound", "/v2/": "RevisionNotFound", "gone": "EntryNotFound"}
        reason = next((code for part, code in missing.items() if part in self.path), None)
        body = b"" if reason else GOOD
        self.send_response(400 if "broken" in self.path else 404 if reason else 200)
        self.send_header("X-Error-Code", reason or "")
        self.send_header("X-Repo-Commit", "d" * 40)
        self.send_header("ETag", f'"{"e" * 40}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


FETCH_SCRIPT = """
from zephyr_lite.data.sources import read_source, source_fingerprint
from zephyr_lite.errors import ZephyrError
from zephyr_lite.recipe import Source
fetched = Source(path="owner/name", file="a.jsonl", revision="v1")
print([tuple(row) for row in read_source(fetched)])
print([tuple(row) for row in read_source(fetched, offline=True)])
for path, file, revision in (
    ("owner/other", "a.jsonl", None),
    ("owner/name", "a.jsonl", "v2"),
    ("owner/name", "gone.jsonl", None),
    ("owner/name", "broken.jsonl", None),
):
    try:
        list(read_source(Source(path=path, file=file, revision=revision)))
    except ZephyrError as error:
        print(error.exit_code, str(error).split(": ")[0], "| hint:", error.hint)
"""


def test_a_hub_file_is_fetched_and_what_is_missing_is_named(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its switches when it is imported."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        run = run_script(
            FETCH_SCRIPT,
            tmp_path,
            HF_HUB_OFFLINE="0",
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            NO_PROXY="127.0.0.1",
            no_proxy="127.0.0.1",
        )
        server.shutdown()
    rows = str([("owner/name/a.jsonl", 1, {"a": 1})])
    assert run[:2] == [rows, rows]
    spelling = "check the spelling; a gated dataset needs `hf auth login`"
    assert run[2:5] == [
        f"2 hub dataset owner/other/a.jsonl | hint: {spelling}",
        f"2 hub dataset owner/name/a.jsonl at v2 | hint: {spelling}",
        f"2 hub dataset owner/name/gone.jsonl | hint: {spelling}",
    ]
    assert run[5].startswith("5 hub dataset owner/name/broken.jsonl | hint: check the connection")


def run_script(script: str, folder: Path, **environment: str) -> list[str]:
    """Lines that a Python script prints, with a Hugging Face cache of its own."""
    variables = os.environ | {"HF_HOME": str(folder / "hf"), **environment}
    variables["PYTHONPATH"] = str(Path(sources.__file__).parents[2])
    command = [sys.executable, "-c", script, str(folder)]
    run = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


HUB_SCRIPT = """
import os, shutil, sys
from pathlib import Path
import datasets
root = Path(sys.argv[1])
built = datasets.load_dataset_builder("json", data_files={"train_sft": str(root / "x.jsonl")})
built.download_and_prepare()
cached = root / "hf/datasets/owner___name/default/0.0.0" / ("0123456789" * 4)
shutil.copytree(built.cache_dir, cached)
(cached / "json-train_sft.arrow").rename(cached / "name-train_sft.arrow")
refs = root / "hf/hub/datasets--owner--name/refs"
refs.mkdir(parents=True)
(refs / "v1").write_text("0123456789" * 4)
from zephyr_lite.data.sources import fingerprint, read_rows, read_source, source_fingerprint
from zephyr_lite.errors import ZephyrError
from zephyr_lite.recipe import Source
print([tuple(row) for row in read_rows("owner/name", "train_sft[:2]", offline=True)])
print(len(fingerprint("owner/name", "train_sft", offline=True)))
print(fingerprint("owner/name", "train_sft") == fingerprint("owner/name", "train_sft"))
prints = set()
for revision in (None, "v1", "0123456789" * 4):
    pinned = Source(path="owner/name", split="train_sft[:2]", revision=revision)
    print(len(list(read_source(pinned, offline=True))))
    prints.add(source_fingerprint(pinned, offline=True))
print(len(prints))
for name, split, revision in (
    ("owner/name", "nosplit", None),
    ("owner/name", None, None),
    ("owner/other", "train", None),
    ("owner/name", "train_sft", "v2"),
    ("owner/name", "train_sft", "c" * 40),
):
    try:
        list(read_rows(name, split, revision=revision, offline=True))
    except ZephyrError as error:
        print(error.exit_code, error, "| hint:", error.hint)
"""


def test_hub_datasets_from_the_cache_without_a_connection(tmp_path: Path) -> None:
    """A real cached dataset; `datasets` too reads its switches when it is imported."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    run = run_script(HUB_SCRIPT, tmp_path, HF_HUB_OFFLINE="1")
    rows, length, stable, *pinned, count = run[:7]
    errors = run[7:]
    place = "owner/name:train_sft[:2]"
    assert rows == str([(place, 1, {"text": "a"}), (place, 2, {"text": "b"})])
    assert (length, stable) == ("64", "True")
    assert errors[0].startswith("2 hub dataset owner/name: Unknown split")
    assert errors[1].startswith("2 hub dataset owner/name needs a split")
    assert errors[2].startswith("5 hub dataset owner/other: ")
    assert errors[2].endswith("hint: run once without --offline")
    assert (pinned, count) == (["2", "2", "2"], "3")
    assert errors[3].startswith("5 hub dataset owner/name: the cache does not know revision v2")
    # `datasets` would hand out the newest copy of its cache, whatever its commit.
    assert errors[4].startswith("5 hub dataset owner/name: the cache holds 0123456789")
