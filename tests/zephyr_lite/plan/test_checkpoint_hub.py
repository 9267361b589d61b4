"""Sizes of a base from a server that answers as the hub does; its tensors are never fetched."""

from __future__ import annotations

import dataclasses
import json
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants, hf_api
from safetensors.torch import load_file, save_file

from zephyr_lite.errors import MachineError, RecipeError
from zephyr_lite.plan.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from zephyr_lite.recipe import Base


class Hub(BaseHTTPRequestHandler):
    """OWNER/NAME is a folder of that name; ranges are answered, and counted."""

    root: Path
    fetched: dict[str, int]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        body = self._answer()
        self.fetched[self.path] = self.fetched.get(self.path, 0) + len(body)
        self.wfile.write(body)

    def _answer(self) -> bytes:
        folder, _, name = self.path.lstrip("/").partition("/resolve/main/")
        file = self.root / folder / name
        reason = None if file.is_file() else "EntryNotFound"
        if not (self.root / folder).is_dir():
            reason = "RepoNotFound"
        body, range_ = b"" if reason else file.read_bytes(), self.headers.get("Range")
        if range_ and not reason:
            first, last = range_.removeprefix("bytes=").split("-")
            body = body[int(first) : int(last or len(body)) + 1]
        self.send_response(404 if reason else 206 if range_ else 200)
        self.send_header("X-Error-Code", reason or "")
        self.send_header("X-Repo-Commit", "d" * 40)
        self.send_header("ETag", f'"{zlib.crc32(self.path.encode()):040x}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_: Any) -> None:
        """Stay silent."""


@pytest.fixture
def hub(
    tiny_mistral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, int]]:
    """A hub with one model, whole and in shards: bytes that are fetched from it, by path."""
    tensors, root = load_file(tiny_mistral / "model.safetensors"), tmp_path / "hub" / "owner"
    for name in ("tiny", "sharded", "pickled"):
        (root / name).mkdir(parents=True)
        (root / name / "config.json").write_bytes((tiny_mistral / "config.json").read_bytes())
    save_file(tensors, root / "tiny" / "model.safetensors")
    placed = {}
    for i, name in enumerate(sorted(tensors)):
        placed[name] = f"part-{i % 2}.safetensors"
    for file in set(placed.values()):
        members = {n: tensors[n] for n in placed if placed[n] == file}
        save_file(members, root / "sharded" / file)
    index = {"weight_map": placed}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    fetched: dict[str, int] = {}
    handler = type("Handler", (Hub,), {"root": root.parent, "fetched": fetched})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(variable, "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hf_api.api, "endpoint", address)
        close_session()  # it remembers how it may connect
        yield fetched
        close_session()
        server.shutdown()


def _find(name: str) -> Checkpoint:
    return find_checkpoint(Base.model_validate({"model": name}))


def test_headers_are_enough(hub: dict[str, int], tiny_mistral: Path):
    local = read_checkpoint(tiny_mistral, Base.model_validate({"model": "owner/tiny"}))
    for name in ("owner/tiny", "owner/sharded"):
        found = _find(name)
        assert found == dataclasses.replace(local, source="headers of its files on the hub")
    whole = (tiny_mistral / "model.safetensors").stat().st_size
    assert 0 < hub["/owner/tiny/resolve/main/model.safetensors"] <= 100_001 < whole


def test_what_the_hub_does_not_have_is_named(hub: dict[str, int]):
    with pytest.raises(RecipeError, match="owner/other: the hub has no such repository"):
        _find("owner/other")
    with pytest.raises(RecipeError, match=r"owner/pickled has no sound \.safetensors file"):
        _find("owner/pickled")


def test_a_hub_that_does_not_answer_is_not_a_wrong_name(monkeypatch: pytest.MonkeyPatch):
    """The client's error for that is one for a missing file."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="not in the local cache, and the hub cannot be reached"):
        _find("owner/tiny")
