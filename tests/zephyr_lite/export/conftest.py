"""Tiny models and tokenizers, made here: no test of this folder needs a download."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from zephyr_lite.export.check import verify as verify_module
from zephyr_lite.export.check.texts import odd_strings
from zephyr_lite.export.gguf.byte_level import LLAMA3, QWEN2
from zephyr_lite.export.gguf.target import GgufTarget
from zephyr_lite.export.streaming import stream
from zephyr_lite.export.weights.fold import FoldedModel

WORDS = [
    "the", "of", "and", "you", "friend", "once", "upon", "time", "user", "assistant", "system",
    "ful", "ly", "ing", "==", "..", "here", "erst", "sts",
]  # fmt: skip
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "initializer_range": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The machine is shared; and these models are too small for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tokenizer_spec() -> dict[str, Any]:
    """A SentencePiece-style tokenizer.json in the form of Mistral's, with complete merges."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    chars = [chr(c) for c in range(33, 127)] + ["\u2581", "\n", "é", "漢"]
    grown = [
        text[:end]
        for word in WORDS
        for text in (word, "\u2581" + word)
        for end in range(2, len(text) + 1)
    ]
    pieces += list(dict.fromkeys([*grown, *chars]))
    ids = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces[259:]
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, **special} for i in range(3)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": ids,
            "merges": merges,
        },
    }


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., dict[str, Any]]:
    """`write_gguf(model, tokenizer_folder, template, out, quant)`: one file at once, checked by
    nothing but its own re-reading; its entry of the report."""

    def write(
        model: FoldedModel, tokenizer_folder: Path, template: str, out: Path, quant: str
    ) -> dict[str, Any]:
        target = GgufTarget(
            model, tokenizer_folder, template, out, quant, name="m", identity="", routes={}
        )
        target.part.unlink(missing_ok=True)  # what stands there may be of another model
        (report,) = stream(model, [target])
        target.commit()
        return report

    return write


@pytest.fixture
def fewer_strings(monkeypatch: pytest.MonkeyPatch) -> None:
    """An eighth of the odd strings, where something else than tokens is looked at."""
    monkeypatch.setattr(verify_module, "odd_strings", lambda special: odd_strings(special)[::8])


@pytest.fixture
def write_tokenizer(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Write a (spoilt) tokenizer.json into a folder of its own."""

    def write(spec: dict[str, Any], **config: Any) -> Path:
        folder = tmp_path / "tokenizer"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def spec() -> dict[str, Any]:
    """A fresh tokenizer specification a test may spoil."""
    return tokenizer_spec()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    config = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "unk_token": "<unk>",
        "vocab_file": "../../.env",
        "chat_template": {"../../evil": "x"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> Tokenizer:
    """The tokenizer of `tokenizer_folder`."""
    return Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))


PROSE = (
    "the quick brown fox jumps over the lazy dog and don't say it's we've they'll I'M 2024 12 345 "
    "return assistant system user hello world once upon a time there were three little pigs "
)


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# name of the pre-tokenizer -> how it cuts, ignore_merges, NFC, special tokens, bos, eos
STYLES: dict[str, dict[str, Any]] = {
    "llama-bpe": {
        "cut": split(LLAMA3), "ignore_merges": True, "special": LLAMA3_SPECIAL,
        "bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "adds_bos": True,
    },
    "dbrx": {"cut": split(LLAMA3), "special": CHATML, "eos": "<|endoftext|>"},
    "qwen2": {"cut": split(QWEN2), "nfc": True, "special": CHATML, "eos": "<|im_end|>"},
    "smollm": {"cut": digits(), "special": CHATML, "bos": "<|im_start|>", "eos": "<|im_end|>"},
    "gpt-2": {"cut": gpt2(), "special": CHATML[:1], "bos": "<|endoftext|>", "eos": "<|endoftext|>"},
}  # fmt: skip


def trained(folder: Path, style: Mapping[str, Any]) -> Path:
    """A tokenizer with the settings of a published one, trained on what it will be asked."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=style.get("ignore_merges", False)))
    tokenizer.normalizer = normalizers.NFC() if style.get("nfc") else None
    tokenizer.pre_tokenizer = style["cut"]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=style["special"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([PROSE] * 20 + [*odd_strings()] * 2, trainer)
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("⟦x⟧")])
    if style.get("adds_bos"):
        bos = style["bos"]
        template = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
        byte_level = processors.ByteLevel(trim_offsets=True)
        tokenizer.post_processor = processors.Sequence([byte_level, template])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": style.get("bos"), "eos_token": style["eos"], "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture
def byte_level_tokenizer(tmp_path: Path) -> Callable[..., Path]:
    """`byte_level_tokenizer("qwen2", **changes)`: a new folder with one of `STYLES`."""

    def make(style: str, **changes: Any) -> Path:
        return trained(
            Path(mkdtemp(prefix=f"{style}-", dir=tmp_path)), {**STYLES[style], **changes}
        )

    return make


@pytest.fixture(scope="session")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral with grouped queries, fp32, in two shards."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None))
    folder = tmp_path_factory.mktemp("plain")
    model.save_pretrained(folder, max_shard_size="4MB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder


@pytest.fixture(scope="session")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose head is its embedding; rows of 172, which 32 does not divide."""
    torch.manual_seed(1)
    shape = {**SHAPE, "hidden_size": 96, "intermediate_size": 172, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def nf4_base(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain_base` in NF4 with double quantisation, as transformers saves it."""
    return quantised(plain_base, tmp_path_factory.mktemp("nf4"), torch.float32)


@pytest.fixture(scope="session")
def nf4_bf16_base(plain_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same computed in bf16, as on a GPU: quant_state.dtype is bf16."""
    return quantised(plain_base, tmp_path_factory.mktemp("nf4_bf16"), torch.bfloat16)


def quantised(plain: Path, folder: Path, dtype: torch.dtype) -> Path:
    """Quantise with transformers and bitsandbytes on the CPU and save."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        plain, dtype=dtype, device_map="cpu", quantization_config=config
    )
    model.save_pretrained(folder)
    return folder


def random_adapter(base: Path, folder: Path, **options: Any) -> Path:
    """Save a PEFT adapter with random A and B on all linears of a model."""
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu")
    config = LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": LINEARS, **options})
    peft = get_peft_model(model, config)
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            scale = 1.0 if "lora_A" in name else 0.05
            parameter.data = torch.randn_like(parameter.data) * scale / parameter.shape[-1] ** 0.5
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """`make_adapter(base, **lora_options)` writes a random adapter of this test's own."""
    return lambda base, **options: random_adapter(base, tmp_path / "adapter", **options)


@pytest.fixture(scope="session")
def adapter(nf4_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain LoRA adapter for `nf4_base`."""
    return random_adapter(nf4_base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="session")
def peft_logits() -> Callable[[Path, Path, torch.Tensor], torch.Tensor]:
    """Stock PEFT's logits for (base, adapter, ids)."""

    def logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.float32)
        # In train mode: in eval mode bitsandbytes may repack the weights of a CPU into bf16.
        peft = PeftModel.from_pretrained(model, str(adapter)).train()
        for module in peft.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            return peft(ids).logits

    return logits


@pytest.fixture(scope="session")
def folded_model() -> Callable[[FoldedModel], torch.nn.Module]:
    """A stock transformers model holding the tensors of a FoldedModel."""

    def build(folded: FoldedModel) -> torch.nn.Module:
        config = AutoConfig.for_model(**folded.config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = {name: folded.tensor(name) for name in folded.names()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected
        assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
        return model.eval()

    return build


@pytest.fixture(scope="session")
def as_truth() -> Callable[[torch.nn.Module], Callable[[list[int]], torch.Tensor]]:
    """A model as the `truth` of verify_gguf."""

    def make(model: torch.nn.Module) -> Callable[[list[int]], torch.Tensor]:
        def truth(ids: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)

        return truth

    return make
