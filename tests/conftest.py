"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Before torch is imported anywhere: spinning OpenMP threads make a shared CPU several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before triton is: without a GPU its kernels run in the interpreter, where a test asks for them.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def device() -> Any:
    """Where device tests and whole runs compute: ZEPHYR_LITE_TEST_DEVICE, else the CPU."""
    import torch

    return torch.device(os.environ.get("ZEPHYR_LITE_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real dialogues, feedback and models that are not part of the repository."""
    folder = Path(os.environ.get("ZEPHYR_LITE_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data is not there: {folder} (set ZEPHYR_LITE_SHARED_DATA)")
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache; one cache serves the whole session."""
    before = os.environ.get("ZEPHYR_LITE_HOME")
    home = tmp_path_factory.getbasetemp() / "zephyr-lite-home"
    os.environ["ZEPHYR_LITE_HOME"] = str(home)
    yield
    if before is None:
        del os.environ["ZEPHYR_LITE_HOME"]
    else:
        os.environ["ZEPHYR_LITE_HOME"] = before


@dataclass(frozen=True)
class Tolerances:
    """The one tolerance table. A figure is loosened here only, with the reason beside it.

    Beside each: the largest seen on the tiny model in fp32, one thread.
    """

    ln2: float = 1e-6  # nats, seen 0: step-0 DPO loss against ln 2
    peft_logits: float = 1e-5  # seen 4e-6, of logits of order 10: stock PEFT against our forward
    logp: float = 5e-6  # nats, seen 5e-7: another packing of the same tokens
    gradient: float = 1e-5  # |g - g'| / |g| of one tensor, seen 9e-7: another packing or cut
    fp64: float = 1e-13  # relative, seen 2e-15: two formulas of one number in double precision


@pytest.fixture(scope="session")
def tolerance() -> Tolerances:
    """How close is equal."""
    return Tolerances()


# The model fixtures import torch and transformers inside, so that a test of data starts at once.
TINY_VOCAB = 384


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """The models of the tests are too small for two threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with a random Mistral: 4 layers, grouped queries, fp32, a byte tokenizer."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(
            MistralConfig(
                vocab_size=TINY_VOCAB,
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                sliding_window=None,
                initializer_range=0.12,  # large enough that attention and the head have opinions
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    folder = tmp_path_factory.mktemp("tiny-mistral")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(scope="session")
def tiny_nf4(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`tiny_mistral` as the stages see it: BaseFiles of the NF4 copy in the cache."""
    import torch

    from zephyr_lite.model.base import prepare
    from zephyr_lite.recipe import Base

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.getbasetemp() / "zephyr-lite-home"
        patch.setenv("ZEPHYR_LITE_HOME", str(home))
        return prepare(Base(model=str(tiny_mistral)), torch.device("cpu"))


@pytest.fixture(scope="session")
def load_tiny(tiny_mistral: Path, tiny_nf4: Any) -> Callable[..., Any]:
    """`load_tiny()` gives a fresh frozen NF4 model, `load_tiny("none")` one with plain linears."""
    import torch

    from zephyr_lite.model.base import BaseFiles, load_base
    from zephyr_lite.recipe import Base

    def load(quantization: str = "nf4", dtype: str = "float32") -> Any:
        base = Base.model_validate({"model": str(tiny_mistral), "dtype": dtype})
        files = tiny_nf4 if quantization == "nf4" else BaseFiles(tiny_mistral, {})
        return load_base(files, base, torch.device("cpu"))

    return load


@pytest.fixture(scope="session")
def shake() -> Callable[..., None]:
    """`shake(model, "name", seed)` gives an adapter random weights, so that it does something."""
    import torch

    def change(model: Any, adapter: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.copy_(0.3 * noise / parameter.shape[-1] ** 0.5)

    return change


@pytest.fixture(scope="session")
def random_documents() -> Callable[..., list[tuple[np.ndarray, np.ndarray]]]:
    """`random_documents(lengths, seed)` -> (ids, answer) of documents for the tiny model."""

    def make(lengths: list[int], seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        rng = np.random.default_rng(seed)
        return [
            (rng.integers(0, TINY_VOCAB, n).astype(np.int32), rng.random(n) < 0.5) for n in lengths
        ]

    return make


@pytest.fixture(scope="session")
def random_pairs() -> Callable[..., list[Any]]:
    """`random_pairs([(prompt, chosen, rejected), ...], seed)` -> pairs of those lengths."""
    from zephyr_lite.data.encoded import EncodedPair

    def make(sizes: list[tuple[int, int, int]], seed: int = 0) -> list[EncodedPair]:
        rng = np.random.default_rng(seed)
        return [
            EncodedPair(*(rng.integers(0, TINY_VOCAB, n).astype(np.int32) for n in lengths))
            for lengths in sizes
        ]

    return make


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json in the form of Mistral's without merges: one token per character or byte."""
    space = "\u2581"
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), space]
    pieces += [chr(code) for code in range(33, 127)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    text, bos = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
    )
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, **flags} for i in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": space},
                {"type": "Replace", "pattern": {"String": " "}, "content": space},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": [],
        },
    }
