"""The Modelfile: what Ollama needs to treat the GGUF as training did.

Ollama does not run the Jinja template inside a GGUF; left alone it guesses one of its own by
similarity. So the template is written out in its Go syntax: an empty system turn where the dialogue
brings none, `</s>` after every turn, and the prompt ends with the assistant's mark.
"""

from __future__ import annotations

import re

from zephyr_lite.errors import RecipeError

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STOPS = ("</s>", "<|system|>", "<|user|>", "<|assistant|>")
# {{- and -}} trim white space around them; every line break that remains belongs to the prompt.
TEMPLATE = """\
{{- if ne (index .Messages 0).Role "system" }}<|system|>
</s>
{{ end }}
{{- range .Messages }}<|{{ .Role }}|>
{{ .Content }}</s>
{{ end }}<|assistant|>
"""


def modelfile(gguf_name: str, num_ctx: int) -> str:
    """Text of the Modelfile that lies beside the GGUF.

    Args: gguf_name: file name without folder; num_ctx: context length Ollama allots, tokens.
    Raises: RecipeError for a name that could be read as something else, or num_ctx < 1.
    """
    if not FILE_NAME.fullmatch(gguf_name):
        raise RecipeError(f"{gguf_name!r} is not a plain file name")
    if num_ctx < 1:
        raise RecipeError(f"num_ctx must be positive, got {num_ctx}")
    stops = "".join(f'PARAMETER stop "{stop}"\n' for stop in STOPS)
    return f'FROM ./{gguf_name}\nTEMPLATE """{TEMPLATE}"""\n{stops}PARAMETER num_ctx {num_ctx}\n'
