"""Is the exported file the trained model? Same ids, same template, same stop, and how far apart.

A GGUF that loads proves little: llama.cpp takes swapped rotary rows, missing scores and a foreign
end-of-turn token without complaint. So each is compared with the model it came from:

    tokens      ids of odd strings, of every rendered prompt and of all pieces of the vocabulary run
                together (where a wrong order of merges shows) are equal; of composed text where
                the tokenizer composes it first, see byte_level.NFC_NOTE
    template    the stored text is verbatim; llama.cpp's rendering of every prompt, and of every odd
                string as the content of a turn, is equal in text and in ids
    stop        generating the end-of-turn token ends the turn
    drift       over positions behind each prompt, see `drift.py`

llama.cpp keeps its cache in f32 and leaves flash attention out for this, so that what is left is
the file's own: an F32 file then agrees to 1e-7.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import gguf
import torch
from jinja2 import TemplateError
from tokenizers import Tokenizer

from zephyr_lite.errors import DataError, MachineError, VerificationError
from zephyr_lite.export.check.drift import GATES, Drift, Gate
from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.export.check.texts import odd_strings
from zephyr_lite.export.gguf.byte_level import composes
from zephyr_lite.export.gguf.reading import LayoutReader

Truth = Callable[[list[int]], torch.Tensor]
Messages = list[dict[str, str]]
Render = Callable[[Messages], str]
BaseWeights = Literal["nf4", "original"]
MIN_POSITIONS = 32
# Positions x vocabulary: 640 positions of 32,000 tokens, 90 s, most of it llama.cpp's own JSON.
MAX_PROBABILITIES = 20_480_000
# The base's own rounding to NF4 lies between the file and the model: relative error 0.092, Q4_K's
# 0.071, and KL grows with its square. tiny measured 8.8e-3 nats, a model of 6.8M parameters 1.0e-3.
ORIGINAL_WEIGHTS = Gate(0.06, 1.0, 0.98, 6.0)
# A truth computed in bf16 products: tiny measured 3e-5 nats, stories260K 3.3e-4.
BF16_TRUTH = Gate(2e-3, 0.5, 0.99, 0.5)
_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class ExportMismatch(VerificationError):
    """The file is not the model; `report` holds every figure that was measured."""

    def __init__(self, message: str, report: dict[str, Any], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


def verify_gguf(
    path: Path,
    truth: Truth,
    tokenizer: Tokenizer,
    chat_template: str | None,
    render: Render,
    prompts: Sequence[Messages],
    n_tokens: int = 64,
    *,
    answers: Sequence[list[int]] | None = None,
    eos_token: str = "</s>",
    threads: int | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
    base_weights: BaseWeights = "nf4",
    truth_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Compare a GGUF file, which may still be called `.part`, with the model it was written from.

    Args:
        truth: ids -> log-probabilities at every position, fp32 [len(ids), V].
        chat_template: what must be stored, verbatim; None where the model has none.
        render: messages -> text with the generation prompt, as training rendered them.
        prompts: dialogues that end with a user turn.
        n_tokens: positions compared behind each prompt; fewer where the turn ends, or where a large
            vocabulary would take more than MAX_PROBABILITIES.
        answers: token ids to follow; default: the truth's own greedy continuation.
        on_prompt: called with (prompts compared, prompts in all).
        base_weights: `original` where the file holds the base's 16-bit weights and the truth its
            NF4 values; `truth_dtype`: what the truth multiplies in. Both widen the gate.
    Returns: report: `tokens`, `template`, `stop`, `drift`, `gate`, `passed`.
    Raises: ExportMismatch (a VerificationError, with `.report`) naming every failed check;
        MachineError without llama.cpp.
    """
    file_type, stored, stored_eos = _read_header(path)
    gate, allowances = _gate(file_type, base_weights, truth_dtype)
    eos = _token_id(tokenizer, eos_token)
    rendered = [_without_bos(render(messages), tokenizer) for messages in prompts]
    ids = [tokenizer.encode(text).ids for text in rendered]
    n_ctx = max(map(len, ids), default=0) + n_tokens + 16
    name = path.name.removesuffix(".part")
    report: dict[str, Any] = {"file": name, "type": file_type, "base_weights": base_weights}
    with LlamaCppModel(path, n_ctx=n_ctx, exact=True, threads=threads) as model:
        report["tokens"] = compare_tokens(model, tokenizer, rendered)
        report["template"] = {"verbatim": stored == chat_template}
        if chat_template is not None:
            report["template"] |= compare_template(model, tokenizer, render, prompts)
        also = _text_that_ends_turns(tokenizer, stored_eos)
        report["stop"] = {"token": eos_token, "ends_turn": model.stops_at(eos), "also": also}
        n_tokens = _affordable(n_tokens, len(prompts), model.vocab_size)
        drift = Drift()
        for nth, prompt_ids in enumerate(ids):
            if answers is not None:
                answer = answers[nth][:n_tokens]
            else:
                answer = _truth_greedy(model, truth, prompt_ids, n_tokens, eos)
            _add_rows(drift, model, truth, prompt_ids, answer)
            if on_prompt is not None:
                on_prompt(nth + 1, len(ids))
    report["drift"] = drift.figures(gate.decided_gap) | {"positions_per_prompt": n_tokens}
    return _judge(report, gate, allowances)


def summary(report: dict[str, Any]) -> str:
    """A report of `verify_gguf` in one line, for a person."""
    drift = report["drift"]
    n = drift["positions"]
    name = report["type"].removeprefix("MOSTLY_").removeprefix("ALL_")
    parts = [
        f"KL {drift['kl_mean']:.2g}",
        f"perplexity {drift['perplexity_percent']:+.2f} %",
        f"top-1 {100 * drift['top1']:.1f} %",
    ]
    text = f"{name}: {', '.join(parts)} (of {n} positions"
    text += ")" if n >= MIN_POSITIONS else f", which is few: {MIN_POSITIONS} should be compared)"
    if report["base_weights"] == "original":
        text += (
            f"; on the base's original weights: nll {drift['nll_file']:.4f}, "
            f"of the model as trained {drift['nll_truth']:.4f}"
        )
    return text


def compare_tokens(
    model: LlamaCppModel, tokenizer: Tokenizer, rendered: Sequence[str]
) -> dict[str, Any]:
    """Prompts are counted, never quoted: they may be somebody's data."""
    composed = composes(json.loads(tokenizer.to_str()))

    def differs(text: str) -> bool:
        return not _same_ids(model, tokenizer, text, composed)

    strings, sweep = odd_strings(_special(tokenizer)), list(_pieces_run_together(tokenizer))
    return {
        "compared": len(strings) + len(rendered) + len(sweep),
        "composed": composed,
        "different_strings": [text for text in strings if differs(text)],
        "different_prompts": [i for i, text in enumerate(rendered) if differs(text)],
        "different_sweeps": sum(map(differs, sweep)),
    }


def compare_template(
    model: LlamaCppModel, tokenizer: Tokenizer, render: Render, prompts: Sequence[Messages]
) -> dict[str, Any]:
    """Every odd string as a user's turn, many as a system's or an assistant's; and the prompts.

    Where the template itself sets the BOS that the tokenizer sets too, llama.cpp takes it off.
    """
    composed = composes(json.loads(tokenizer.to_str()))

    def differs(messages: Messages) -> bool:
        expected = _without_bos(render(messages), tokenizer)
        try:
            text = model.apply_template(messages)
        except MachineError:  # llama.cpp's Jinja refuses what the model's own takes
            return True
        return text != expected or not _same_ids(model, tokenizer, text, composed)

    strings = odd_strings(_special(tokenizer))
    roles = [role for role in ("system", "assistant") if _takes(render, role)]
    contents = [(text, _turns("user", text)) for text in strings]
    for nth, role in enumerate(roles):
        contents += [(text, _turns(role, text)) for text in strings[nth :: len(roles)]]
    return {
        "compared": len(contents) + len(prompts),
        "roles": ["user", *roles],
        "different_strings": [text for text, messages in contents if differs(messages)],
        "different_prompts": [i for i, messages in enumerate(prompts) if differs(messages)],
    }


def _same_ids(model: LlamaCppModel, tokenizer: Tokenizer, text: str, composed: bool) -> bool:
    sent = unicodedata.normalize("NFC", text) if composed else text
    return model.tokenize(sent) == tokenizer.encode(sent).ids


def _turns(role: str, content: str) -> Messages:
    before = [{"role": "user", "content": "Hi"}] if role == "assistant" else []
    after = [] if role == "user" else [{"role": "user", "content": "Go on"}]
    return [*before, {"role": role, "content": content}, *after]


def _token_id(tokenizer: Tokenizer, text: str) -> int:
    number = tokenizer.token_to_id(text)
    if number is None:
        raise DataError(f"the tokenizer has no token {text!r}")
    return number


def _takes(render: Render, role: str) -> bool:
    """Whether the template has a place for such turns; Gemma's has none for a system's."""
    try:
        render(_turns(role, "x"))
    except (TemplateError, DataError):
        return False
    return True


def _special(tokenizer: Tokenizer) -> tuple[str, ...]:
    added = tokenizer.get_added_tokens_decoder().values()
    return tuple(token.content for token in added if token.special)[:32]


def _without_bos(text: str, tokenizer: Tokenizer) -> str:
    """Rendered text as it must be encoded: the tokenizer puts its BOS in front, once."""
    if set_by_tokenizer := tokenizer.encode("").ids[:1]:
        return text.removeprefix(tokenizer.id_to_token(set_by_tokenizer[0]) or "")
    return text


def _pieces_run_together(tokenizer: Tokenizer, per_text: int = 64) -> Iterator[str]:
    """Texts that hold every piece twice, beside pieces learnt early and learnt late."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ids = tokenizer.get_vocab(with_added_tokens=False)
    names = [name for name in sorted(ids, key=ids.__getitem__) if name not in special]
    if "ByteLevel" in json.dumps(json.loads(tokenizer.to_str())["decoder"]):
        texts = tokenizer.decode_batch([[ids[name]] for name in names])
        pieces = [text for text in texts if "\ufffd" not in text]  # no half characters
    else:
        pieces = [n.replace("\u2581", " ") for n in names if not _BYTE_PIECE.fullmatch(n)]
    stride = -(-len(pieces) // per_text)
    for start in range(stride):
        yield "".join(pieces[start * per_text : (start + 1) * per_text])
        yield "".join(pieces[start::stride])


def _affordable(n_tokens: int, prompts: int, vocab_size: int) -> int:
    """Positions a prompt: as asked, within MAX_PROBABILITIES, yet MIN_POSITIONS in all."""
    positions = max(MIN_POSITIONS, MAX_PROBABILITIES // vocab_size)
    return min(n_tokens, -(-positions // max(prompts, 1)))


def _add_rows(
    drift: Drift, model: LlamaCppModel, truth: Truth, ids: list[int], answer: list[int]
) -> None:
    """Both predictions at each position behind a prompt."""
    truth_TV = _checked(truth(ids + answer), model)[len(ids) - 1 : -1]
    file_TV = model.log_probs_along(ids, answer)
    for truth_V, file_V, target in zip(truth_TV, file_TV, answer, strict=True):
        drift.add(truth_V, file_V, target)


def _truth_greedy(
    model: LlamaCppModel, truth: Truth, ids: list[int], n_tokens: int, eos: int
) -> list[int]:
    """The truth's own greedy continuation, up to and with `eos`.

    By speculation: the file drafts, one pass of the truth checks the whole draft and corrects its
    first wrong token. Exact whatever the file drafts; a good file makes it one or two passes.
    """
    path: list[int] = []
    while len(path) < n_tokens and path[-1:] != [eos]:
        draft = model.greedy(ids + path, n_tokens - len(path))
        truth_TV = _checked(truth(ids + path + draft[:-1]), model)[len(ids) + len(path) - 1 :]
        for drafted, chosen in zip(draft, truth_TV.argmax(dim=1).tolist(), strict=True):
            path.append(chosen)
            if chosen != drafted or chosen == eos:
                break
    return path


def _checked(rows_TV: torch.Tensor, model: LlamaCppModel) -> torch.Tensor:
    if rows_TV.shape[1] != model.vocab_size:
        raise VerificationError(
            f"the model predicts {rows_TV.shape[1]} tokens, the file {model.vocab_size}"
        )
    if rows_TV.isnan().any():
        raise VerificationError("the trained model's own log-probabilities hold NaN")
    return rows_TV.float().cpu()


def _read_header(path: Path) -> tuple[str, str | None, int | None]:
    """(name of the file type, chat template, end-of-text token)."""
    reader, keys = LayoutReader.opened(path), gguf.Keys.Tokenizer
    fields = map(reader.get_field, (gguf.Keys.General.FILE_TYPE, keys.CHAT_TEMPLATE, keys.EOS_ID))
    kind, template, eos = (None if field is None else field.contents() for field in fields)
    name = "unknown" if kind is None else gguf.LlamaFileType(int(kind)).name
    if name not in GATES:
        raise VerificationError(f"{path}: there is no gate for file type {name}")
    return name, template, None if eos is None else int(eos)


def _text_that_ends_turns(tokenizer: Tokenizer, stored_eos: int | None) -> str | None:
    """The file's own end token where it is one of plain text: answers would break off at it.

    It need not be the end of a turn: llama.cpp also stops at the tokens it knows by their text.
    """
    added = tokenizer.get_added_tokens_decoder()
    if stored_eos is None or stored_eos in added:
        return None
    return tokenizer.id_to_token(stored_eos) or f"<token {stored_eos}>"


def _gate(
    file_type: str, base_weights: BaseWeights, truth_dtype: torch.dtype
) -> tuple[Gate, list[str]]:
    gate, allowances = GATES[file_type], []
    if base_weights == "original":
        gate = gate.widened(ORIGINAL_WEIGHTS)
        allowances.append("the base's original weights, where the model was trained on NF4")
    if truth_dtype != torch.float32:
        gate = gate.widened(BF16_TRUTH)
        allowances.append(f"the model computed in {str(truth_dtype).removeprefix('torch.')}")
    return gate, allowances


def _judge(report: dict[str, Any], gate: Gate, allowances: list[str]) -> dict[str, Any]:
    tokens, template = report["tokens"], report["template"]
    failures = []
    wrong = len(tokens["different_strings"]) + len(tokens["different_prompts"])
    if wrong := wrong + tokens["different_sweeps"]:
        failures.append(f"{wrong} of {tokens['compared']} texts are tokenised differently")
    if not template["verbatim"]:
        failures.append("the chat template is not the training template")
    if wrong := len(template.get("different_prompts", [])):
        failures.append(f"{wrong} prompts are rendered differently")
    if wrong := len(template.get("different_strings", [])):
        failures.append(f"{wrong} contents of {template['compared']} are rendered differently")
    if not report["stop"]["ends_turn"]:
        failures.append(f"{report['stop']['token']} does not end a turn")
    if (also := report["stop"]["also"]) is not None:
        failures.append(f"the file would end a turn at {also!r}")
    failures += gate.failures(report["drift"])
    report["gate"] = asdict(gate) | {"allowances": allowances}
    report["passed"], report["failures"] = not failures, failures
    if failures:
        raise ExportMismatch(
            f"{report['file']} is not the trained model: {'; '.join(failures)}",
            report,
            hint="export again; if it stays, report it with export/report.json",
        )
    return report
