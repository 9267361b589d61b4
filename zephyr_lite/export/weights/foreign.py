"""Adapters that others trained: on which base, with which tokenizer, under which template.

What TRL, axolotl, Unsloth or plain PEFT leave behind is a PEFT folder, and often beside it the
tokenizer and chat template that were trained with. Those win over the base's: a template that was
not trained is the most common reason for an export that does not stop. Folders only; whoever calls
resolves hub ids.

    read_foreign(adapters, base)        before anything is downloaded: variants are refused here
    find_chat(adapters, folder, rows)   once the base is a folder and its model is opened
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.adapter import WEIGHTS
from zephyr_lite.export.weights.base_weights import read_object
from zephyr_lite.export.weights.lora_config import CONFIG, read_lora_config

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
# Trainers rename a few reserved pieces; more means that it is another base's tokenizer.
RENAMED = 0.01


@dataclass(frozen=True)
class ForeignAdapter:
    """Adapters that can be folded, in that order, and the base they go on.

    base: a folder or hub id. notes: what a user should know, a sentence each.
    """

    folders: tuple[Path, ...]
    base: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Chat:
    """How the trained model is talked to.

    tokenizer: folder of the tokenizer.json in use. template: Jinja, None where nobody has one.
    eos: the tokenizer's end token. end_of_turn: what ends an answer under the template.
    special: texts of special tokens by their fields in tokenizer_config.json ("bos_token", ...).
    """

    tokenizer: Path
    template: str | None
    eos: str
    end_of_turn: str
    special: Mapping[str, str]
    notes: tuple[str, ...]

    def render(
        self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of `messages`, by Jinja in its sandbox. Raises: DataError where it fails."""
        if self.template is None:
            raise DataError("has no chat template", file=self.tokenizer)
        return _render(self.template, messages, self.special, add_generation_prompt, self.tokenizer)


def read_foreign(adapters: Sequence[Path], base: str | None) -> ForeignAdapter:
    """Accept adapter folders and settle their base.

    Args: adapters: in the order in which they were trained on top of each other. base: what the
        user names; None takes what the adapters name.
    Raises: RecipeError for a variant that cannot be folded, and where the base is not clear;
        DataError for missing or damaged files.
    """
    if not adapters:
        raise RecipeError("no adapter is given", hint="give the folder of a PEFT adapter")
    named: list[str | None] = []
    for folder in adapters:
        config = read_lora_config(folder)
        if not (folder / WEIGHTS).is_file():
            pickled = " (adapter_model.bin is a pickle)" * (folder / "adapter_model.bin").is_file()
            raise DataError(
                f"has no {WEIGHTS}{pickled}",
                file=folder,
                hint="save the adapter as safetensors; pickled weights are never loaded",
            )
        named.append(config.get("base_model_name_or_path") or None)
    if base is not None:
        return ForeignAdapter(tuple(adapters), base, tuple(_departures(adapters, named, base)))
    return ForeignAdapter(tuple(adapters), _named_base(adapters, named), ())


def find_chat(adapters: Sequence[Path], base: Path, rows: int, template: str | None = None) -> Chat:
    """Tokenizer, template and end token: of the last adapter that has them, else of the base.

    Args: rows: of the model's embedding, after adapters that resized it. template: in place of
        what is found.
    Raises: DataError for a tokenizer that is missing, damaged, larger than the embedding or another
        base's, and for a template that does not render.
    """
    folders = [*reversed(adapters), base]
    folder = next((f for f in folders if (f / TOKENIZER).is_file()), None)
    if folder is None:
        raise DataError(
            f"has no {TOKENIZER}, and no adapter brings one",
            file=base,
            hint="save the fast tokenizer beside the model; tokenizer.model is not read",
        )
    tokenizer = _open_tokenizer(folder / TOKENIZER)
    ids = tokenizer.get_vocab(with_added_tokens=True)
    _check_rows(folder / TOKENIZER, ids, rows)
    notes: list[str] = []
    if folder != base and (base / TOKENIZER).is_file():
        base_ids = _open_tokenizer(base / TOKENIZER).get_vocab(with_added_tokens=True)
        notes += _compare(folder / TOKENIZER, ids, base_ids)
    special = _special_texts(folder) or _special_texts(base)
    eos = special.get("eos_token")
    if eos is None or eos not in ids:
        raise DataError(f"names no eos_token of its vocabulary: {eos!r}", file=folder)
    origin = folder
    if template is None:
        template, origin = _find_template(folders)
    if template is None:
        notes.append("neither adapter nor base has a chat template")
    elif origin == base and folder != base:
        notes.append("the adapter brings a tokenizer without a chat template: the base's is taken")
    added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    end = eos if template is None else _end_of_turn(template, special, added, origin)
    return Chat(folder, template, eos, end, special, tuple(notes))


def _named_base(adapters: Sequence[Path], named: Sequence[str | None]) -> str:
    """The one base that the adapters name; a later one may name an adapter before it."""
    earlier = {str(folder) for folder in adapters}
    bases = {name for name in named if name is not None and name not in earlier}
    if len(bases) > 1:
        raise RecipeError(
            f"the adapters name different bases: {', '.join(sorted(bases))}",
            hint="name the base that all of them were trained on, or export them one by one",
        )
    if not bases:
        raise RecipeError(f"{adapters[0] / CONFIG} names no base", hint="name the base")
    base = bases.pop()
    is_place = base.startswith((".", "/", "~")) or "\\" in base
    if is_place and not Path(base).expanduser().is_dir():
        raise RecipeError(
            f"{adapters[0] / CONFIG} names the base {base}, which is no folder here",
            hint="name the base: a folder or a hub id",
        )
    return base


def _departures(adapters: Sequence[Path], named: Sequence[str | None], base: str) -> list[str]:
    earlier = {str(folder) for folder in adapters}
    return [
        f"{folder} was trained on {name or '(no name)'}; whether {base} is the same cannot be told "
        "from its name, only that its shapes fit"
        for folder, name in zip(adapters, named, strict=True)
        if name != base and name not in earlier
    ]


def _open_tokenizer(path: Path) -> Tokenizer:
    read_object(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception, nothing narrower
        raise DataError(f"unsound tokenizer: {str(error)[:200]}", file=path) from None


def _check_rows(path: Path, ids: Mapping[str, int], rows: int) -> None:
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    if beyond:
        tokens = ", ".join(repr(token) for _, token in beyond[:3])
        raise DataError(
            f"has {len(beyond)} tokens beyond the {rows} rows of the embedding: {tokens}",
            file=path,
            hint="the trainer added tokens: save the resized embedding and head with the adapter "
            "(modules_to_save), or give the tokenizer that belongs to this base",
        )


def _compare(path: Path, ids: Mapping[str, int], base_ids: Mapping[str, int]) -> list[str]:
    """Hold the adapter's tokenizer against the base's; a sentence about what was renamed."""
    own = {number: token for token, number in ids.items()}
    changed = sorted((n, t) for t, n in base_ids.items() if own.get(n) != t)
    if not changed:
        return []
    number, token = changed[0]
    if len(changed) > RENAMED * len(base_ids):
        raise DataError(
            f"is another tokenizer than the base's: {len(changed)} of {len(base_ids)} tokens "
            f"differ, first {number}: {own.get(number)!r}, the base has {token!r}",
            file=path,
            hint="give the base that this adapter and its tokenizer belong to",
        )
    return [f"the tokenizer renames {len(changed)} tokens, first {token!r} to {own.get(number)!r}"]


def _special_texts(folder: Path) -> dict[str, str]:
    """`bos_token`, `eos_token`, ... -> text; both forms in use: "</s>" and {"content": "</s>"}."""
    texts: dict[str, str] = {}
    for name in ("special_tokens_map.json", TOKENIZER_CONFIG):
        path = folder / name
        for field, value in (read_object(path) if path.is_file() else {}).items():
            text = value.get("content") if isinstance(value, dict) else value
            if field.endswith("_token") and isinstance(text, str):
                texts[field] = text
    return texts


def _find_template(folders: Sequence[Path]) -> tuple[str | None, Path]:
    for folder in folders:
        if (template := _template_in(folder)) is not None:
            return template, folder
    return None, folders[-1]


def _template_in(folder: Path) -> str | None:
    path = folder / TEMPLATE
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", file=path) from None
    path = folder / TOKENIZER_CONFIG
    stored: Any = (read_object(path) if path.is_file() else {}).get("chat_template")
    if isinstance(stored, list):  # several by name
        named = {t["name"]: t["template"] for t in stored if {"name", "template"} <= t.keys()}
        stored = named.get("default")
    return stored if isinstance(stored, str) and stored else None


def _end_of_turn(
    template: str, special: Mapping[str, str], added: Sequence[str], origin: Path
) -> str:
    """The token behind an answer; the end token where the template sets none there."""
    question, answer = "A question.", "An answer."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = _render(template, messages, special, False, origin)
    behind = text.rpartition(answer)[2].lstrip() if answer in text else ""
    marks = [token for token in [*added, special["eos_token"]] if behind.startswith(token)]
    return max(marks, key=len) if marks else special["eos_token"]


def _render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    special: Mapping[str, str],
    add_generation_prompt: bool,
    origin: Path,
) -> str:
    names: dict[str, Any] = dict(special)
    try:
        texts, _ = render_jinja_template(
            [[dict(m) for m in messages]],
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            **names,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise DataError(f"chat template: {str(error)[:200]}", file=origin) from None
    return texts[0]
