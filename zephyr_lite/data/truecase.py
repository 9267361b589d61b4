"""Truecasing: turns that were typed without capitals get them where sentences start.

About one dialogue in twenty that ultrachat_200k was drawn from had text like "Hello. how are you?"
(its dataset card). How it was repaired is not published; the rules here are our own:

- A sentence starts at the head of the text, after `.`, `!` or `?` and a space, and on a new line
  that ends as a sentence does and does not carry on the line before (a line without a full stop is
  as a rule material: words to sort, code). Its first letter becomes a capital.
- The pronoun `i` (i'm, i'd, i've) becomes `I` where English words stand around it.
- Nothing is touched in fenced or `inline` code, in lines that look like code, and in words that are
  not plain: URLs, file names, identifiers, eBay. No sentence starts after an abbreviation, an
  ellipsis or a list mark.
- Sentence starts are repaired where at least a quarter of a text's starts are small: one among many
  is likelier an abbreviation that we do not know than the author's way of typing.

Names (france) stay as they were typed: to know them takes a model, and a wrong capital is worse.

This is meant for turns of users. In the assistant's turns of real instruction data a small first
letter is as a rule code outside a fence (294 of 500 answers of one code set) or an answer of one
word, which a capital would make wrong, and the student learns those turns word for word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# A text is repaired where at least this share of the sentence starts in it is small.
WARRANTED = 0.25
# A line of at least this many characters that ends in a word is carried on by the next.
WRAPPED = 50
_ABBREVIATION = re.compile(
    r"al|approx|apt|ave|blvd|capt|cf|co|col|corp|dept|dr|eds?|eg|est|etc|figs?|ft|gen|gov|hrs?|ie"
    r"|inc|jr|lbs?|lit|lt|ltd|max|min|mrs?|ms|mt|nos?|op|oz|pp|pres|prof|pt|rep|resp|rev|sec|sen"
    r"|sgt|sr|st|tel|univ|viz|vol|vs"
)
# Words beside which a lone i is a number or a variable.
_COUNTED = re.compile(
    r"column|counter|element|index|int|integer|iteration|let|letter|part|phase|row|step|subscript"
    r"|type|variable"
)
_VARIABLE_VERB = re.compile(r"and|be|equals|in|is|minus|or|plus|th|times")
# Words that a pronoun at the end of a clause follows: "so do i?", "my friends and i".
_BEFORE_LAST_I = re.compile(
    r"am|and|are|as|but|can|could|did|do|does|had|have|if|may|might|must|or|shall|should|than|was"
    r"|were|will|would"
)
# What any repair needs somewhere: a small letter at what may be a start, or a lone i.
_CANDIDATE = re.compile(r"(?:\A\s*|[.!?]\s+|\n\s*)[\"'“‘(¿¡]*[^\W\d_A-Z]|(?<![^\W_])i(?![^\W_])")
HIDDEN = "\x1a"  # stands for code: no letter, no space, no punctuation
_CODE_SPAN = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`", re.DOTALL)
_CODE_LINE = re.compile(
    r"[{}<>=|\\]|;\s*$|\w\((?!s\))|->|::|^(?: {4}|\t)|^\s*(?:[$#%/]|import\s|from\s+\w+\s+import\b)"
)
_LINE = re.compile(r"[^\n]+")
_END = re.compile(r"[.!?][^\S\n]+(?!\s)")
_OPENING = re.compile(r"[ \t]*[\"'“‘(¿¡]*")
# Letters, with apostrophes and hyphens among them, then closing punctuation.
_PLAIN_WORD = re.compile(r"([^\W\d_]+(?:['’-][^\W\d_]+)*)[,.;:!?)\]\"'’”…]*(?!\S)")
_LONE_I = re.compile(r"(?<![\w.'’/\\@#$&*+~^:-])i(?![\w/\\@#$&*+~^:-])")
_CONTRACTION = re.compile(r"['’](?:m|d|ll|ve|ma)\b")
_NEXT_WORD = re.compile(r"\s+([^\W\d_]{2,})")
_CLAUSE_END = re.compile(r"[,.?!]*(?:\s|$)")
_LAST_WORD = re.compile(r"(\w+)\s+$")
_ENGLISH = re.compile(
    r"\b(?:am|are|can|could|did|do|does|for|have|how|is|me|my|not|of|that|the|this|to|was|what"
    r"|when|where|which|why|will|with|would|you|your|i['’](?:m|d|ll|ve))\b",
    re.IGNORECASE,
)


def truecase(text: str) -> str:
    """The text with capitals where sentences start and in the pronoun I, everything else as it was.

    Depends on the text alone; what it gives is not changed by another pass.
    """
    if not _CANDIDATE.search(text):
        return text
    prose = _hide_code(text)
    places = [*_small_starts(prose), *_pronouns(prose)]
    if not places:
        return text
    letters = list(text)
    for place in places:
        letters[place] = letters[place].upper()
    return "".join(letters)


def _hide_code(text: str) -> str:
    """The text, as long as it was, with `HIDDEN` in place of code."""
    prose = _CODE_SPAN.sub(lambda match: HIDDEN * len(match.group()), text)
    return _LINE.sub(lambda match: _hide_line(match.group()), prose)


def _hide_line(line: str) -> str:
    return HIDDEN * len(line) if _CODE_LINE.search(line) else line


def _small_starts(prose: str) -> list[int]:
    """Places of small letters at sentence starts; none where the text is typed with capitals."""
    starts = {_skip_opening(prose, place) for place in (*_line_starts(prose), *_ends(prose))}
    small = [place for place in starts if _is_small_word(prose, place)]
    capitals = sum(prose[place : place + 1].isupper() for place in starts)
    return small if len(small) >= WARRANTED * (len(small) + capitals) else []


def _skip_opening(prose: str, place: int) -> int:
    match = _OPENING.match(prose, place)
    return match.end() if match else place


def _is_small_word(prose: str, place: int) -> bool:
    """Whether a plain word in small letters stands at `place`; of single letters only `a` is."""
    match = _PLAIN_WORD.match(prose, place)
    if match is None:
        return False
    word, first = match.group(1), prose[place]
    # Letters such as the German sharp s have no single capital that leads back to them.
    is_twofold = len(first.upper()) == 1 and first.upper() != first == first.upper().lower()
    return is_twofold and word == word.lower() and (len(word) > 1 or word == "a")


def _line_starts(prose: str) -> Iterator[int]:
    """Starts of lines that hold a new sentence; the text's first line does."""
    before = ""
    for match in _LINE.finditer(prose):
        line = match.group().rstrip()
        if not line:
            continue
        if not before or (line[-1] in ".!?" and not _carries_on(before)):
            yield match.start()
        before = line


def _carries_on(line: str) -> bool:
    """Whether the sentence of this line is likely to go on in the next."""
    return line[-1] in ",;-–—&" or (len(line) >= WRAPPED and line[-1].isalnum())


def _ends(prose: str) -> Iterator[int]:
    """Places behind the spaces that end a sentence; new lines are `_line_starts`' affair."""
    for match in _END.finditer(prose):
        mark = match.start()
        head = prose[max(0, mark - 24) : mark]
        if prose[mark] != "." or _ends_sentence(head, at_head=len(head) == mark):
            yield match.end()


def _ends_sentence(head: str, *, at_head: bool) -> bool:
    """Whether a full stop behind `head` ends a sentence; `at_head`: the text begins with it."""
    line = head.rpartition("\n")[2]
    words = line.split()
    if not words or line[-1].isspace():
        return False
    word = words[-1].lstrip("\"'“‘(").lower()
    starts_line = len(words) == 1 and (at_head or "\n" in head)
    is_list_mark = starts_line and word.isdigit()
    is_initial = len(word) == 1 and word.isalpha() and word != "i"
    return not (is_list_mark or is_initial or "." in word or _ABBREVIATION.fullmatch(word))


def _pronouns(prose: str) -> list[int]:
    """Places of the pronoun i; none in a text without English words."""
    places = [m.start() for m in _LONE_I.finditer(prose) if _is_pronoun(prose, m.start())]
    return places if places and _ENGLISH.search(prose) else []


def _is_pronoun(prose: str, place: int) -> bool:
    if _CONTRACTION.match(prose, place + 1):
        return True
    match = _LAST_WORD.search(prose[max(0, place - 24) : place])
    before = match.group(1).lower() if match else ""
    if _COUNTED.fullmatch(before):
        return False
    if after := _NEXT_WORD.match(prose, place + 1):
        return not _VARIABLE_VERB.fullmatch(after.group(1).lower())
    is_last = _CLAUSE_END.match(prose, place + 1) is not None
    return is_last and _BEFORE_LAST_I.fullmatch(before) is not None
