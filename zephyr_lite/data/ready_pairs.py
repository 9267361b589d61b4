"""Pairs that were made elsewhere: TRL's forms, ultrafeedback_binarized, Anthropic's transcripts.

    prompt + two texts                the prompt a text, a transcript or a list of messages
    prompt + two lists of messages    what follows the prompt: one assistant turn each
    two lists of messages             whole dialogues that differ in their last turn; a `prompt`
                                      text beside them repeats the first user turn, is not read
    two transcripts                   whole dialogues as one text each, as in hh-rlhf:
                                      "\\n\\nHuman: ...\\n\\nAssistant: ..."

TRL also takes two plain texts without a prompt and calls their common beginning the prompt. That
knows no turns and may cut a word in two, so such rows are refused.

Dialogues that differ before their last turn, and transcripts whose turns do not alternate, are
faults (`different_prompts`, `transcript_order`) and not malformed rows: what was said is at fault,
not how it was written, so a run may leave them out.
"""

from __future__ import annotations

import re

from zephyr_lite.data.answers import Answer, FaultyRow, ReadyPair, get_list, get_text, to_score
from zephyr_lite.data.messages import Message, malformed, parse_messages
from zephyr_lite.data.sources import Row

SIDES = ("chosen", "rejected")
# Of ultrafeedback_binarized, and of Argilla's sets.
SCORE_KEYS = (("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating"))
MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
ANSWER_AWAITED = re.compile(r"\n\nAssistant:\s*\Z")
TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_ready(row: Row) -> ReadyPair:
    """The row's pair.

    Raises: DataError with file and line where it has none of the forms; FaultyRow where its two
    sides answer different prompts or a transcript's turns do not alternate.
    """
    keys = next((keys for keys in SCORE_KEYS if keys[0] in row.data), SCORE_KEYS[0])
    scores = [to_score(row, row.data.get(key), key) for key in keys]
    prompt, chosen, rejected = _split(row)
    if prompt[-1]["role"] != "user":
        raise malformed(row, f"the prompt's last role is {prompt[-1]['role']}, must be user")
    return ReadyPair(prompt, Answer(chosen, scores[0]), Answer(rejected, scores[1]))


def parse_prompt(row: Row) -> list[Message]:
    """The row's `prompt`: messages, a transcript up to the answer, or the user's text."""
    if isinstance(row.data.get("prompt"), list):
        return parse_messages(row, row.data["prompt"], "prompt")
    text = get_text(row, row.data, "prompt")
    # Only what also ends as one is a transcript: a user may well write "Human: ...".
    if _is_transcript(text) and ANSWER_AWAITED.search(text):
        return _parse_transcript(text, "prompt")[:-1]
    return [{"role": "user", "content": text}]


def _split(row: Row) -> tuple[list[Message], str, str]:
    """(prompt, chosen, rejected), whichever form the row has."""
    data = row.data
    if isinstance(data["chosen"], str) or isinstance(data["rejected"], str):
        chosen, rejected = (get_text(row, data, side) for side in SIDES)
        if "prompt" in data:
            return parse_prompt(row), chosen, rejected
        return _split_last(*_read_transcripts(row))
    lists = {side: get_list(row, side) for side in SIDES}
    is_answer_alone = all(len(turns) == 1 for turns in lists.values())
    before = parse_prompt(row) if is_answer_alone or isinstance(data.get("prompt"), list) else []
    dialogues = [parse_messages(row, [*before, *turns], side) for side, turns in lists.items()]
    for side, dialogue in zip(SIDES, dialogues, strict=True):
        if len(dialogue) < 2 or dialogue[-1]["role"] != "assistant":
            raise malformed(row, f"`{side}` must end with the assistant's answer to a prompt")
    return _split_last(*dialogues)


def _split_last(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], str, str]:
    if chosen[:-1] != rejected[:-1]:
        detail = "chosen and rejected must share every turn but the last"
        raise FaultyRow("different_prompts", detail)
    return chosen[:-1], chosen[-1]["content"], rejected[-1]["content"]


def _read_transcripts(row: Row) -> list[list[Message]]:
    for side in SIDES:
        if not _is_transcript(row.data[side]):
            hint = "two texts need a `prompt` beside them, unless both are whole transcripts"
            found = f"no key `prompt`, and `{side}` does not begin with 'Human:'"
            raise malformed(row, found, hint=hint)
    return [_parse_transcript(row.data[side], side) for side in SIDES]


def _is_transcript(text: str) -> bool:
    first = MARK.match(text)
    return first is not None and first[1] == "Human"


def _parse_transcript(text: str, side: str) -> list[Message]:
    """Turns of a transcript, white space around them aside, from the user's to the assistant's.

    Raises: FaultyRow where they do not alternate or the last is not the assistant's.
    """
    _, *parts = MARK.split(text)
    turns = list(zip(parts[::2], parts[1::2], strict=True))
    names = [name for name, _ in turns]
    if names != ["Human", "Assistant"] * (len(names) // 2):
        detail = f"turns of `{side}` must go Human, Assistant, ..., Human, Assistant"
        raise FaultyRow("transcript_order", detail)
    return [{"role": TRANSCRIPT_ROLES[name], "content": said.strip()} for name, said in turns]
