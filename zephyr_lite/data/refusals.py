"""Dialogues in which the assistant refuses as a machine: "I do not have emotions".

ultrachat_200k leaves out dialogues in which the assistant says "I do not have emotions" or "I don't
have opinions" (its dataset card), since a model trained on them says so to questions of fact. Three
kinds of statement in the first person count, whatever their case, spacing or kind of apostrophe:

    I do not have / have no / lack     emotions, opinions, feelings, beliefs, consciousness, ...
    As an AI language model, I         ... cannot, don't, am unable: a denial in the same sentence
    I am an AI assistant, and          ... cannot, do not, am not

"As an AI assistant, I can help you" denies nothing and passes, and so does "I don't have feelings
for him". A statement right behind an opening quotation mark is somebody else's speech (the robot of
a story) and passes too; reported speech without marks ("He said: I do not have opinions") is taken
for the assistant's own, since nothing in the text tells them apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

# Everything is matched in lower case, with plain apostrophes. `_STEM` is in every statement: the
# patterns, which are slow, are tried only around one.
_STEM = re.compile(
    r"emotion|opinion|belief|feeling|conscious|sentien|self-aware|preference|experience|language"
    r"|chatbot|artificial|\ba\.?i\b"
)
_BEFORE_STEM, _AFTER_STEM = 100, 200  # characters, more than a statement has on either side
_ADVERB = r"(?:\s+(?:actually|also|currently|just|merely|only|personally|really|simply|truly))?"
_NOT = r"(?:do\s+not|don't|cannot|can't|can\s+not|am\s+not|am\s+unable|was\s+not|wasn't)"
_KIND = r"(?:(?:a|actual|any|human|individual|my|own|personal|real|subjective|true)\s+){0,4}"
_LACKED = (
    r"(?:emotions?|opinions|(?<=personal\s)opinion|(?:(?<=personal\s)|(?<=human\s)|(?<=lived\s))"
    r"experiences?|beliefs|consciousness|sentience|self-awareness|(?<=personal\s)preferences?"
    r"|feelings(?!\s+(?:about|for|toward|towards)\b))"
)
# "As an AI researcher, I ..." is a person: after the name of the machine comes more of it, or the
# end of the noun.
_MACHINE = (
    r"an?\s+(?:\w+\s+){0,2}?(?:ai|a\.i\.|artificial\s+intelligence|language\s+model|chatbot)"
    r"(?:\s+(?:agent|ai|assistant|bot|chat|chatbot|entity|language|large|machine|model|program"
    r"|software|system|text-based|tool|virtual)){0,4}"
    r"(?=,|\s+(?:and|based|built|but|by|created|designed|developed|from|i|made|so|that|there"
    r"|trained|which|who|with|without)\b)"
)
_REFUSAL = re.compile(
    rf"""(?<!["'“«])\b(?:
        i{_ADVERB}\s+(?:do\s+not|don't|cannot|can't|can\s+not){_ADVERB}
            \s+(?:experience|feel|form|have|hold|possess)\s+{_KIND}{_LACKED}\b
      | i{_ADVERB}\s+(?:have\s+no|hold\s+no|possess\s+no|lack)\s+{_KIND}{_LACKED}\b
      | as\s+{_MACHINE}[^.!?\n]{{0,60}}?,?\s+i\b[^.!?\n]{{0,60}}?
            (?:\bnot\b|n't\b|\bcannot\b|\bunable\b|\bhave\s+no\b|\black\b)
      | (?:i'm|i\s+am){_ADVERB}\s+{_MACHINE}[^.!?\n]{{0,60}}?(?:,|\band\b|\bso\b)
            \s+(?:i\s+)?{_NOT}\b
    )""",
    re.VERBOSE,
)
_APOSTROPHES = str.maketrans("’‘ʼ`´", "'''''")


def find_refusal(messages: Sequence[Mapping[str, str]]) -> int | None:
    """Index of the first assistant turn that refuses as a machine, or None."""
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and is_refusal(message["content"]):
            return i
    return None


def is_refusal(text: str) -> bool:
    """Whether the text denies in the first person what a machine lacks or cannot do."""
    plain = text.lower().translate(_APOSTROPHES)
    return any(
        _REFUSAL.search(plain, max(0, stem.start() - _BEFORE_STEM), stem.end() + _AFTER_STEM)
        for stem in _STEM.finditer(plain)
    )
