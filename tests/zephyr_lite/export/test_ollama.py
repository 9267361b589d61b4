"""The Modelfile says in Go what the training template says in Jinja."""

from __future__ import annotations

import pytest

from zephyr_lite.data.chat import render
from zephyr_lite.errors import RecipeError
from zephyr_lite.export.ollama import TEMPLATE, modelfile


def evaluate(messages: list[dict[str, str]]) -> str:
    """Run TEMPLATE's few constructs by hand; the same cases were run through Go's text/template."""
    head, rest = TEMPLATE.split("{{ end }}\n{{- range .Messages }}")
    body, tail = rest.split("{{ end }}")
    condition = '{{- if ne (index .Messages 0).Role "system" }}'
    assert head.startswith(condition)
    first = head.removeprefix(condition) if messages[0]["role"] != "system" else ""
    turns = (
        body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"])
        for m in messages
    )
    return first + "".join(turns) + tail


@pytest.mark.parametrize(
    "messages",
    [
        [("user", "Hi")],
        [("system", "Be kind"), ("user", " Hi ")],
        [("user", "a"), ("assistant", "b\n"), ("user", "\nc")],
    ],
)
def test_the_template_is_the_training_template(messages: list[tuple[str, str]]) -> None:
    dialogue = [{"role": role, "content": content} for role, content in messages]
    assert evaluate(dialogue) == render(dialogue, True)


def test_the_modelfile() -> None:
    text = modelfile("zephyr-Q8_0.gguf", 2048)
    assert text.startswith("FROM ./zephyr-Q8_0.gguf\n")
    assert f'TEMPLATE """{TEMPLATE}"""\n' in text
    for stop in ("</s>", "<|system|>", "<|user|>", "<|assistant|>"):
        assert f'PARAMETER stop "{stop}"\n' in text
    assert text.endswith("PARAMETER num_ctx 2048\n")


@pytest.mark.parametrize("name", ["../x.gguf", "a b.gguf", "x\nADAPTER /etc/passwd", "", "-x"])
def test_names_that_say_more_than_a_name_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="plain file name"):
        modelfile(name, 2048)
    with pytest.raises(RecipeError, match="num_ctx"):
        modelfile("x.gguf", 0)
