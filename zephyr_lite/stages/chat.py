"""Chat, in its simplest form: the exported file in llama.cpp, or a stage in transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from zephyr_lite.export.check.llama_cpp import LlamaCppModel
from zephyr_lite.model.adapters import load_adapter
from zephyr_lite.stages.context import Context
from zephyr_lite.stages.export import final_stage, newest_gguf

Messages = list[dict[str, str]]
Answer = Callable[[Messages], str]
HELP = "/new starts over, /system TEXT sets the system turn, /quit or Ctrl-D leaves"


def run(
    ctx: Context, stage: str | None, prompt: str | None, max_tokens: int, temperature: float
) -> None:
    """Answer one prompt, or talk until the user leaves.

    Args:
        stage: None for the exported file; `dpo`, `sft` or `base` for that model in transformers.
        prompt: one question; None reads questions from the terminal.
    """
    with ExitStack() as stack:
        answer = _answerer(ctx, stage, max_tokens, temperature, stack)
        if prompt is not None:
            print(answer([{"role": "user", "content": prompt}]))
            return
        _talk(answer)


def _answerer(
    ctx: Context, stage: str | None, max_tokens: int, temperature: float, stack: ExitStack
) -> Answer:
    gguf = newest_gguf(ctx.run.folder)
    if stage is None and gguf is not None:
        model = stack.enter_context(LlamaCppModel(gguf, threads=torch.get_num_threads()))
        print(f"{gguf} through llama.cpp", file=sys.stderr)
        return lambda messages: model.generate(messages, max_tokens, temperature=temperature)[0]
    name = stage if stage == "base" else final_stage(ctx, stage)
    return _through_transformers(ctx, name, max_tokens, temperature)


def _through_transformers(ctx: Context, stage: str, max_tokens: int, temperature: float) -> Answer:
    model: Any = ctx.load_model()
    adapter = None if stage == "base" else ctx.adapter(stage)
    if adapter is not None:
        model = load_adapter(model, stage, adapter)
    name = ctx.base_name if stage == "base" else f"{stage} of {ctx.run.folder}"
    print(f"{name} through transformers", file=sys.stderr)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )

    def answer(messages: Messages) -> str:
        ids = torch.tensor([ctx.tokenizer.encode_prompt(messages)], device=ctx.device)
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                eos_token_id=ctx.tokenizer.eos_id,
                pad_token_id=ctx.tokenizer.eos_id,
                **sampling,
            )
        return ctx.tokenizer.decode(out[0, ids.shape[1] :].tolist())

    return answer


def _talk(answer: Answer) -> None:
    """Read, answer, remember, until the user leaves."""
    print(HELP, file=sys.stderr)
    system: Messages = []
    history: Messages = []
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/new":
            history = []
        elif line.startswith("/system"):
            text = line.removeprefix("/system").strip()
            system = [{"role": "system", "content": text}] if text else []
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            history.append({"role": "user", "content": line})
            text = answer(system + history)
            print(text)
            history.append({"role": "assistant", "content": text})
