"""Is the exported file the trained model? Same ids, same template, same stop, and how far apart.

A GGUF that loads proves little: llama.cpp takes swapped rotary rows, missing scores and a foreign
end-of-turn token without complaint. So each is compared with the model it came from:

    tokens      ids of odd strings, of every rendered prompt and of all pieces of the vocabulary run
                together (where a wrong order of merges shows) are equal
    template    llama.cpp's rendering of every prompt is equal, and the stored text is verbatim
    stop        generating the end-of-turn token ends the turn
    drift       over n positions behind each prompt, p = truth, q = file:
                KL(p || q) = sum_v p_v (log p_v - log q_v), and whether argmax p = argmax q

llama.cpp keeps its cache in f32 and leaves flash attention out for this, so that what is left is
the file's own: an F32 file then agrees to 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import Tokenizer

from zephyr_lite.errors import DataError, VerificationError
from zephyr_lite.export.llama_cpp import LlamaCppModel
from zephyr_lite.export.vocabulary import BYTES, SPACE

Truth = Callable[[list[int]], torch.Tensor]
Messages = list[dict[str, str]]
DECIDED = 0.01  # nats between the two best tokens above which the truth's choice is no tie

ODD_STRINGS = (
    "Hello world", " leading space", "  two leading spaces", "trailing space ", "a  b   c    d",
    "", " ", "\n", "\n\n\n", " \n ", "\t\ttabs\tand\r\nreturns", "line one\nline two\n\n  indented",
    "don't  stop --- it's 3.14159 (or 2,718)!", "def f(x):\n    return x**2  # comment\n",
    "https://example.org/a?b=c&d=%20e", "naïve café, Ångström, façade", "e\u0301 combining",
    "漢字かな交じり文", "Привет, мир", "مرحبا بالعالم", "हिन्दी में", "👩‍👩‍👧‍👦 family 🇩🇪 flags 👍🏽",
    "\u2581 lower block", "\u00a0no-break\u2003em space\u200bzero width", "\ufeffbyte order mark",
    "private \ue000 and \U0010ffff", "<|system|>", "<|user|>\nHi</s>\n<|assistant|>\n",
    "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n", "a</s>b", "a </s> b</s></s>\n",
    "  </s>  <s> <unk>x", "<|im_start|>user\nHi<|im_end|>", "[INST] Hi [/INST]", "<0x0A><0xZZ>",
)  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """What a type must keep to: nats over all positions, share of decided positions.

    Q8_0 was 1e-3 until the 64-wide stories260K, whose rows are two blocks long, measured 1.3e-3
    with a sound file; narrow models may still fail it. The 256-wide tiny model measures 6e-5.
    """

    mean_kl: float
    decided_top1: float


GATES = {
    "ALL_F32": Gate(mean_kl=1e-5, decided_top1=1.0),
    "MOSTLY_F16": Gate(mean_kl=1e-4, decided_top1=1.0),
    "MOSTLY_Q8_0": Gate(mean_kl=2e-3, decided_top1=0.0),
}


class ExportMismatch(VerificationError):
    """The file is not the model; `report` holds every figure that was measured."""

    def __init__(self, message: str, report: dict[str, Any], *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.report = report


def verify_gguf(
    path: Path,
    truth: Truth,
    tokenizer: Tokenizer,
    chat_template: str,
    render: Callable[[Messages], str],
    prompts: Sequence[Messages],
    n_tokens: int = 64,
    *,
    answers: Sequence[list[int]] | None = None,
    eos_token: str = "</s>",
    threads: int | None = None,
    on_prompt: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a GGUF file with the model it was written from.

    Args:
        truth: ids -> log-probabilities at every position, fp32 [len(ids), V].
        render: messages -> text with the generation prompt, as training rendered them.
        prompts: dialogues that end with a user turn.
        n_tokens: positions compared behind each prompt, fewer where the turn ends.
        answers: token ids to follow; default: the truth's own greedy continuation.
    Returns: report: `tokens`, `template`, `stop`, `drift`, `gate`, `passed`.
    Raises: ExportMismatch (a VerificationError, with `.report`) naming every failed check;
        MachineError without llama.cpp.
    """
    file_type, stored = _read_header(path)
    eos = tokenizer.token_to_id(eos_token)
    if eos is None:
        raise DataError(f"the tokenizer has no token {eos_token!r}")
    rendered = [render(messages) for messages in prompts]
    ids = [tokenizer.encode(text).ids for text in rendered]
    n_ctx = max(map(len, ids), default=0) + n_tokens + 16
    with LlamaCppModel(path, n_ctx=n_ctx, exact=True, threads=threads) as model:
        report: dict[str, Any] = {"file": path.name, "type": file_type}
        report["tokens"] = compare_tokens(model, tokenizer, rendered)
        report["template"] = _compare_template(model, stored == chat_template, prompts, rendered)
        report["stop"] = {"token": eos_token, "ends_turn": model.stops_at(eos)}
        drift = Drift()
        for done, prompt_ids in enumerate(ids, start=1):
            if answers is None:
                answer = _truth_greedy(model, truth, prompt_ids, n_tokens, eos)
            else:
                answer = answers[done - 1][:n_tokens]
            for row in _rows(model, truth, prompt_ids, answer):
                drift.add(*row)
            if on_prompt is not None:
                on_prompt(done, len(ids))
    report["drift"] = drift.figures()
    return _judge(report, GATES[file_type])


class Drift:
    """Sums over positions of what separates two predictions."""

    def __init__(self) -> None:
        self.kl: list[float] = []
        self.agree: list[bool] = []
        self.gap: list[float] = []
        self.nll: list[tuple[float, float]] = []

    def add(self, truth_V: torch.Tensor, file_V: torch.Tensor, target: int) -> None:
        """One position: log-probabilities of both (fp32 [V]), and the token that follows."""
        p, q = truth_V.double(), file_V.double()
        # A probability of zero adds nothing, but 0 * -inf would be NaN.
        kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum()
        first, second = p.topk(2).values.tolist()
        self.kl.append(float(kl))
        self.agree.append(int(p.argmax()) == int(q.argmax()))
        self.gap.append(first - second)
        self.nll.append((-float(p[target]), -float(q[target])))

    def figures(self) -> dict[str, Any]:
        """Means over positions, in nats; top-1 as shares of positions."""
        n = len(self.kl)
        if n == 0:
            raise DataError("no prompts to compare the file over")
        decided = [same for same, gap in zip(self.agree, self.gap, strict=True) if gap > DECIDED]
        return {
            "positions": n,
            "kl_mean": sum(self.kl) / n,
            "kl_max": max(self.kl),
            "top1": sum(self.agree) / n,
            "decided_positions": len(decided),
            "decided_top1": sum(decided) / len(decided) if decided else 1.0,
            "nll_truth": sum(t for t, _ in self.nll) / n,
            "nll_file": sum(f for _, f in self.nll) / n,
        }


def _rows(
    model: LlamaCppModel, truth: Truth, ids: list[int], answer: list[int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(truth row, file row, next token) for each position behind a prompt."""
    truth_TV = _checked(truth(ids + answer), model)[len(ids) - 1 : -1]
    yield from zip(truth_TV, model.log_probs_along(ids, answer), answer, strict=True)


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


def _read_header(path: Path) -> tuple[str, str | None]:
    reader = gguf.GGUFReader(path)
    kind, template = (
        reader.get_field(key)
        for key in (gguf.Keys.General.FILE_TYPE, gguf.Keys.Tokenizer.CHAT_TEMPLATE)
    )
    name = "unknown" if kind is None else gguf.LlamaFileType(int(kind.contents())).name
    if name not in GATES:
        raise VerificationError(f"{path}: there is no gate for file type {name}")
    return name, None if template is None else template.contents()


def compare_tokens(
    model: LlamaCppModel, tokenizer: Tokenizer, rendered: Sequence[str]
) -> dict[str, Any]:
    """Prompts are counted, never quoted: they may be somebody's data."""

    def differs(text: str) -> bool:
        return model.tokenize(text) != tokenizer.encode(text).ids

    sweep = list(_pieces_run_together(tokenizer))
    return {
        "compared": len(ODD_STRINGS) + len(rendered) + len(sweep),
        "different_strings": [text for text in ODD_STRINGS if differs(text)],
        "different_prompts": [i for i, text in enumerate(rendered) if differs(text)],
        "different_sweeps": sum(map(differs, sweep)),
    }


def _pieces_run_together(tokenizer: Tokenizer, per_text: int = 64) -> Iterator[str]:
    """Texts that hold every piece twice, beside pieces learnt early and learnt late."""
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    ids = tokenizer.get_vocab(with_added_tokens=False)
    pieces = [p.replace(SPACE, " ") for p in sorted(ids, key=ids.__getitem__) if p not in special]
    pieces = [piece for piece in pieces if piece not in BYTES]
    stride = -(-len(pieces) // per_text)
    for start in range(stride):
        yield "".join(pieces[start * per_text : (start + 1) * per_text])
        yield "".join(pieces[start::stride])


def _compare_template(
    model: LlamaCppModel, verbatim: bool, prompts: Sequence[Messages], rendered: Sequence[str]
) -> dict[str, Any]:
    pairs = enumerate(zip(prompts, rendered, strict=True))
    different = [i for i, (messages, text) in pairs if model.apply_template(messages) != text]
    return {"verbatim": verbatim, "compared": len(prompts), "different_prompts": different}


def _judge(report: dict[str, Any], gate: Gate) -> dict[str, Any]:
    tokens, template, drift = report["tokens"], report["template"], report["drift"]
    failures = []
    wrong = len(tokens["different_strings"]) + len(tokens["different_prompts"])
    if wrong := wrong + tokens["different_sweeps"]:
        failures.append(f"{wrong} of {tokens['compared']} texts are tokenised differently")
    if not template["verbatim"]:
        failures.append("the chat template is not the training template")
    if template["different_prompts"]:
        failures.append(f"{len(template['different_prompts'])} prompts are rendered differently")
    if not report["stop"]["ends_turn"]:
        failures.append(f"{report['stop']['token']} does not end a turn")
    if not drift["kl_mean"] < gate.mean_kl:
        failures.append(f"mean KL {drift['kl_mean']:.2e} nats, allowed {gate.mean_kl:.0e}")
    if drift["decided_top1"] < gate.decided_top1:
        failures.append(f"top-1 equal at {drift['decided_top1']:.2%} of decided positions")
    report["gate"] = {"mean_kl": gate.mean_kl, "decided_top1": gate.decided_top1}
    report["passed"], report["failures"] = not failures, failures
    if failures:
        raise ExportMismatch(
            f"{report['file']} is not the trained model: {'; '.join(failures)}",
            report,
            hint="export again; if it stays, report it with export/report.json",
        )
    return report
