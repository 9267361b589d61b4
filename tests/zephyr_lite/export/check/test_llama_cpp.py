"""The wrapper around llama.cpp: known text, exact probabilities, honest stop reasons."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE, render
from zephyr_lite.errors import MachineError, StorageError
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.weights.fold import FoldedModel


@pytest.fixture(scope="module")
def running(
    plain_base: Path,
    tokenizer_folder: Path,
    write_gguf: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LlamaCppModel]:
    pytest.importorskip("xllamacpp")
    out = tmp_path_factory.mktemp("gguf") / "m.gguf"
    model = FoldedModel(plain_base, None)
    write_gguf(model, tokenizer_folder, ZEPHYR_TEMPLATE, out, "f32")
    with LlamaCppModel(out, n_ctx=256, exact=True, threads=1) as running:
        yield running


def test_the_golden_story(
    shared_data: Path, write_gguf: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    golden = json.loads((shared_data / "models/stories260k/golden.json").read_text())
    folder = shared_data / "models/stories260k-mistral"
    out = tmp_path / "x.gguf"
    write_gguf(FoldedModel(folder, None), folder, ZEPHYR_TEMPLATE, out, "f32")
    ids = golden["greedy_token_ids"]
    with LlamaCppModel(out, n_ctx=256, exact=True, threads=1) as model:
        text, reason = model.generate([1], len(ids) - 1)
        assert model.greedy([1], len(ids) - 1) == ids[1:]
    assert text.strip() == golden["greedy_from_bos_200_tokens"]
    assert reason == "length"


def test_rows_are_distributions_and_do_not_depend_on_how_they_were_asked_for(
    running: LlamaCppModel,
) -> None:
    # Halves of a character, </s>, NUL and a piece that is never used: each breaks a request in two.
    halves, nul, unused = [3 + 0xE6, 3 + 0xBC], 3, 511
    prompt, continuation = [1, 300, 301], [290, *halves, 2, 310, 2, 2, 0, 1, nul, 305, unused, 300]
    rows = running.log_probs_along(prompt, continuation)
    assert rows.shape == (13, 512)
    assert rows.dtype == torch.float32
    assert torch.allclose(rows.exp().sum(dim=1), torch.ones(13), atol=1e-4)
    for i in range(13):
        alone = running.log_probs(prompt + continuation[:i])
        assert (alone - rows[i]).abs().max() < 1e-4
    assert running.log_probs_along(prompt, []).shape == (0, 512)


def test_long_requests_are_cut(running: LlamaCppModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = running.log_probs_along([1], list(range(290, 310)))
    monkeypatch.setattr("zephyr_lite.export.check.llama_cpp.ROWS_LIMIT", 3 * 512)
    assert (running.log_probs_along([1], list(range(290, 310))) - whole).abs().max() < 1e-4


def test_stop_reasons(running: LlamaCppModel) -> None:
    assert running.eos == 2
    assert running.stops_at(2)
    assert not running.stops_at(300)
    messages = [{"role": "user", "content": "once upon a time"}]
    text, reason = running.generate(messages, 5)
    assert reason == "length"
    assert text == running.generate(running.tokenize(render(messages, True)), 5)[0]
    again = [running.generate([1], 20, temperature=1.0, seed=seed)[0] for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_the_server_is_local_and_locked(running: LlamaCppModel) -> None:
    address = running._server.listening_address.removeprefix("http://")
    assert address.startswith("127.0.0.1:")
    connection = http.client.HTTPConnection(address)
    connection.request("POST", "/tokenize", json.dumps({"content": "a"}))
    assert connection.getresponse().status == 401


def test_limits_and_misuse(running: LlamaCppModel, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="exceed n_ctx 256"):
        running.generate([1] * 250, 10)
    with pytest.raises(MachineError, match="refused /completion"):
        running.generate([600], 1)
    with pytest.raises(StorageError, match="does not exist"), LlamaCppModel(tmp_path / "no.gguf"):
        pass
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(StorageError, match="cannot load"), LlamaCppModel(tmp_path / "bad.gguf"):
        pass


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MachineError) as caught:
        LlamaCppModel(Path("x.gguf"))
    assert caught.value.hint == "pip install 'zephyr-lite[llama]'"
