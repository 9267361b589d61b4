"""SentencePiece's BPE, as tokenizer.json has it, in llama.cpp's "llama" tokenizer.

llama.cpp's "llama" tokenizer knows no list of merges. It joins the adjacent pair whose joined text
is the piece with the highest score, so the scores *are* the merges: a piece gets minus the index of
the first merge that makes it. This is exact only when every pair that could be joined is a merge,
which holds for converted SentencePiece models and is checked here; a vocabulary for which it does
not hold would tokenise some texts otherwise, silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from zephyr_lite.errors import DataError, RecipeError

SPACE = "\u2581"
NEVER = -1e9  # score of a piece no merge makes
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}


def refuse_others(path: Path, spec: Mapping[str, Any]) -> None:
    """Refuse what is no SentencePiece BPE with byte fallback. Raises: RecipeError, DataError."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise RecipeError(f"{path}: a {model.get('type')} tokenizer cannot be exported to GGUF")
    parts = {kind for key in ("normalizer", "pre_tokenizer") for kind in _kinds(spec.get(key))}
    if unsupported := parts - {"Sequence", "Prepend", "Replace", "Metaspace"}:
        raise RecipeError(f"{path}: {sorted(unsupported)} cannot be expressed in GGUF")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(field):
            raise RecipeError(f"{path}: {field}: {model[field]!r} cannot be expressed in GGUF")
    if not model.get("byte_fallback") or not model["vocab"].keys() >= BYTES:
        raise RecipeError(f"{path}: a BPE tokenizer without byte fallback cannot be exported")
    if model.get("unk_token") not in model["vocab"]:
        raise DataError(f"unk_token {model.get('unk_token')!r} is not in the vocabulary", file=path)


def merges(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of pieces, best first."""
    pairs = spec["model"]["merges"]
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    return [(left, right) for left, right in split]


def check_merges(path: Path, pieces: Iterable[str], pairs: Iterable[tuple[str, str]]) -> None:
    """Every two pieces whose join is a piece must be a merge. Raises: DataError with the first."""
    known, allowed = set(pieces) - BYTES, set(pairs)
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


def scores(size: int, ids: Mapping[str, int], pairs: Iterable[tuple[str, str]]) -> list[float]:
    """Score by token id, `size` of them: minus the index of the first merge that makes a piece."""
    found = [NEVER] * size
    for index, (left, right) in enumerate(pairs):
        token = ids[left + right]
        if found[token] == NEVER:
            found[token] = float(-index)
    return found


def adds_space(path: Path, spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text, and after every special token in it."""
    pre = spec.get("pre_tokenizer") or {}
    if pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") == "first":
        raise RecipeError(
            f"{path}: Metaspace 'first' prepends a space to the first word only; "
            "llama.cpp does so after every special token or never"
        )
    always = pre.get("type") == "Metaspace" and pre.get("prepend_scheme", "always") == "always"
    return always or "Prepend" in _kinds(spec.get("normalizer"))


def _kinds(part: Mapping[str, Any] | None) -> Iterable[str]:
    if part:
        yield part["type"]
        for inner in [*part.get("normalizers", []), *part.get("pretokenizers", [])]:
            yield from _kinds(inner)
