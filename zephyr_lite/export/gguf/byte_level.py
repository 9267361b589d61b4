"""Byte-level BPE, as tokenizer.json has it, in llama.cpp's "gpt2" tokenizer.

llama.cpp takes tokens and merges as they are. How text is cut into words before is a name, for
which it has expressions of its own; the name is decided here from tokenizer.json's own
normaliser and pre-tokenizer, never from the model's name or a hash of token ids:

    cut into words by                     whole words first   name
    Llama-3's expression                  yes                 llama-bpe
    Llama-3's expression                  no                  dbrx
    Qwen2's expression (single digits)    no                  qwen2
    single digits, then GPT-2's           no                  smollm
    GPT-2's expression                    no                  gpt-2

"Whole words first" is the field `ignore_merges`: a word that is a token is not put together from
merges. Each row is compared with llama.cpp in tests/zephyr_lite/export/gguf/test_byte_level.py.
What stays different is characters new in Unicode 16 (Todhri, Garay, more hieroglyphs): llama.cpp's
tables of letters are older than those of the `tokenizers` package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from zephyr_lite.errors import DataError, RecipeError

_AROUND = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
LLAMA3 = r"\p{N}{1,3}".join(_AROUND)
QWEN2 = r"\p{N}".join(_AROUND)
DIGITS, GPT2 = "Digits", "ByteLevel"
# (how text is cut, ignore_merges) -> llama.cpp's name
NAMES = {
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "dbrx",
    ((QWEN2,), False): "qwen2",
    ((DIGITS, GPT2), False): "smollm",
    ((GPT2,), False): "gpt-2",
}
NOT_UTF8 = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}  # as byte-level text
NFC_NOTE = (
    "this tokenizer composes characters first (Unicode NFC), llama.cpp does not: text with "
    "decomposed accents gets other tokens there; compose it before (NFC), as keyboards do"
)


def is_byte_level(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    parts = [*_flat(spec.get("normalizer")), *_flat(spec.get("pre_tokenizer"))]
    return any(part["type"] == "ByteLevel" for part in parts)


def refuse_others(path: Path, spec: Mapping[str, Any]) -> None:
    """Refuse what llama.cpp's "gpt2" does not compute. Raises: RecipeError naming the field."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise RecipeError(f"{path}: a {model.get('type')} tokenizer cannot be exported to GGUF")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(field):
            raise RecipeError(f"{path}: {field}: {model[field]!r} cannot be expressed in GGUF")
    kinds = {part["type"] for part in _flat(spec.get("normalizer"))}
    if kinds - {"NFC"}:
        raise RecipeError(f"{path}: normalizer {sorted(kinds)} cannot be expressed in GGUF")


def pre_tokenizer(path: Path, spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer cuts text into words.

    Raises: RecipeError with the expression when there is none.
    """
    cuts = tuple(cut for part in _flat(spec.get("pre_tokenizer")) for cut in _cuts(path, part))
    ignores = bool(spec["model"].get("ignore_merges"))
    if (cuts, ignores) not in NAMES:
        known = ", ".join(NAMES.values())
        raise RecipeError(
            f"{path}: llama.cpp has no pre-tokenizer we know for {' then '.join(cuts) or 'none'}"
            f" with ignore_merges {ignores}",
            hint=f"known are {known}; set export.merged=true for safetensors instead of GGUF",
        )
    return NAMES[cuts, ignores]


def composes(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer composes characters before it looks at them (Unicode NFC)."""
    return any(part["type"] == "NFC" for part in _flat(spec.get("normalizer")))


def notes(spec: Mapping[str, Any]) -> tuple[str, ...]:
    """Texts of which llama.cpp makes other tokens, whatever the file says."""
    missing = (set(ByteLevel.alphabet()) - NOT_UTF8) - spec["model"]["vocab"].keys()
    lacks = (
        f"this tokenizer has no token for {len(missing)} bytes of UTF-8 and drops them; llama.cpp "
        "does too, and may cut what stands around them otherwise"
    )
    return (*([NFC_NOTE] if composes(spec) else []), *([lacks] if missing else []))


def merges(path: Path, spec: Mapping[str, Any]) -> list[str]:
    """ "left right", best first. Raises: DataError for a tokenizer without, or a torn one."""
    pairs = spec["model"]["merges"]
    if not pairs:
        raise DataError("has no merges", file=path)
    vocab = spec["model"]["vocab"]
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    for pair in split:
        if len(pair) != 2 or "".join(pair) not in vocab:
            raise DataError(f"merge {pair} makes no token", file=path)
    return [" ".join(pair) for pair in split]


def _cuts(path: Path, part: Mapping[str, Any]) -> Iterator[str]:
    """How one pre-tokenizer cuts: an expression, DIGITS, GPT2 or not at all."""
    kind, pattern = part["type"], part.get("pattern", {})
    if kind == "ByteLevel":
        if part.get("add_prefix_space", True):
            raise RecipeError(f"{path}: add_prefix_space cannot be expressed in GGUF")
        if part.get("use_regex", True):
            yield GPT2
    elif kind == "Digits" and part.get("individual_digits"):
        yield DIGITS
    elif kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
        yield pattern.get("Regex", f"the text {pattern.get('String')!r}")
    else:
        yield f"{kind} {sorted(part.items())}"


def _flat(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if part and part["type"] == "Sequence":
        for inner in [*part.get("normalizers", []), *part.get("pretokenizers", [])]:
            yield from _flat(inner)
    elif part:
        yield part
