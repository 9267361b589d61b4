"""Zephyr's chat format: text, token ids, and which tokens are the assistant's.

    <|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n

A dialogue without a system turn gets an empty one. The role marks are plain text; `</s>` is the
tokenizer's own end token, learnt as part of every answer; the newline after it is context and is
never scored. One BOS stands at the head of the ids, none in the text. The same bytes are used in
training, in chat and in the exported file.

Ids come from `tokenizer.json` itself: loading it through transformers' AutoTokenizer may replace
its normaliser and gives other ids for leading spaces.

Text between two control tokens is encoded on its own, so an answer's ids are found in two ways
that must agree: behind the fixed ids of its header in the whole dialogue, or in a text that holds
only that turn. `load_tokenizer` checks that they do, every call checks the header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from zephyr_lite.data.encoded import EncodedDialogue, EncodedPair, truncate_pair
from zephyr_lite.data.messages import ROLES
from zephyr_lite.data.word_ids import word_ids
from zephyr_lite.errors import DataError

# One line, so that no whitespace option of any Jinja (trim_blocks, lstrip_blocks) can change it.
ZEPHYR_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|system|>\\n' + eos_token + '\\n' }}"
    "{% endif %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<|system|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '<|user|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% else %}"
    "{{ raise_exception('roles are system, user and assistant') }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
ASSISTANT_HEADER = "\n<|assistant|>\n"
BATCH = 512
Item = TypeVar("Item")
Result = TypeVar("Result")


def template_hash() -> str:
    """SHA-256 (hex) of the template's UTF-8 bytes."""
    return hashlib.sha256(ZEPHYR_TEMPLATE.encode()).hexdigest()


def render(
    messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False, *, eos: str = "</s>"
) -> str:
    """The text of `messages`, equal to `ZEPHYR_TEMPLATE`'s. Contents are taken as they are."""
    if not messages:
        raise DataError("a dialogue without messages")
    parts = [] if messages[0]["role"] == "system" else [f"<|system|>\n{eos}\n"]
    for message in messages:
        if message["role"] not in ROLES:
            hint = f"roles are {', '.join(ROLES)}"
            raise DataError(f"unknown role {message['role']!r:.40}", hint=hint)
        parts.append(f"<|{message['role']}|>\n{message['content']}{eos}\n")
    if add_generation_prompt:
        parts.append("<|assistant|>\n")
    return "".join(parts)


class ChatTokenizer:
    """A tokenizer that knows the chat format.

    `bos_id` is None for a tokenizer that sets no BOS (Qwen). `special_tokens`: texts that encode
    to a control token; a content must hold none of them.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos: str | None, eos: str) -> None:
        # A tokenizer.json may carry the padding or truncation of whoever saved it.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.bos, self.eos = bos, eos
        self.bos_id = None if bos is None else _token_id(tokenizer, bos)
        self.eos_id = _token_id(tokenizer, eos)
        added = tokenizer.get_added_tokens_decoder().values()
        control = {token.content for token in added if token.special} | {eos}
        self.special_tokens: tuple[str, ...] = tuple(sorted(control | ({bos} if bos else set())))
        self._words = word_ids(tokenizer, eos, self.eos_id)
        self._header = self._find_header()
        self._check_independence()

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def identity(self) -> str:
        """SHA-256 (hex) of all that decides which ids a text gets.

        Of the tokenizer as it is in memory: how its file is spaced changes nothing.
        """
        parts = (self._tokenizer.to_str(), self.bos, self.eos)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def has_special_text(self, text: str) -> bool:
        """Whether `text` spells a control token and would be encoded as one."""
        return any(token in text for token in self.special_tokens)

    def encode_dialogue(self, messages: Sequence[Mapping[str, str]]) -> EncodedDialogue:
        """Ids and assistant mask of one dialogue; `encode_dialogues` is several times faster."""
        return self.encode_dialogues([messages])[0]

    def encode_dialogues(
        self,
        dialogues: Sequence[Sequence[Mapping[str, str]]],
        names: Sequence[str] | None = None,
    ) -> list[EncodedDialogue]:
        """Ids and assistant masks, in order. One BOS at the head, the last newline kept.

        Args:
            names: what an error calls each dialogue.
        Raises: DataError for a content that spells a control token, or a tokenizer that joins the
            end of the header with the beginning of an answer.
        """
        encoded: list[EncodedDialogue] = []
        for start in range(0, len(dialogues), BATCH):
            batch = dialogues[start : start + BATCH]
            called = None if names is None else names[start : start + BATCH]
            rows = self._encode(list(_each(self._render, batch, called)), called)
            encoded += _each(self._mark_answers, zip(batch, rows, strict=True), called)
        return encoded

    def encode_pair(
        self,
        prompt_messages: Sequence[Mapping[str, str]],
        chosen: str,
        rejected: str,
        *,
        max_length: int,
        max_prompt_length: int,
    ) -> EncodedPair:
        """One preference pair, truncated by `truncate_pair`; `encode_pairs` is faster."""
        pair = (prompt_messages, chosen, rejected)
        (encoded,) = self.encode_pairs(
            [pair], max_length=max_length, max_prompt_length=max_prompt_length
        )
        return encoded

    def encode_pairs(
        self,
        pairs: Sequence[tuple[Sequence[Mapping[str, str]], str, str]],
        names: Sequence[str] | None = None,
        *,
        max_length: int,
        max_prompt_length: int,
    ) -> list[EncodedPair]:
        """(prompt messages, chosen, rejected) as ids, in order.

        Arguments and errors as in `encode_dialogues`.
        """
        limits = (max_length, max_prompt_length, self.bos_id)
        encoded = []
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            called = None if names is None else names[start : start + BATCH]
            texts = _each(lambda pair: self._render(pair[0], True), batch, called)
            prompts = self._encode(list(texts), called)
            twice = None if called is None else [name for name in called for _ in range(2)]
            answers = self.encode_answers([text for pair in batch for text in pair[1:]], twice)
            both = zip(prompts, answers[::2], answers[1::2], strict=True)
            encoded += [truncate_pair(self._with_bos(p), c, r, *limits) for p, c, r in both]
        return encoded

    def encode_answers(
        self, answers: Sequence[str], names: Sequence[str] | None = None
    ) -> list[np.ndarray]:
        """int32 ids of answers as they follow `<|assistant|>\\n`, each with its `</s>`."""
        texts = list(_each(self._place_answer, answers, names))
        rows = self._encode(texts, names)
        return list(_each(lambda ids: self._cut_header(ids[1:]), rows, names))

    def encode_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids to generate an answer from: BOS, the dialogue so far, `<|assistant|>\\n`."""
        ids = self._encode([self._render(messages, True)])[0]
        return self._with_bos(ids).tolist()

    def encode_text(self, text: str) -> np.ndarray:
        """int32 ids of a plain document: BOS, text, EOS."""
        self._refuse_special(text)
        return self._with_bos(self._encode([text + self.eos])[0])

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, control tokens left out.

        Ids that do not begin with BOS continue a text, as an answer does: their leading space
        is the answer's own and stays.
        """
        row = [int(i) for i in ids]
        if not row or row[0] == self.bos_id:
            return self._tokenizer.decode(row)
        header = self._header.tolist()
        return self._tokenizer.decode(header + row)[len(self._tokenizer.decode(header)) :]

    def _render(self, messages: Sequence[Mapping[str, str]], prompt: bool = False) -> str:
        for message in messages:
            self._refuse_special(message["content"])
        return render(messages, prompt, eos=self.eos)

    def _place_answer(self, answer: str) -> str:
        """An answer between control tokens, as it stands in a dialogue."""
        self._refuse_special(answer)
        return f"{self.eos}{ASSISTANT_HEADER}{answer}{self.eos}"

    def _refuse_special(self, text: str) -> None:
        if self.has_special_text(text):
            found = next(token for token in self.special_tokens if token in text)
            hint = "it would be encoded as that token; data.on_fault=drop leaves such rows out"
            raise DataError(f"a text spells the control token {found!r}", hint=hint)

    def _encode(self, texts: list[str], names: Sequence[str] | None = None) -> list[np.ndarray]:
        try:
            if self._words is not None:
                return [self._words.encode(text) for text in texts]
            rows = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            list(_each(_check_unicode, texts, names))
            raise
        return [np.array(row.ids, dtype=np.int32) for row in rows]

    def _with_bos(self, ids_T: np.ndarray) -> np.ndarray:
        if self.bos_id is None:
            return ids_T
        return np.concatenate([np.array([self.bos_id], dtype=np.int32), ids_T])

    def _mark_answers(
        self, dialogue: tuple[Sequence[Mapping[str, str]], np.ndarray]
    ) -> EncodedDialogue:
        """Ids with BOS, and mask, of (messages, ids): turn k ends at the k-th `</s>`."""
        messages, ids_T = dialogue
        roles = [message["role"] for message in messages]
        roles = roles if roles[0] == "system" else ["system", *roles]
        ends = np.flatnonzero(ids_T == self.eos_id)
        if len(ends) != len(roles):
            raise DataError(f"{len(roles)} turns became {len(ends)} end tokens")
        mask_T = np.zeros(len(ids_T), dtype=np.bool_)
        for turn, role in enumerate(roles):
            if role == "assistant":
                answer = self._cut_header(ids_T[ends[turn - 1] + 1 : ends[turn] + 1])
                mask_T[ends[turn] + 1 - len(answer) : ends[turn] + 1] = True
        ids_T = self._with_bos(ids_T)
        mask_T = np.concatenate([np.zeros(len(ids_T) - len(mask_T), np.bool_), mask_T])
        return EncodedDialogue(ids_T, mask_T)

    def _cut_header(self, ids: np.ndarray) -> np.ndarray:
        size = len(self._header)
        if not np.array_equal(ids[:size], self._header):
            raise DataError(
                "this tokenizer joins '<|assistant|>\\n' with the beginning of an answer, so the "
                "prompt's ids are not a prefix of the dialogue's",
                hint="the answer may begin with a newline; such rows cannot be trained on",
            )
        return ids[size:]

    def _find_header(self) -> np.ndarray:
        ids = self._encode([self.eos + ASSISTANT_HEADER])[0]
        if len(ids) < 2 or ids[0] != self.eos_id:
            raise DataError(f"{self.eos!r} in a text is not encoded as the end token")
        return ids[1:]

    def _check_independence(self) -> None:
        """Raises: DataError where an answer's ids depend on the turns before it."""
        for answer in ("Hello", "  two spaces", "naïve\n\n1. 数"):
            prompt = [{"role": "user", "content": " Hi there"}]
            whole = self._encode([render(prompt, True, eos=self.eos) + answer + self.eos])[0]
            head = self._encode([render(prompt, True, eos=self.eos)])[0]
            parts = np.concatenate([head, self.encode_answers([answer])[0]])
            if not np.array_equal(whole, parts):
                raise DataError("this tokenizer encodes an answer differently behind its prompt")


def _each(
    call: Callable[[Item], Result], items: Iterable[Item], names: Sequence[str] | None
) -> Iterator[Result]:
    """`call` of each item; its DataError names the item."""
    for index, item in enumerate(items):
        try:
            yield call(item)
        except DataError as error:
            if names is None:
                raise
            raise DataError(f"{names[index]}: {error}", hint=error.hint) from None


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError("a text that is not Unicode (a lone surrogate)") from None


def load_tokenizer(folder: Path) -> ChatTokenizer:
    """The tokenizer of a model folder, from `tokenizer.json` and `tokenizer_config.json`.

    Path fields in those files are ignored: only these fixed names are read.
    Raises: DataError for a missing or unsound file, or where no end token is named.
    """
    file = Path(folder) / "tokenizer.json"
    if not file.is_file():
        hint = "the model needs a fast tokenizer; save one beside its weights"
        raise DataError("no tokenizer.json", file=file, hint=hint)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception, nothing narrower
        raise DataError(f"unsound tokenizer: {str(error)[:200]}", file=file) from error
    config = _read_config(Path(folder) / "tokenizer_config.json")
    default_eos = "</s>" if tokenizer.token_to_id("</s>") is not None else None
    eos = _token_text(config.get("eos_token")) or default_eos
    if eos is None:
        hint = "name `eos_token` in tokenizer_config.json"
        raise DataError("the tokenizer names no end token", file=file, hint=hint)
    return ChatTokenizer(tokenizer, bos=_find_bos(tokenizer, config), eos=eos)


def _find_bos(tokenizer: Tokenizer, config: Mapping[str, Any]) -> str | None:
    """The BOS text, or None where this tokenizer puts none before a text."""
    named = _token_text(config.get("bos_token"))
    own = [token for token in tokenizer.encode("").tokens if named in (None, token)]
    if config.get("add_bos_token") is False:
        return None
    if config.get("add_bos_token") is True and named:
        return named
    return own[0] if own else None


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"not JSON: {str(error)[:100]}", file=file) from error
    if not isinstance(config, dict):
        raise DataError(f"must be an object, found {type(config).__name__}", file=file)
    return config


def _token_text(value: Any) -> str | None:
    """Both forms in use: "</s>" and {"content": "</s>", ...}."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    number = tokenizer.token_to_id(token)
    if number is None:
        raise DataError(f"the tokenizer has no token {token!r}")
    return number
