"""What an exported file is compared over: held-out prompts, and ids to follow behind each.

Held out of training by whatever the recipe trains on: preference pairs, else dialogues.
"""

from __future__ import annotations

from zephyr_lite.data.report import Report
from zephyr_lite.data.split import is_held_out
from zephyr_lite.data.token_store import read_corpus
from zephyr_lite.errors import DataError
from zephyr_lite.stages import aif, sft
from zephyr_lite.stages.context import Context

ROWS_PER_PROMPT = 20  # dialogues read to find one that leaves room for a comparison
Messages = list[dict[str, str]]


def comparisons(ctx: Context, max_positions: int) -> list[tuple[Messages, list[int]]]:
    """Held-out prompts and the `verify_tokens` ids to follow behind each: teacher forcing.

    The text is a held-out answer and, where it is shorter, the turns of the rows after it.
    """
    settings = ctx.recipe.export
    rows = _held_out(ctx)
    found = []
    for at, (prompt, _) in enumerate(rows):
        dialogue: Messages = []
        for later, answer in rows[at:] + rows[:at]:
            turns = later if not dialogue else [m for m in later if m["role"] != "system"]
            dialogue = [*dialogue, *turns, {"role": "assistant", "content": answer}]
            ids = ctx.tokenizer.encode_dialogue(dialogue).ids
            start = len(ctx.tokenizer.encode_prompt(prompt))
            if len(ids) >= start + settings.verify_tokens:
                break
        if start + settings.verify_tokens + 16 <= max_positions:
            found.append((prompt, ids[start : start + settings.verify_tokens].tolist()))
        if len(found) == settings.verify_prompts:
            break
    if not found:
        raise DataError(
            f"none of {len(rows)} held-out prompts leaves room for {settings.verify_tokens} "
            f"tokens in a context of {max_positions}",
            hint="lower export.verify_tokens",
        )
    return found


def _held_out(ctx: Context) -> list[tuple[Messages, str]]:
    """(prompt, answer) that no training step has seen; where nothing is held out, that is said."""
    held_out, trained = _pair_rows(ctx) if ctx.recipe.data.feedback else _dialogue_rows(ctx)
    if not held_out:
        ctx.listener.note("export: nothing is held out, so files are compared on training prompts")
    return held_out or trained


def _pair_rows(ctx: Context) -> tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]]:
    """(held out, trained on), from the preference pairs."""
    held_out, trained = (
        [([dict(m) for m in pair.prompt], pair.chosen) for pair in aif.read_pairs(ctx, side)]
        for side in ("eval", "train")
    )
    return held_out, trained


def _dialogue_rows(ctx: Context) -> tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]]:
    """(held out, trained on), from the dialogues; as dSFT splits them."""
    split = ctx.recipe.data.dialogues
    if split is None:
        raise DataError("the recipe names no data to check the export with")
    corpus = sft.corpus(ctx, split, "eval" if split.eval else "train")
    enough = ROWS_PER_PROMPT * ctx.recipe.export.verify_prompts
    sides: tuple[list[tuple[Messages, str]], list[tuple[Messages, str]]] = ([], [])
    for dialogue in read_corpus(corpus, ctx.tokenizer, Report(corpus.on_fault)):
        is_trained = not split.eval and not is_held_out(dialogue.messages, split.holdout)
        *prompt, answer = [dict(m) for m in dialogue.messages]
        if len(sides[is_trained]) < enough:
            sides[is_trained].append((prompt, answer["content"]))
        if len(sides[0]) >= enough or (len(sides[1]) >= enough and not split.holdout):
            break
    return sides
