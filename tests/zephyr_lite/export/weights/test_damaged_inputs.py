"""Wrong and damaged inputs: named by file and tensor or field, exit code 2, nothing written.

Every case spoils one thing of an export that is otherwise sound, and goes the whole way that an
export of somebody's adapter goes: adapters, model, tokenizer, one pass over all files.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.folders.sharded import MergedTarget
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.quants.quantise import routes
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.adapter import EMBEDDING
from zephyr_lite.export.weights.base_weights import BaseWeights
from zephyr_lite.export.weights.fold import FoldedModel
from zephyr_lite.export.weights.foreign import find_chat, read_foreign
from zephyr_lite.export.weights.same_base import same_architecture

PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q0}.lora_A.weight", f"{PREFIX}{Q0}.lora_B.weight"
NORM = "model.norm.weight"
Tensors = dict[str, torch.Tensor]
Spoil = Callable[[Path], Any]


def export(base: Path, adapters: list[Path], out: Path, original: Path | None = None) -> None:
    """What the stage does, but for verification."""
    read_foreign(adapters, str(base))
    model = FoldedModel(original or base, adapters)
    if original is not None:
        same_architecture(model.base, BaseWeights(base))
    tokenizer = find_chat(adapters, base, model.shape(EMBEDDING)[0]).tokenizer
    chat, merged = (model, tokenizer, ZEPHYR_TEMPLATE), out / "merged"
    gguf = GgufTarget(*chat, out / "x.gguf", "q8_0", name="x", identity="i", routes=routes("torch"))
    targets = [gguf, MergedTarget(*chat, merged, identity="i")]
    stream(model, targets)
    for target in targets:
        target.commit()


@pytest.fixture
def plain(plain_base: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A sound base that a test may spoil: fp32, two shards and an index, and a tokenizer."""
    return with_tokenizer(plain_base, tokenizer_folder, tmp_path / "base")


@pytest.fixture
def nf4(nf4_base: Path, tokenizer_folder: Path, tmp_path: Path) -> Path:
    """The same in NF4, in one file."""
    return with_tokenizer(nf4_base, tokenizer_folder, tmp_path / "nf4")


@pytest.fixture
def own(adapter: Path, tmp_path: Path) -> Path:
    """A sound adapter for either that a test may spoil."""
    return Path(shutil.copytree(adapter, tmp_path / "adapter"))


def with_tokenizer(base: Path, tokenizer: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return Path(shutil.copytree(tokenizer, folder, dirs_exist_ok=True))


def config(name: str, **fields: Any) -> Spoil:
    """Set fields of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return spoil


def tensors(change: Callable[[Tensors], Any]) -> Spoil:
    """Change the tensors of the folder's last safetensors file."""

    def spoil(folder: Path) -> None:
        path = sorted(folder.glob("*.safetensors"))[-1]
        stored = load_file(path)
        change(stored)
        save_file(stored, path, metadata={"format": "pt"})

    return spoil


def shard(number: int) -> str:
    return f"model-{number:05d}-of-00002.safetensors"


def cut(name: str, keep: Callable[[bytes], bytes]) -> Spoil:
    return lambda folder: (folder / name).write_bytes(keep((folder / name).read_bytes()))


def index(change: Callable[[dict[str, str]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        stored = json.loads(path.read_text())
        change(stored["weight_map"])
        path.write_text(json.dumps(stored))

    return spoil


def pickled(name: str, other: str) -> Spoil:
    return lambda folder: (folder / name).rename(folder / other)


def leave_shard_out(weight_map: dict[str, str]) -> None:
    for key in [key for key, file in weight_map.items() if file == shard(2)]:
        del weight_map[key]


def grow_tokenizer(folder: Path) -> None:
    """Two special tokens that the model has no rows for, as a trainer adds them."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab |= {f"more {i}": i for i in range(len(vocab), 514)}
    path.write_text(json.dumps(spec))


def garble_header(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    return data[:8] + b"{" * length + data[8 + length :]


BASE: dict[str, tuple[Spoil, str]] = {
    "missing shard": (lambda f: (f / shard(1)).unlink(), f"{shard(1)}: is missing"),
    "truncated shard": (cut(shard(2), lambda b: b[:-64]), f"{shard(2)}: cannot be read"),
    "corrupt header": (cut(shard(1), garble_header), f"{shard(1)}: cannot be read"),
    "empty shard": (cut(shard(1), lambda _: b""), f"{shard(1)}: cannot be read"),
    "shard not in index": (index(leave_shard_out), f"index.json: does not name {shard(2)}"),
    "index names outside": (
        index(lambda m: m.update({NORM: "../../etc/passwd"})),
        "index.json: names a file outside its folder",
    ),
    "index names what is not there": (
        index(lambda m: m.update({"model.layers.9.x.weight": shard(1)})),
        f"{shard(1)}: tensor model.layers.9.x.weight is missing",
    ),
    "damaged index": (
        cut("model.safetensors.index.json", lambda b: b[:40]),
        "index.json: cannot be read as JSON",
    ),
    "index without files": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        "index.json: is missing",
    ),
    "tensor twice": (
        lambda f: save_file(load_file(f / shard(1)) | {NORM: torch.ones(256)}, f / shard(1)),
        "model.norm.weight is also in",
    ),
    "missing config": (lambda f: (f / "config.json").unlink(), "config.json: is missing"),
    "damaged config": (cut("config.json", lambda b: b[:-9]), "config.json: cannot be read as JSON"),
    "config is a list": (cut("config.json", lambda _: b"[]"), "config.json: is not a JSON object"),
    "auto_map": (config("config.json", auto_map={"AutoModel": "x.Y"}), "config.json: auto_map"),
    "gptq": (
        config("config.json", quantization_config={"quant_method": "gptq"}),
        "config.json: gptq checkpoints",
    ),
    "bnb 8-bit": (
        config("config.json", quantization_config={"load_in_8bit": True}),
        "config.json: bitsandbytes 8-bit checkpoints",
    ),
    "integer tensor": (
        tensors(lambda t: t.update({NORM: torch.ones(256, dtype=torch.int8)})),
        f"{shard(2)}: tensor {NORM} has dtype I8",
    ),
    "tied head conflict": (
        config("config.json", tie_word_embeddings=True),
        "ties lm_head.weight to the embedding and holds it too",
    ),
    "missing tokenizer": (
        lambda f: (f / "tokenizer.json").unlink(),
        "has no tokenizer.json",
    ),
    "damaged tokenizer": (
        cut("tokenizer.json", lambda b: b[: len(b) // 2]),
        "tokenizer.json: cannot be read as JSON",
    ),
    "tokenizer beyond the embedding": (grow_tokenizer, "tokenizer.json: has 2 tokens beyond"),
}
ADAPTER: dict[str, tuple[Spoil, str]] = {
    "other rank": (config("adapter_config.json", r=4), r"lora_A.weight: shapes .* the rank 4"),
    "missing B": (tensors(lambda t: t.pop(B)), "q_proj.lora_A.weight: its B is missing"),
    "extra tensor": (
        tensors(lambda t: t.update({f"{PREFIX}{Q0}.scale": torch.ones(1)})),
        "1 adapter tensors fit nothing in the base, first .*q_proj.scale",
    ),
    "truncated": (
        tensors(lambda t: [t.pop(k) for k in list(t) if "layers.1" in k]),
        "targets model.layers.1",
    ),
    "empty": (tensors(lambda t: t.clear()), "holds no tensors"),
    "DoRA": (config("adapter_config.json", use_dora=True), "adapter_config.json: use_dora"),
    "bias": (config("adapter_config.json", bias="all"), "adapter_config.json: bias"),
    "lora_bias": (config("adapter_config.json", lora_bias=True), "adapter_config.json: lora_bias"),
    "pissa": (
        config("adapter_config.json", init_lora_weights="pissa"),
        "init_lora_weights: 'pissa' moved the base",
    ),
    "Inf": (
        tensors(lambda t: t[B][3, :1].fill_(float("inf"))),
        "adapter_model.safetensors: tensor .*q_proj.lora_B.weight holds NaN or infinite",
    ),
    "another architecture": (
        tensors(lambda t: [t.update({k.replace("layers", "h"): t.pop(k)}) for k in list(t)]),
        r"tensor base_model.model.model.h.* the base has no model.h",
    ),
    "integer factors": (
        tensors(lambda t: t.update({A: t[A].to(torch.int32)})),
        "q_proj.lora_A.weight has dtype I32",
    ),
    "pickle": (
        pickled("adapter_model.safetensors", "adapter_model.bin"),
        "has no adapter_model.safetensors .*is a pickle",
    ),
    "corrupt header": (
        cut("adapter_model.safetensors", garble_header),
        "adapter_model.safetensors: cannot be read",
    ),
    "missing config": (
        lambda f: (f / "adapter_config.json").unlink(),
        "has no adapter_config.json",
    ),
    "damaged config": (
        cut("adapter_config.json", lambda b: b[:-5]),
        "adapter_config.json: cannot be read as JSON",
    ),
    "config without r": (
        cut("adapter_config.json", lambda _: b'{"peft_type": "LORA", "lora_alpha": 3}'),
        r"adapter_config.json: lacks \['r'\]",
    ),
}
PACKED: dict[str, tuple[Spoil, str]] = {
    "absmax missing": (tensors(lambda t: t.pop(f"{Q0}.weight.absmax")), f"{Q0}.weight.absmax"),
    "absmax cut": (
        tensors(lambda t: t.update({f"{Q0}.weight.absmax": t[f"{Q0}.weight.absmax"][1:]})),
        f"{Q0}.weight.absmax is U8",
    ),
    "codes cut": (
        tensors(lambda t: t.update({f"{Q0}.weight": t[f"{Q0}.weight"][1:].clone()})),
        f"tensor {Q0}.weight is U8",
    ),
    "state missing": (
        tensors(lambda t: t.pop(f"{Q0}.weight.quant_state.bitsandbytes__nf4")),
        f"tensor {Q0}.weight has dtype U8",
    ),
}


def refused(message: str, base: Path, adapters: list[Path], out: Path, **more: Any) -> None:
    with pytest.raises((DataError, RecipeError), match=message) as caught:
        export(base, adapters, out, **more)
    assert caught.value.exit_code == 2
    assert not out.exists()


def test_what_is_sound_is_exported(plain: Path, nf4: Path, own: Path, tmp_path: Path) -> None:
    for base, original in ((plain, None), (nf4, None), (nf4, plain)):
        out = tmp_path / "out"
        export(base, [own], out, original)
        assert {path.name for path in out.iterdir()} == {"x.gguf", "merged"}
        shutil.rmtree(out)


@pytest.mark.parametrize("case", BASE)
def test_damaged_bases(case: str, plain: Path, own: Path, tmp_path: Path) -> None:
    spoil, message = BASE[case]
    spoil(plain)
    refused(message, plain, [own], tmp_path / "out")


@pytest.mark.parametrize("case", ADAPTER)
def test_damaged_adapters(case: str, plain: Path, own: Path, tmp_path: Path) -> None:
    spoil, message = ADAPTER[case]
    spoil(own)
    refused(message, plain, [own], tmp_path / "out")


@pytest.mark.parametrize("case", PACKED)
def test_damaged_4_bit_bases(case: str, nf4: Path, own: Path, tmp_path: Path) -> None:
    spoil, message = PACKED[case]
    spoil(nf4)
    refused(message, nf4, [own], tmp_path / "out")


def test_pickled_weights_only(plain: Path, own: Path, tmp_path: Path) -> None:
    for path in plain.glob("model*.safetensors*"):
        path.unlink()
    (plain / "pytest_model.bin").write_bytes(b"\x80\x04.")
    refused(r"has no model.safetensors, only pytest_model.bin", plain, [own], tmp_path / "out")


def test_a_base_of_other_shapes(
    tied_base: Path, tokenizer_folder: Path, own: Path, tmp_path: Path
) -> None:
    base = with_tokenizer(tied_base, tokenizer_folder, tmp_path / "other")
    message = r"tensor model.layers.0.*: the adapter is for shape \[\d+, \d+\], the base has"
    refused(message, base, [own], tmp_path / "out")


def test_original_weights_of_another_model(
    plain: Path, nf4: Path, own: Path, tmp_path: Path
) -> None:
    tensors(lambda t: [t[k].mul_(1.05).add_(1e-3) for k in t if "proj" in k])(plain)
    message = r"model-.*safetensors: tensor model.layers.* holds other values"
    refused(message, nf4, [own], tmp_path / "out", original=plain)


def test_two_adapters_that_replace_the_same_module(
    plain: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    first = make_adapter(plain, modules_to_save=["lm_head"])
    second = Path(shutil.copytree(first, tmp_path / "second"))
    message = r"second/adapter_model.safetensors: replaces lm_head.weight, which the adapter"
    refused(message, plain, [first, second], tmp_path / "out")


def test_a_foreign_tokenizer_beside_the_adapter(plain: Path, own: Path, tmp_path: Path) -> None:
    spec = json.loads((plain / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    last = len(vocab) + 2
    spec["model"]["vocab"] = {t: i if i < 3 else last - i for t, i in vocab.items()}
    (own / "tokenizer.json").write_text(json.dumps(spec))
    (own / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    message = r"adapter/tokenizer.json: is another tokenizer than the base's"
    refused(message, plain, [own], tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_weight_that_is_not_finite(
    value: float, plain: Path, own: Path, tmp_path: Path
) -> None:
    """Found when it is read, so what was written before it stays; none of it has its final name."""
    tensors(lambda t: t["lm_head.weight"][3, :1].fill_(value))(plain)
    name = BaseWeights(plain).file("lm_head.weight").name
    with pytest.raises(DataError, match=f"{name}: tensor lm_head.weight holds NaN") as caught:
        export(plain, [own], tmp_path / "out")
    assert caught.value.exit_code == 2
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert not left & {"x.gguf", "merged"}
    assert "x.gguf.part" in left and "merged.part" in left
