"""tokenizer.json as the vocabulary of a GGUF: what llama.cpp reads, or a refusal.

Two kinds of BPE have an equal in llama.cpp: SentencePiece's, whose merges become scores
(sentencepiece.py), and byte-level BPE with a pre-tokenizer llama.cpp knows by name (byte_level.py).
Here is what both have in common: ids, token types, what is put around a text.

The file's own bytes are read, never a tokenizer object of transformers: its Llama class replaces
the normaliser, and with it the ids of text after a leading space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import TokenType
from tokenizers import Tokenizer

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.export.gguf import byte_level, sentencepiece
from zephyr_lite.export.gguf.sentencepiece import BYTES
from zephyr_lite.storage import read_json


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, `scores` and `types` are indexed by token id; the rest are ids and switches.

    model, pre: llama.cpp's names of the tokenizer and its pre-tokenizer.
    scores: of SentencePiece's pieces; empty for byte-level BPE.
    merges: "left right", best first, of byte-level BPE; empty for SentencePiece.
    bos: None where the tokenizer has none; then `add_bos` is False.
    notes: what llama.cpp does otherwise with text of some kind, for the person who exports.
    """

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    bos: int | None
    eos: int
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_space_prefix: bool
    notes: tuple[str, ...] = ()

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Every `tokenizer.ggml` key; the chat template is not the vocabulary's."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        # Without one llama.cpp takes whatever token 11 is, and hands its text to chat templates.
        first = next(i for i in (self.bos, self.padding, self.eos) if i is not None)
        writer.add_bos_token_id(first)
        writer.add_eos_token_id(self.eos)
        if self.unknown is not None:
            writer.add_unk_token_id(self.unknown)
        if self.padding is not None:
            writer.add_pad_token_id(self.padding)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(False)
        writer.add_add_space_prefix(self.add_space_prefix)


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Translate `tokenizer.json` and `tokenizer_config.json` of a folder.

    Args: size: rows of the embedding; ids the tokenizer does not use become UNUSED pieces.
    Raises: RecipeError for a tokenizer llama.cpp cannot express (Unigram, WordPiece, a
        pre-tokenizer it has no name for, ...); DataError for one that contradicts itself or the
        model; StorageError without a tokenizer.json.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StorageError(f"{folder}: has no tokenizer.json", hint="it is the only file trusted")
    spec = read_json(path)
    if "vocab" not in spec.get("model", {}):
        raise DataError("has no model with a vocabulary", file=path)
    ids: dict[str, int] = dict(spec["model"]["vocab"])
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    ids |= {content: token["id"] for content, token in added.items()}
    is_byte_level = byte_level.is_byte_level(spec)
    refuse = byte_level.refuse_others if is_byte_level else sentencepiece.refuse_others
    refuse(path, spec)
    _refuse_decorated(path, added.values())
    _check_ids(path, ids, size)
    build = _byte_level if is_byte_level else _sentencepiece
    return build(path, spec, ids, added, size)


def _sentencepiece(
    path: Path,
    spec: Mapping[str, Any],
    ids: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    size: int,
) -> Vocabulary:
    merges = sentencepiece.merges(spec)
    sentencepiece.check_merges(path, ids.keys() - added.keys(), merges)
    unknown = ids[spec["model"]["unk_token"]]
    bos = _special_id(path, ids, "bos_token", "<s>")
    eos = _special_id(path, ids, "eos_token", "</s>")
    if _prefix(path) != [bos]:
        raise RecipeError(
            f"{path}: text begins with {_prefix(path)}; it must begin with one {bos}",
            hint="give it a TemplateProcessing post-processor that adds <s> in front only",
        )
    tokens, types = _pieces(size, ids, added)
    types[unknown] = int(TokenType.UNKNOWN)
    for piece in BYTES:
        types[ids[piece]] = int(TokenType.BYTE)
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=tokens,
        types=types,
        scores=sentencepiece.scores(size, ids, merges),
        merges=[],
        bos=bos,
        eos=eos,
        unknown=unknown,
        padding=_padding(path, ids),
        add_bos=True,
        add_space_prefix=sentencepiece.adds_space(path, spec),
    )


def _byte_level(
    path: Path,
    spec: Mapping[str, Any],
    ids: Mapping[str, int],
    added: Mapping[str, Mapping[str, Any]],
    size: int,
) -> Vocabulary:
    tokens, types = _pieces(size, ids, added)
    named, prefix = _special_text(path, "bos_token"), _prefix(path)
    if len(prefix) > 1 or (named and prefix and prefix != [ids.get(named)]):
        raise RecipeError(f"{path}: text begins with {prefix}; llama.cpp adds one BOS or nothing")
    bos = prefix[0] if prefix else ids.get(named or "")
    return Vocabulary(
        model="gpt2",
        pre=byte_level.pre_tokenizer(path, spec),
        tokens=tokens,
        types=types,
        scores=[],
        merges=byte_level.merges(path, spec),
        bos=bos,
        eos=_special_id(path, ids, "eos_token"),
        unknown=None,
        padding=_padding(path, ids),
        add_bos=bool(prefix),
        add_space_prefix=False,
        notes=byte_level.notes(spec),
    )


def _pieces(
    size: int, ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    for piece, i in ids.items():
        tokens[i], types[i] = piece, int(TokenType.NORMAL)
        if piece in added:
            is_special = added[piece]["special"]
            types[i] = int(TokenType.CONTROL if is_special else TokenType.USER_DEFINED)
    return tokens, types


def _check_ids(path: Path, ids: Mapping[str, int], size: int) -> None:
    if max(ids.values()) >= size:
        raise DataError(f"has ids up to {max(ids.values())}, the model {size} rows", file=path)
    by_id: dict[int, str] = {}
    for piece, i in ids.items():
        if (other := by_id.setdefault(i, piece)) != piece:
            raise DataError(f"gives id {i} to {other!r} and to {piece!r}", file=path)
    # llama.cpp aborts on two tokens of one text, and on an empty one.
    for i in range(size):
        if (i not in by_id and f"[PAD{i}]" in ids) or by_id.get(i) == "":
            raise DataError(f"the text of token {i} is empty or another token's", file=path)


def _refuse_decorated(path: Path, added: Iterable[Mapping[str, Any]]) -> None:
    normalizer = Tokenizer.from_file(str(path)).normalizer
    for token in added:
        text = token["content"]
        for field in ("single_word", "lstrip", "rstrip"):
            if token.get(field):
                raise RecipeError(f"{path}: {field} of {text!r} has no GGUF equivalent")
        # Sought in normalised text then, as its own normalised form: "a<x>" has no "\u2581<x>".
        if token.get("normalized") and normalizer and normalizer.normalize_str(text) != text:
            raise RecipeError(
                f"{path}: normalized of {text!r} has no GGUF equivalent: the tokenizer looks for "
                f"{normalizer.normalize_str(text)!r}, llama.cpp for the text itself",
                hint="set it to false in tokenizer.json before training; ids change with it",
            )


def _prefix(path: Path) -> list[int]:
    """What the tokenizer puts in front of a text. Raises: RecipeError when it adds behind it."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    plain, whole = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    count = len(whole) - len(plain)
    if whole[count:] != plain:
        raise RecipeError(
            f"{path}: text becomes {whole}, its tokens are {plain}; llama.cpp adds nothing behind",
            hint="give it a TemplateProcessing post-processor that adds BOS in front or nothing",
        )
    return whole[:count]


def _special_text(path: Path, field: str, default: str | None = None) -> str | None:
    config = path.with_name("tokenizer_config.json")
    value = (read_json(config) if config.is_file() else {}).get(field, default)
    return value["content"] if isinstance(value, dict) else value


def _special_id(path: Path, ids: Mapping[str, int], field: str, default: str | None = None) -> int:
    text = _special_text(path, field, default)
    if text is None or text not in ids:
        raise DataError(f"{field} {text!r} is not in the vocabulary", file=path.parent)
    return ids[text]


def _padding(path: Path, ids: Mapping[str, int]) -> int | None:
    return ids.get(_special_text(path, "pad_token") or "")
