"""A SentencePiece-style `tokenizer.json` as the vocabulary llama.cpp reads.

llama.cpp's "llama" tokenizer knows no list of merges. It joins the adjacent pair whose joined text
is the piece with the highest score, so the scores *are* the merges: a piece gets minus the index of
the first merge that makes it. This is exact only when every pair that could be joined is a merge,
which holds for converted SentencePiece models and is checked here; a vocabulary for which it does
not hold would tokenise some texts otherwise, silently.

The file's own bytes are read, never a tokenizer object of transformers: its Llama class replaces
the normaliser, and with it the ids of text after a leading space.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from zephyr_lite.errors import DataError, RecipeError, StorageError
from zephyr_lite.storage import read_json

SPACE = "\u2581"
NEVER = -1e9  # score of a piece no merge makes
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, `scores` and `types` are indexed by token id; the rest are ids and switches."""

    tokens: list[str]
    scores: list[float]
    types: list[int]
    bos: int
    eos: int
    unknown: int
    padding: int | None
    add_space_prefix: bool


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Translate `tokenizer.json` and `tokenizer_config.json` of a folder.

    Args: size: rows of the embedding; ids the tokenizer does not use become UNUSED pieces.
    Raises: RecipeError for a tokenizer llama.cpp's "llama" type cannot express (byte-level BPE,
        Unigram, WordPiece, ...); DataError for one that contradicts itself or the model.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise StorageError(f"{folder}: has no tokenizer.json", hint="it is the only file trusted")
    spec = read_json(path)
    model = spec["model"]
    _refuse_other_kinds(path, spec)
    ids: dict[str, int] = dict(model["vocab"])
    added = {token["content"]: token for token in spec.get("added_tokens") or []}
    ids |= {content: token["id"] for content, token in added.items()}
    if max(ids.values()) >= size:
        raise DataError(f"has ids up to {max(ids.values())}, the model {size} rows", file=path)
    _refuse_decorated(path, added.values())
    merges = [_pair(merge) for merge in model["merges"]]
    _check_merges(path, ids.keys() - added.keys() - BYTES, merges)
    bos = _special_id(folder, ids, "bos_token", "<s>")
    eos = _special_id(folder, ids, "eos_token", "</s>")
    _check_ends(path, bos, eos)
    padding = _special_text(folder, "pad_token", None)
    tokens, scores, types = _pieces(size, ids, merges, added, model["unk_token"])
    return Vocabulary(
        tokens,
        scores,
        types,
        bos=bos,
        eos=eos,
        unknown=ids[model["unk_token"]],
        padding=ids.get(padding) if padding else None,
        add_space_prefix=_adds_space(path, spec),
    )


def _pieces(
    size: int,
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    added: Mapping[str, Mapping[str, Any]],
    unknown: str,
) -> tuple[list[str], list[float], list[int]]:
    first_merge: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        first_merge.setdefault(left + right, index)
    tokens = [f"[PAD{i}]" for i in range(size)]
    scores = [NEVER] * size
    types = [int(TokenType.UNUSED)] * size
    for piece, i in ids.items():
        tokens[i] = piece
        scores[i] = float(-first_merge[piece]) if piece in first_merge else NEVER
        if piece == unknown:
            types[i] = int(TokenType.UNKNOWN)
        elif piece in added:
            special = added[piece]["special"]
            types[i] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            types[i] = int(TokenType.BYTE if piece in BYTES else TokenType.NORMAL)
    return tokens, scores, types


def _refuse_other_kinds(path: Path, spec: Mapping[str, Any]) -> None:
    model = spec["model"]
    parts = {kind for key in ("normalizer", "pre_tokenizer") for kind in _kinds(spec.get(key))}
    if "ByteLevel" in parts:
        raise RecipeError(f"{path}: a byte-level BPE tokenizer cannot be exported to GGUF yet")
    if model.get("type") != "BPE":
        raise RecipeError(f"{path}: a {model.get('type')} tokenizer cannot be exported to GGUF")
    if unsupported := parts - {"Sequence", "Prepend", "Replace", "Metaspace"}:
        raise RecipeError(f"{path}: {sorted(unsupported)} cannot be expressed in GGUF")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(field):
            raise RecipeError(f"{path}: {field}: {model[field]!r} cannot be expressed in GGUF")
    if not model.get("byte_fallback") or not model["vocab"].keys() >= BYTES:
        raise RecipeError(f"{path}: a BPE tokenizer without byte fallback cannot be exported")
    if model.get("unk_token") not in model["vocab"]:
        raise DataError(f"unk_token {model.get('unk_token')!r} is not in the vocabulary", file=path)


def _kinds(part: Mapping[str, Any] | None) -> Iterable[str]:
    if part:
        yield part["type"]
        for inner in [*part.get("normalizers", []), *part.get("pretokenizers", [])]:
            yield from _kinds(inner)


def _refuse_decorated(path: Path, added: Iterable[Mapping[str, Any]]) -> None:
    for token in added:
        for field in ("single_word", "lstrip", "rstrip"):
            if token.get(field):
                raise RecipeError(f"{path}: {field} of {token['content']!r} has no GGUF equivalent")


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _check_merges(path: Path, pieces: Iterable[str], merges: list[tuple[str, str]]) -> None:
    known, allowed = set(pieces), set(merges)
    missing = [
        (piece[:cut], piece[cut:])
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in known
        and piece[cut:] in known
        and (piece[:cut], piece[cut:]) not in allowed
    ]
    if missing:
        left, right = min(missing)
        raise DataError(
            f"llama.cpp would join {len(missing)} pairs this tokenizer does not, first "
            f"{left!r} + {right!r}",
            file=path,
            hint="list every pair of pieces whose join is a piece as a merge, in order of score",
        )


def _special_text(folder: Path, field: str, default: str | None) -> str | None:
    path = folder / "tokenizer_config.json"
    value = (read_json(path) if path.is_file() else {}).get(field, default)
    return value["content"] if isinstance(value, dict) else value


def _special_id(folder: Path, ids: Mapping[str, int], field: str, default: str) -> int:
    text = _special_text(folder, field, default)
    if text is None or text not in ids:
        raise DataError(f"{field} {text!r} is not in the vocabulary", file=folder)
    return ids[text]


def _check_ends(path: Path, bos: int, eos: int) -> None:
    """llama.cpp will put one BOS in front and nothing behind; so must the tokenizer."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    ids = tokenizer.encode("a").ids
    if ids.count(bos) != 1 or ids[0] != bos or eos in ids:
        raise RecipeError(
            f"{path}: text becomes {ids}; it must begin with one {bos} and have no {eos}",
            hint="give it a TemplateProcessing post-processor that adds <s> in front only",
        )


def _adds_space(path: Path, spec: Mapping[str, Any]) -> bool:
    pre = spec.get("pre_tokenizer") or {}
    if pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") == "first":
        raise RecipeError(
            f"{path}: Metaspace 'first' prepends a space to the first word only; "
            "llama.cpp does so after every special token or never"
        )
    always = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") == "always"
    return always or "Prepend" in _kinds(spec.get("normalizer"))
