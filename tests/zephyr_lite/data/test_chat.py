"""The chat format: text against three Jinja engines, ids against golden files, masks by hand."""

from __future__ import annotations

import itertools
import json
import shutil
import urllib.request
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from zephyr_lite.data.chat import (
    ZEPHYR_TEMPLATE,
    ChatTokenizer,
    load_tokenizer,
    render,
    template_hash,
)
from zephyr_lite.errors import DataError


def say(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return head + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


DIALOGUES = [
    say("Hi"),
    say("Hi", "Hello"),
    say("Hi", "Hello", system="Be kind."),
    say("Hi", "Hello", system=""),
    say(" two  spaces ", "\n\nnew\r\nlines\t", "{{ 7 * 7 }} {% raw %}", "<|user|>\nnot a turn"),
    say("数学 🦙 e\u0301", 'l\'été <b>&amp;</b> "quoted" \\n'),
]


@pytest.fixture(scope="module")
def mistral(shared_data: Path) -> ChatTokenizer:
    return load_tokenizer(shared_data / "models" / "mistral-7b-v0.1-tokenizer")


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> ChatTokenizer:
    return load_tokenizer(shared_data / "models" / "stories260k")


# --- the text ---


def test_the_text_is_the_published_one() -> None:
    assert render(say("Hi", "Hello")) == (
        "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    )
    assert render(say("Hi", system="Be kind."), add_generation_prompt=True) == (
        "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\n"
    )


def test_the_template_does_not_change_unnoticed() -> None:
    # Changing it changes every id: caches and adapters of before no longer fit.
    expected = "944a85033ccc3fd6ea24fba47efe2c5f463bb249b36cc6ee9d487d5d841823b1"
    assert template_hash() == expected


def jinja(messages: list[dict[str, str]], prompt: bool, **options: bool) -> str:
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, **options)  # type: ignore[arg-type]
    template = environment.from_string(ZEPHYR_TEMPLATE)
    return template.render(messages=messages, add_generation_prompt=prompt, eos_token="</s>")


@pytest.mark.parametrize("messages", DIALOGUES)
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("lstrip", [False, True])
def test_jinja_gives_the_same_text(messages, prompt: bool, trim: bool, lstrip: bool) -> None:
    rendered = jinja(messages, prompt, trim_blocks=trim, lstrip_blocks=lstrip)
    assert rendered == render(messages, prompt)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=6), st.none() | st.text(), st.booleans())
def test_jinja_gives_the_same_text_for_any_content(contents, system, prompt: bool) -> None:
    messages = say(*contents, system=system)
    assert jinja(messages, prompt, trim_blocks=True, lstrip_blocks=True) == render(messages, prompt)


def test_transformers_gives_the_same_text(shared_data: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = shared_data / "models" / "stories260k"
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    for messages in DIALOGUES:
        for prompt in (False, True):
            text = theirs.apply_chat_template(
                messages,
                chat_template=ZEPHYR_TEMPLATE,
                tokenize=False,
                add_generation_prompt=prompt,
            )
            assert text == render(messages, prompt)


def test_llama_cpp_gives_the_same_text(shared_data: Path) -> None:
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp (extra `llama`) is not installed")
    params = llama.CommonParams()
    params.model.path = str(shared_data / "models" / "stories260k" / "reference-f32.gguf")
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 128, 1, False
    params.chat_template, params.use_jinja = ZEPHYR_TEMPLATE, True
    server = llama.Server(params)
    for messages in DIALOGUES:
        if messages[-1]["role"] != "user":
            messages = [*messages, {"role": "user", "content": "and?"}]
        request = urllib.request.Request(
            f"{server.listening_address}/apply-template",
            data=json.dumps({"messages": messages}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["prompt"] == render(messages, add_generation_prompt=True)


def test_an_unknown_role_is_refused_by_both() -> None:
    messages = [{"role": "tool", "content": "x"}]
    with pytest.raises(DataError, match="unknown role 'tool'"):
        render(messages)
    with pytest.raises(jinja2.UndefinedError, match="raise_exception"):
        jinja(messages, False)


# --- the ids ---


@pytest.mark.parametrize("name", ["mistral-7b-v0.1-tokenizer", "stories260k"])
def test_golden_ids(shared_data: Path, name: str) -> None:
    folder = shared_data / "models" / name
    golden = json.loads((folder / "golden.json").read_text())
    ours = load_tokenizer(folder)
    checked = 0
    for text, ids in golden.get("tokenizer_checks", golden).items():
        if "</s>" not in text:
            assert ours.encode_text(text).tolist() == [*ids, ours.eos_id], text
            checked += 1
        elif text.startswith("<|system|>\nYou are a friendly chatbot.</s>\n<|user|>\nHi</s>"):
            messages = say("Hi", system="You are a friendly chatbot.")
            assert ours.encode_prompt(messages) == ids
            checked += 1
    assert checked >= 2


# <|system|> \n </s> | _ \n <|user|> \n Hi </s> | _ \n <|assistant|> \n | Hello </s> | _ \n
SYSTEM = [523, 28766, 6574, 28766, 28767, 13, 2]
USER_HI = [28705, 13, 28789, 28766, 1838, 28766, 28767, 13, 23809, 2]
HEADER = [28705, 13, 28789, 28766, 489, 11143, 28766, 28767, 13]
NEWLINE = [28705, 13]
HELLO = [16230, 2]


def test_one_dialogue_by_hand(mistral: ChatTokenizer) -> None:
    ids, assistant = mistral.encode_dialogue(say("Hi", "Hello", "Hi", "Hello"))
    turn = [*USER_HI, *HEADER, *HELLO]
    assert ids.tolist() == [1, *SYSTEM, *turn, *turn, *NEWLINE]
    scored = [*[0] * 19, 1, 1]
    assert assistant.astype(int).tolist() == [0, *[0] * 7, *scored, *scored, 0, 0]
    assert ids.dtype == np.int32
    assert assistant.dtype == np.bool_


def test_a_prompt_is_the_head_of_its_dialogue_and_its_pair(mistral: ChatTokenizer) -> None:
    prompt = mistral.encode_prompt(say("Hi"))
    assert prompt == [1, *SYSTEM, *USER_HI, *HEADER]
    for answer in ("Hello", " Hello", "\nHello", "  a\n\nb ", "数", "'s"):
        ids, assistant = mistral.encode_dialogue(say("Hi", answer))
        pair = mistral.encode_pair(say("Hi"), answer, "no", max_length=1024, max_prompt_length=512)
        assert ids[: len(prompt)].tolist() == prompt == pair.prompt.tolist()
        assert ids[assistant].tolist() == pair.chosen.tolist()
        assert pair.chosen[-1] == mistral.eos_id
        assert mistral.decode(pair.chosen) == answer


@pytest.mark.parametrize("file", ["moss_multiturn", "sgd_multiturn", "oasst_trees", "alpaca"])
def test_real_dialogues(mistral: ChatTokenizer, shared_data: Path, file: str) -> None:
    """Whole-text ids, one BOS, and each run of marked tokens is an answer, on real files."""
    with (shared_data / "sft" / f"{file}.jsonl").open(encoding="utf-8") as lines:
        dialogues = [json.loads(line)["messages"] for line in itertools.islice(lines, 60)]
    theirs = Tokenizer.from_file(
        str(shared_data / "models" / "mistral-7b-v0.1-tokenizer" / "tokenizer.json")
    )
    for messages, (ids, assistant) in zip(
        dialogues, mistral.encode_dialogues(dialogues), strict=True
    ):
        assert ids.tolist() == theirs.encode(render(messages)).ids
        assert np.count_nonzero(ids == mistral.bos_id) == 1
        edges = np.flatnonzero(np.diff(assistant.astype(np.int8), prepend=0, append=0))
        runs = [ids[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]
        answers = [m["content"] for m in messages if m["role"] == "assistant"]
        assert [mistral.decode(run) for run in runs] == answers
        assert all(run[-1] == mistral.eos_id for run in runs)


def test_batches_do_not_change_a_row(stories: ChatTokenizer) -> None:
    dialogues = [say(f"question {i}", "answer " * (i % 7 + 1)) for i in range(700)]
    together = stories.encode_dialogues(dialogues)
    for i in (0, 1, 511, 512, 699):
        alone = stories.encode_dialogue(dialogues[i])
        assert np.array_equal(together[i].ids, alone.ids)
        assert np.array_equal(together[i].assistant, alone.assistant)


@pytest.mark.parametrize("text", ["</s>", "a <s> b", "<unk>"])
def test_spelled_control_tokens_are_refused(mistral: ChatTokenizer, text: str) -> None:
    assert mistral.has_special_text(text)
    limits = {"max_length": 64, "max_prompt_length": 32}
    for call in (
        lambda: mistral.encode_dialogue(say("Hi", text)),
        lambda: mistral.encode_prompt(say(text)),
        lambda: mistral.encode_pair(say("Hi"), "a", text, **limits),
        lambda: mistral.encode_text(text),
    ):
        with pytest.raises(DataError, match="spells the control token"):
            call()
    assert not mistral.has_special_text("<|user|> < /s> &lt;s&gt;")


def test_a_lone_surrogate_is_not_a_crash(mistral: ChatTokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        mistral.encode_prompt(say("\ud800"))


def test_a_pair_keeps_its_bos_and_its_last_prompt_tokens(mistral: ChatTokenizer) -> None:
    long = say("word " * 900)
    whole = mistral.encode_prompt(long)
    pair = mistral.encode_pair(long, "yes " * 600, "no", max_length=1024, max_prompt_length=512)
    assert pair.prompt.tolist() == [1, *whole[-511:]]
    assert (pair.prompt_truncated, pair.chosen_truncated, pair.rejected_truncated) == (1, 1, 0)
    assert len(pair.chosen) == 512
    assert mistral.eos_id not in pair.chosen
    assert pair.rejected[-1] == mistral.eos_id


# --- tokenizer files ---


def copy_tokenizer(shared_data: Path, to: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(shared_data / "models" / "stories260k" / name, to / name)
    return to


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_saved_padding_and_truncation_are_switched_off(shared_data: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(shared_data, tmp_path)
    saved = Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(8)
    saved.enable_padding(length=64)
    saved.save(str(folder / "tokenizer.json"))
    ids, _ = load_tokenizer(folder).encode_dialogue(say("Once upon a time", "there was"))
    plain = load_tokenizer(shared_data / "models" / "stories260k")
    assert ids.tolist() == plain.encode_dialogue(say("Once upon a time", "there was")).ids.tolist()


def test_where_bos_comes_from(shared_data: Path, tmp_path: Path) -> None:
    folder = copy_tokenizer(shared_data, tmp_path)
    config = folder / "tokenizer_config.json"
    edit_json(config, bos_token={"content": "<s>", "__type": "AddedToken"})
    assert load_tokenizer(folder).bos_id == 1
    edit_json(config, add_bos_token=False)
    without = load_tokenizer(folder)
    assert without.bos_id is None
    assert 1 not in without.encode_dialogue(say("Hi", "Hello")).ids
    config.unlink()
    by_file = load_tokenizer(folder)
    assert (by_file.bos_id, by_file.eos_id) == (1, 2)


def test_unsound_tokenizer_files(shared_data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: no tokenizer\.json"):
        load_tokenizer(tmp_path)
    folder = copy_tokenizer(shared_data, tmp_path)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not JSON"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(DataError, match="no token '<none>'"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match="unsound tokenizer"):
        load_tokenizer(folder)


def bytes_tokenizer(*merges: tuple[str, str]) -> Tokenizer:
    """A tokenizer of single characters and `merges`."""
    letters = {chr(code) for code in range(32, 127)} | set("\nï数")
    tokens = sorted(letters) + [a + b for a, b in merges]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    return tokenizer


def test_a_tokenizer_that_joins_header_and_answer_is_refused() -> None:
    with pytest.raises(DataError, match="joins"):
        ChatTokenizer(bytes_tokenizer(("\n", "H")), bos="<s>", eos="</s>")
    newlines = ChatTokenizer(bytes_tokenizer(("\n", "\n")), bos="<s>", eos="</s>")
    assert newlines.encode_dialogue(say("Hi", "a\n\nb")).assistant.sum() == 4
    with pytest.raises(DataError, match="not a prefix") as error:
        newlines.encode_dialogue(say("Hi", "\nHello"))
    assert error.value.hint
    with pytest.raises(DataError, match="not a prefix"):
        newlines.encode_pair(say("Hi"), "a", "\nb", max_length=64, max_prompt_length=32)


def test_an_error_names_the_row_it_was_given_a_name_for(mistral: ChatTokenizer) -> None:
    newlines = ChatTokenizer(bytes_tokenizer(("\n", "\n")), bos="<s>", eos="</s>")
    names = [f"row r{i} of file" for i in range(600)]
    for tokenizer, answer, problem in (
        (newlines, "\nHello", "not a prefix"),
        (mistral, "</s>", "spells the control token"),
        (mistral, "\ud800", "lone surrogate"),
    ):
        texts = ["Hello"] * 600
        texts[570] = answer
        dialogues, pairs = [say("Hi", t) for t in texts], [(say("Hi"), "a", t) for t in texts]
        for encode in (
            lambda t=tokenizer, d=dialogues: t.encode_dialogues(d, names),
            lambda t=tokenizer, p=pairs: t.encode_pairs(
                p, names, max_length=64, max_prompt_length=32
            ),
            lambda t=tokenizer, a=texts: t.encode_answers(a, names),
        ):
            with pytest.raises(DataError, match=rf"^row r570 of file: .*{problem}"):
                encode()
