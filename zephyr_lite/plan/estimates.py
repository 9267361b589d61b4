"""Lengths of data that was not tokenised yet, so that a plan needs neither rows nor a tokenizer.

    files on this machine    the rows are counted, the first thousand are read and measured: by the
                             base's tokenizer where it is at hand, else by their bytes
    hub datasets             counts of the published splits, lengths drawn from published figures

Same data, same draw: an estimate is a function of counts and settings alone. Rows that filters and
faults will take out are counted in, and every token of a dialogue counts as scored, which makes an
estimate a little too high. A mixture of files and hub datasets goes by the published figures.

UltraFeedback: quantiles of 891 rows of ultrafeedback_binarized, measured with Mistral's tokenizer
before truncation; chosen and rejected of one prompt are alike (correlation 0.58 of their ranks as
normal scores). Under 1024 / 512 these give 182, 278 and 255 tokens.
UltraChat: the published mean, 1,373 tokens; ASSUMED log-normal with a spread of 0.45. Packing makes
rows of one length of any of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from zephyr_lite.data.chat import render
from zephyr_lite.data.dialogues import load_dialogues
from zephyr_lite.data.feedback import load_pairs
from zephyr_lite.data.layout import Documents
from zephyr_lite.data.sources import find_files, is_local, read_rows, resolve
from zephyr_lite.errors import DataError, MachineError, RecipeError
from zephyr_lite.model.base import find_folder
from zephyr_lite.plan.lengths import DocumentLengths, Lengths, PairLengths, pack
from zephyr_lite.recipe import Base, Dpo, Feedback, Recipe, Sft, Source, Split

# Rows of the published splits, from the datasets' cards.
ROWS = {
    ("HuggingFaceH4/ultrachat_200k", "train_sft"): 207_865,
    ("HuggingFaceH4/ultrachat_200k", "test_sft"): 23_110,
    ("HuggingFaceH4/ultrafeedback_binarized", "train_prefs"): 61_135,
    ("HuggingFaceH4/ultrafeedback_binarized", "test_prefs"): 2_000,
    ("openbmb/UltraFeedback", "train"): 63_967,
}
LEVELS = (0, 1, 2, 5, 10, 20, 30, 40, 50, 60, 70, 80, 85, 90, 95, 97, 99, 99.5, 100)  # percent
PROMPT = (30, 33, 33, 36, 39, 46, 57, 84, 112, 154, 213, 325, 406, 506, 696, 950, 1193, 1288, 2076)
CHOSEN = (2, 2, 3, 8, 19, 44, 76, 145, 224, 321, 431, 550, 627, 707, 836, 924, 1098, 1171, 1411)
REJECTED = (1, 3, 4, 11, 22, 51, 100, 148, 207, 287, 357, 472, 521, 616, 739, 846, 1004, 1024, 1048)
CORRELATION = ((1, -0.18, -0.12), (-0.18, 1, 0.58), (-0.12, 0.58, 1))
DIALOGUE_MEAN, DIALOGUE_SPREAD = 1373, 0.45
TOKENS_PER_BYTE = 0.27  # of a rendered dialogue; 0.24 to 0.35 over ten public sets, Mistral's
MEASURED = 1000  # rows of a local source that are read
SEED = 2310_16944


def estimate(recipe: Recipe, stage: Literal["sft", "dpo"]) -> Lengths:
    """Lengths of a stage's training rows, before anything is tokenised.

    Raises: RecipeError where the recipe does not train this stage; DataError for local rows that
        cannot be read, and for a hub dataset whose number of rows is not known here.
    """
    if stage == "sft":
        dialogues, sft = recipe.data.dialogues, recipe.sft
        if sft is None or dialogues is None or sft.start is not None:
            raise RecipeError("this recipe trains no dSFT")
        counts = _counts(dialogues)
        local = all(is_local(s.path) for s in dialogues.train)
        lengths = _measured_dialogues(recipe.base, dialogues, counts) if local else None
        return estimated_documents(sum(counts), sft, lengths)
    feedback, dpo = recipe.data.feedback, recipe.dpo
    if dpo is None or feedback is None:
        raise RecipeError("this recipe trains no dDPO")
    counts = _counts(feedback)
    local = all(is_local(s.path) for s in feedback.train)
    measured = _measured_pairs(recipe, feedback, counts) if local else None
    return estimated_pairs(sum(counts), dpo, measured)


def estimated_documents(
    n_dialogues: int, settings: Sft, lengths_D: np.ndarray | None = None
) -> DocumentLengths:
    """Packed rows of so many dialogues, as long as UltraChat's.

    Args: lengths_D: tokens of some that were measured; they are repeated as often as need be.
    """
    of_whom = "by the first rows' texts"
    if lengths_D is None:
        lengths_D, of_whom = _ultrachat_lengths(n_dialogues), "as UltraChat's"
    lengths_D = np.resize(lengths_D, n_dialogues) + (settings.packing == "wrapped")
    offsets = np.concatenate([[0], np.cumsum(lengths_D)]).astype(np.int64)
    nothing = np.empty(0, np.int32)
    rows = pack(Documents(nothing, nothing.astype(bool), offsets), settings)
    mean = lengths_D.mean() if n_dialogues else 0
    source = f"estimated: {n_dialogues:,} dialogues of {mean:,.0f} tokens, {of_whom}"
    return DocumentLengths(rows, settings.max_length, source, is_estimate=True)


def estimated_pairs(
    n_pairs: int, settings: Dpo, lengths_P3: np.ndarray | None = None
) -> PairLengths:
    """So many pairs, as long as UltraFeedback's, cut by the recipe's rule.

    Args: lengths_P3: prompt, chosen and rejected tokens of some that were measured, uncut; they are
        repeated as often as need be.
    """
    of_whom = "by the first rows' texts"
    if lengths_P3 is None:
        lengths_P3, of_whom = _ultrafeedback_lengths(n_pairs), "as UltraFeedback's"
    cut_P3 = truncated(np.resize(lengths_P3, (n_pairs, 3)), settings)
    mean = cut_P3.sum() / max(1, n_pairs)
    source = f"estimated: {n_pairs:,} pairs of {mean:,.0f} tokens, {of_whom}"
    return PairLengths(cut_P3, settings.max_length, source, is_estimate=True)


def truncated(lengths_P3: np.ndarray, settings: Dpo) -> np.ndarray:
    """Lengths after `encoded.truncate_pair`; int64 [pairs, 3]."""
    prompt, chosen, rejected = lengths_P3.T
    longer, most = np.maximum(chosen, rejected), settings.max_length
    short = np.where(prompt + longer > most, np.minimum(prompt, settings.max_prompt_length), prompt)
    room = np.where(short + longer > most, most - settings.max_prompt_length, longer)
    cut = (short, np.minimum(chosen, room), np.minimum(rejected, room))
    return np.stack(cut, axis=1).astype(np.int64)


def count_rows(source: Source) -> int:
    """Rows that a source gives: at most its `limit`, times its weight; no row is parsed but those
    of a .json file.

    Raises: DataError for a file that is not there, and for a hub dataset that is not known here and
        has no `limit`.
    """
    if is_local(source.path):
        files = find_files(source.path, source.split)
        if source.file is not None:
            files = find_files(str(resolve(source.path) / source.file))
        n = sum(_count_file(file) for file in files)
    else:
        n = _published_rows(source)
    n = n if source.limit is None else min(n, source.limit)
    return round(n * source.weight)


def _counts(split: Split) -> list[int]:
    kept = 1.0 if split.eval else 1 - split.holdout
    counts = [round(kept * count_rows(source)) for source in split.train]
    if not sum(counts):
        raise DataError("the recipe's training sources have no row")
    return counts


def _count_file(file: Path) -> int:
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        try:
            return parquet.read_metadata(file).num_rows
        except pyarrow.ArrowException as error:
            raise DataError(f"unsound parquet: {str(error)[:200]}", file=file) from None
    if suffix == ".json":
        return sum(1 for _ in read_rows(str(file)))
    with file.open("rb") as stream:
        return sum(1 for line in stream if line.strip(b" \t\r\n\xef\xbb\xbf"))


def _published_rows(source: Source) -> int:
    """Rows of a hub dataset's split or of a part of it, such as `train_sft[:1000]`."""
    name, bracket, part = (source.split or "").partition("[")
    n = None if source.file else ROWS.get((source.path, name))
    if n is not None and bracket:
        ends = re.fullmatch(r"(\d*):(\d*)\]", part)
        n = len(range(n)[int(ends[1] or 0) : int(ends[2] or n)]) if ends else None
    if n is None and source.limit is not None:
        return source.limit
    if n is None:
        raise DataError(
            f"hub dataset {source.path}: how many rows it has is not known before it is read",
            hint="give the source a `limit`, or begin the run: a later plan reads what it made",
        )
    return n


def _ultrachat_lengths(n: int) -> np.ndarray:
    levels = np.clip(np.array(LEVELS) / 100, 5e-4, 1 - 5e-4)
    normal = np.array([NormalDist().inv_cdf(level) for level in levels])
    lengths = _quantiles(_normal_scores(n)[:, 0], np.exp(DIALOGUE_SPREAD * normal))
    return np.round(lengths * DIALOGUE_MEAN / lengths.mean()).astype(np.int64)


def _ultrafeedback_lengths(n: int) -> np.ndarray:
    scores_P3 = _normal_scores(n) @ np.linalg.cholesky(np.array(CORRELATION)).T
    tables = (PROMPT, CHOSEN, REJECTED)
    columns = [_quantiles(scores_P3[:, i], np.array(table)) for i, table in enumerate(tables)]
    return np.round(np.stack(columns, axis=1)).astype(np.int64)


def _normal_scores(n: int) -> np.ndarray:
    """Normal numbers [n, 3], by Box and Muller from raw Philox bits, the same on any machine."""
    bits = np.random.Philox(key=SEED).random_raw(6 * n).reshape(n, 6)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return np.sqrt(-2 * np.log(uniform[:, :3])) * np.cos(2 * np.pi * uniform[:, 3:])


def _quantiles(scores: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Values whose distribution is the table's, in the order of `scores`."""
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
    return np.interp(100 * (ranks + 0.5) / len(scores), LEVELS, table)


def _measured_dialogues(base: Base, split: Split, counts: Sequence[int]) -> np.ndarray:
    """Tokens of the first dialogues of each local source, each source by its share of rows."""
    parts = []
    for source, n in zip(split.train, counts, strict=True):
        found, _ = load_dialogues([_beginning(source)], on_fault="drop")
        parts.append(np.resize(_tokens(base, [render(d.messages) for d in found]), n))
    return np.concatenate(parts)


def _measured_pairs(recipe: Recipe, split: Feedback, counts: Sequence[int]) -> np.ndarray:
    """As `_measured_dialogues`, of pairs: [pairs, 3], uncut."""
    parts = []
    for source, n in zip(split.train, counts, strict=True):
        rule = {"rule": split.rule, "ties": split.ties, "seed": recipe.seed}
        found, _ = load_pairs([_beginning(source)], on_fault="drop", **rule)
        texts = [render(p.prompt, add_generation_prompt=True) for p in found]
        texts += [p.chosen for p in found] + [p.rejected for p in found]
        columns_3P = _tokens(recipe.base, texts).reshape(3, -1)
        parts.append(np.resize(columns_3P.T, (n, 3)))
    return np.concatenate(parts)


def _beginning(source: Source) -> Source:
    """The source's first rows, each once."""
    limit = min(source.limit or MEASURED, MEASURED)
    return source.model_copy(update={"weight": 1.0, "limit": limit})


def _tokens(base: Base, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text."""
    if not texts:
        raise DataError("no sound row among the first of a source", hint="zephyr-lite aif says why")
    file = _tokenizer_file(base)
    if file is None:
        counts = [TOKENS_PER_BYTE * len(text.encode("utf-8", "replace")) for text in texts]
        return np.maximum(1, np.round(counts)).astype(np.int64)
    try:
        found = Tokenizer.from_file(str(file)).encode_batch(list(texts))
    except Exception as error:  # tokenizers raises plain Exception, nothing narrower
        raise DataError(f"unsound tokenizer: {str(error)[:200]}", file=file) from error
    return np.array([len(encoded.ids) for encoded in found], np.int64)


def _tokenizer_file(base: Base) -> Path | None:
    """The base's tokenizer, where it is on this machine."""
    if base.build is not None:
        return resolve(base.build.tokenizer)
    try:
        folder, _ = find_folder(base.model, base.revision, (), "base", offline=True)
    except (MachineError, RecipeError):
        return None
    file = folder / "tokenizer.json"
    return file if file.is_file() else None
