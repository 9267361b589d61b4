"""What other trainers leave behind is read with the tokenizer and template that were trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zephyr_lite.errors import DataError, RecipeError
from zephyr_lite.export.weights.foreign import find_chat, read_foreign

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
PLAIN = "{% for m in messages %}{{ bos_token + m.content + eos_token + '\\n' }}{% endfor %}"
ROWS = 512
Spec = dict[str, Any]


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Path]:
    """`trained("name", base_model_name_or_path=...)`: a folder as a trainer leaves it."""

    def make(name: str = "adapter", **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(fields | config))
        (folder / "adapter_model.safetensors").write_bytes(b"")
        return folder

    return make


@pytest.fixture
def base(tokenizer_folder: Path, tmp_path: Path) -> Path:
    """A base with a tokenizer and no template of its own."""
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "base"))
    return put(folder, chat_template=None)


def put(folder: Path, **fields: Any) -> Path:
    """Set fields of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not None}))
    return folder


def with_tokens(spec: Spec, **tokens: int) -> Spec:
    """Added tokens, by text and id; the ids before them are filled."""
    vocab = spec["model"]["vocab"]
    vocab |= {f"filler {i}": i for i in range(len(vocab), min(tokens.values()))}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    more = [{"id": i, "content": t, "normalized": False, **flags} for t, i in tokens.items()]
    return spec | {"added_tokens": spec["added_tokens"] + more}


def put_tokenizer(folder: Path, spec: Spec, **config: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return put(folder, **config)


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize("name", ["unsloth/mistral-7b-bnb-4bit", "mistralai/Mistral-7B-v0.1"])
def test_the_base_is_the_one_the_adapter_names(name: str, trained: Callable[..., Path]) -> None:
    foreign = read_foreign([trained(base_model_name_or_path=name)], None)
    assert (foreign.base, foreign.notes) == (name, ())


def test_another_base_is_taken_and_said(trained: Callable[..., Path]) -> None:
    folder = trained(base_model_name_or_path="unsloth/mistral-7b-bnb-4bit")
    foreign = read_foreign([folder], "mistralai/Mistral-7B-v0.1")
    assert foreign.base == "mistralai/Mistral-7B-v0.1"
    assert "was trained on unsloth/mistral-7b-bnb-4bit" in foreign.notes[0]


def test_a_stack_has_one_base(trained: Callable[..., Path]) -> None:
    sft = trained("sft", base_model_name_or_path="org/base")
    dpo = trained("dpo", base_model_name_or_path=str(sft))
    foreign = read_foreign([sft, dpo], None)
    assert (foreign.folders, foreign.base) == ((sft, dpo), "org/base")
    assert read_foreign([sft, dpo], "org/base").notes == ()
    other = trained("other", base_model_name_or_path="org/sft-merged")
    with pytest.raises(RecipeError, match="different bases: org/base, org/sft-merged"):
        read_foreign([sft, other], None)


def test_a_base_that_is_not_clear_is_refused(trained: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="names no base"):
        read_foreign([trained("a")], None)
    with pytest.raises(RecipeError, match="/content/model, which is no folder here"):
        read_foreign([trained("b", base_model_name_or_path="/content/model")], None)
    with pytest.raises(RecipeError, match="no adapter"):
        read_foreign([], "org/base")


def test_variants_are_refused_before_a_base_is_looked_for(trained: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match="use_dora"):
        read_foreign([trained("dora", use_dora=True)], None)
    pickled = trained("pickled", base_model_name_or_path="org/base")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(DataError, match=r"no adapter_model.safetensors .*bin is a pickle"):
        read_foreign([pickled], None)


# ---------------------------------------------------------------- tokenizer and template


def test_what_the_adapter_brings_wins(base: Path, spec: Spec, trained: Callable[..., Path]) -> None:
    put(base, chat_template="BASE")
    folder = put_tokenizer(
        trained(), with_tokens(spec, **{"<|im_start|>": 500, "<|im_end|>": 501}), eos_token="</s>"
    )
    (folder / "chat_template.jinja").write_text(CHATML)
    chat = find_chat([folder], base, ROWS)
    assert (chat.tokenizer, chat.template) == (folder, CHATML)
    assert (chat.eos, chat.end_of_turn) == ("</s>", "<|im_end|>")
    text = chat.render([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_last_adapter_of_a_stack_wins(base: Path, trained: Callable[..., Path]) -> None:
    sft = put(trained("sft"), chat_template="SFT")
    dpo = put(trained("dpo"), chat_template=[{"name": "default", "template": "DPO"}])
    assert find_chat([sft, dpo], base, ROWS).template == "DPO"
    assert find_chat([sft, trained("bare")], base, ROWS).template == "SFT"


def test_the_base_has_what_the_adapter_lacks(base: Path, trained: Callable[..., Path]) -> None:
    put(base, chat_template=PLAIN)
    chat = find_chat([trained()], base, ROWS)
    assert (chat.tokenizer, chat.eos, chat.end_of_turn) == (base, "</s>", "</s>")
    assert chat.render([{"role": "user", "content": "Hi"}]) == "<s>Hi</s>\n"


def test_no_template_anywhere_is_said(base: Path, trained: Callable[..., Path]) -> None:
    chat = find_chat([trained()], base, ROWS)
    assert chat.template is None and "chat template" in chat.notes[0]
    with pytest.raises(DataError, match="no chat template"):
        chat.render([{"role": "user", "content": "Hi"}])


def test_a_renamed_end_token_is_said(base: Path, spec: Spec, trained: Callable[..., Path]) -> None:
    """Unsloth maps the end token to the template's: `</s>` is then called `<|im_end|>`."""
    text = json.dumps(spec).replace('"</s>"', '"<|im_end|>"')
    folder = put_tokenizer(trained(), json.loads(text), eos_token="<|im_end|>")
    put(folder, chat_template=CHATML)
    chat = find_chat([folder], base, ROWS)
    assert chat.eos == chat.end_of_turn == "<|im_end|>"
    assert chat.notes == ("the tokenizer renames 1 tokens, first '</s>' to '<|im_end|>'",)


def test_tokens_beyond_the_embedding_are_named(
    base: Path, spec: Spec, trained: Callable[..., Path]
) -> None:
    folder = put_tokenizer(trained(), with_tokens(spec, **{"<|im_start|>": 512, "<|im_end|>": 513}))
    with pytest.raises(
        DataError, match=r"2 tokens beyond the 512 rows .*'<\|im_start\|>'"
    ) as error:
        find_chat([folder], base, ROWS)
    assert "modules_to_save" in str(error.value.hint)
    put(folder, eos_token="</s>")
    assert find_chat([folder], base, 520).tokenizer == folder  # the adapter resized it


def test_another_bases_tokenizer_is_refused(
    base: Path, spec: Spec, trained: Callable[..., Path]
) -> None:
    vocab = spec["model"]["vocab"]
    size = len(vocab)
    spec["model"]["vocab"] = {t: i if i < 3 else size + 2 - i for t, i in vocab.items()}
    folder = put_tokenizer(trained(), spec, eos_token="</s>")
    with pytest.raises(DataError, match=r"tokenizer.json: is another tokenizer than the base's"):
        find_chat([folder], base, ROWS)


def test_a_smaller_vocabulary_is_refused(
    base: Path, spec: Spec, trained: Callable[..., Path]
) -> None:
    vocab = spec["model"]["vocab"]
    kept = {t: i for t, i in vocab.items() if i < 300}
    spec["model"] |= {"vocab": kept, "merges": []}
    with pytest.raises(DataError, match="is another tokenizer than the base's"):
        find_chat([put_tokenizer(trained(), spec, eos_token="</s>")], base, ROWS)


def test_missing_and_damaged_files_are_named(base: Path, trained: Callable[..., Path]) -> None:
    broken = trained("broken")
    (broken / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(DataError, match=r"broken/tokenizer.json: cannot be read as JSON"):
        find_chat([broken], base, ROWS)
    (broken / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"broken/tokenizer.json: unsound tokenizer"):
        find_chat([broken], base, ROWS)
    put(base, eos_token="<|never|>")
    with pytest.raises(DataError, match=r"names no eos_token .*never"):
        find_chat([], base, ROWS)
    (base / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"has no tokenizer.json"):
        find_chat([trained("bare")], base, ROWS)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content }",
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[7].content }}",
        "{{ 1 + 'a' }}",
    ],
    ids=["syntax", "raises", "escape", "missing", "type"],
)
def test_a_template_that_fails_is_an_error_of_its_file(
    template: str, base: Path, trained: Callable[..., Path]
) -> None:
    folder = put(trained(), chat_template=template)
    with pytest.raises(DataError, match=r"adapter: chat template: "):
        find_chat([folder], base, ROWS)
