"""The Modelfile: what Ollama needs to treat the GGUF as training did; and handing it over.

Ollama does not run the Jinja template inside a GGUF; left alone it guesses one of its own by
similarity. So the template is written out in its Go syntax: an empty system turn where the dialogue
brings none, `</s>` after every turn, and the prompt ends with the assistant's mark.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
from zephyr_lite.errors import MachineError, RecipeError, StorageError

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MODEL_NAME = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]*/){0,2}[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII
)
# Nothing that could end the quotes of a parameter or begin a Go action.
END_TOKEN = re.compile(r'[^"\\{}\s]{1,64}')
MARKS = ("<|system|>", "<|user|>", "<|assistant|>")
# {{- and -}} trim white space around them; every line break that remains belongs to the prompt.
TEMPLATE = """\
{{- if ne (index .Messages 0).Role "system" }}<|system|>
</s>
{{ end }}
{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}</s>
{{ end }}<|assistant|>
"""
FOREIGN = """\
# There is no TEMPLATE here: this model was not trained on Zephyr's chat template, and Ollama does
# not run the Jinja template inside the GGUF. It will guess one of its own: compare its answers with
# llama.cpp's, or write the template in Go's syntax.
"""
# Terminal control: Ollama redraws its progress.
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")
LAST_LINES = 5


def modelfile(
    gguf_name: str, num_ctx: int, *, chat_template: str = ZEPHYR_TEMPLATE, eos: str = "</s>"
) -> str:
    """Text of the Modelfile that lies beside the GGUF.

    Args:
        gguf_name: file name without folder.
        num_ctx: context length Ollama allots, tokens.
        chat_template: the training template; one that is not Zephyr's is left to Ollama's guess,
            and the file says so.
        eos: the end-of-turn token's text.
    Raises: RecipeError for a name or token that could be read as something else, or num_ctx < 1.
    """
    if not FILE_NAME.fullmatch(gguf_name):
        raise RecipeError(f"{gguf_name!r} is not a plain file name")
    if not END_TOKEN.fullmatch(eos):
        raise RecipeError(f"the end token {eos!r} cannot be written into a Modelfile")
    if num_ctx < 1:
        raise RecipeError(f"num_ctx must be positive, got {num_ctx}")
    is_zephyr = chat_template == ZEPHYR_TEMPLATE
    template = f'TEMPLATE """{TEMPLATE.replace("</s>", eos)}"""\n' if is_zephyr else FOREIGN
    stops = (eos, *MARKS) if is_zephyr else (eos,)
    lines = "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)
    return f"FROM ./{gguf_name}\n{template}{lines}PARAMETER num_ctx {num_ctx}\n"


def create(name: str, folder: Path) -> str:
    """Run `ollama create NAME -f Modelfile` in an export folder and wait for it.

    Returns: what Ollama printed.
    Raises: RecipeError for a name Ollama would not take; StorageError without a Modelfile;
        MachineError when Ollama is not installed or fails, with its last lines.
    """
    if not MODEL_NAME.fullmatch(name):
        raise RecipeError(
            f"{name!r} is not a model name of Ollama's",
            hint="letters, digits, `.`, `_` and `-`, such as zephyr or me/zephyr:q4_k_m",
        )
    if not (folder / "Modelfile").is_file():
        raise StorageError(f"{folder}: has no Modelfile", hint="export a GGUF first")
    program = shutil.which("ollama")
    if program is None:
        raise MachineError(
            "Ollama is not installed: there is no `ollama` on PATH",
            hint=f"install it from ollama.com, then: cd {folder} && ollama create {name} "
            "-f Modelfile",
        )
    try:
        done = subprocess.run(
            [program, "create", name, "-f", "Modelfile"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise MachineError(f"{program} cannot be started: {error.strerror or error}") from None
    output = CONTROL.sub("", done.stdout.decode(errors="replace").replace("\r", "\n"))
    lines = [line.rstrip() for line in output.splitlines() if line.strip()]
    if done.returncode != 0:
        said = "\n".join(lines[-LAST_LINES:]) or "it printed nothing"
        raise MachineError(
            f"`ollama create {name}` failed with exit code {done.returncode}:\n{said}",
            hint="is its server running? `ollama serve` starts it",
        )
    return "\n".join(lines)
