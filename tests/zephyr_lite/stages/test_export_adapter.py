"""Adapters that plain PEFT saved, exported by the command line: no run, no recipe of their own."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WEIGHTS = "adapter_model.safetensors"
MARKS = ("<|im_start|>", "<|im_end|>")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q8 = ("--quant", "q8_0")
Export = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, so that the base is quantised once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def base(tiny_mistral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_mistral` in 16 bits; its tokenizer has no chat template."""
    folder = Path(shutil.copytree(tiny_mistral, tmp_path_factory.mktemp("plain") / "base"))
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def save_adapter(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A random LoRA on all linears, as `PeftModel.save_pretrained` leaves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **options})
        peft = get_peft_model(model, config)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.05
        peft.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter without tokenizer."""
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "first", 1)


@pytest.fixture(scope="module")
def chatml(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of a trainer that added ChatML's two tokens, in rows the base has to spare."""
    folder = save_adapter(base, tmp_path_factory.mktemp("adapters") / "chatml", 2, r=8)
    spec = json.loads((base / "tokenizer.json").read_text())
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    free = len(spec["model"]["vocab"])
    spec["added_tokens"] += [
        {"id": free + i, "content": mark, "normalized": False, **flags}
        for i, mark in enumerate(MARKS)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((base / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def export(command: Any, home: Path) -> Export:
    """`export(out, [adapters], "--base", ...)`: exit code and output."""

    def call(out: Path, adapters: list[Path], *words: Any, **options: Any) -> tuple[int, str]:
        named = [word for folder in adapters for word in ("--adapter", str(folder))]
        fewer = ("--set", "export.verify_tokens=8")  # over eight prompts
        argv = ("export", *named, "--out", str(out), *fewer, *map(str, words))
        status, text = command.run(*argv, home=home, **options)
        assert "Traceback" not in text
        return status, text

    return call


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def field(path: Path, key: str) -> Any:
    found = gguf.GGUFReader(path).get_field(key)
    assert found is not None, key
    return found.contents()


def stamps(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*")}


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("weights", ["nf4", "original"])
def test_an_adapter_of_another_template(export, base, chatml, tmp_path, weights):
    out = tmp_path / "my model!"
    words = (*Q8, "--base", base, "--base-weights", weights)
    status, text = export(out, [chatml], *words)
    assert status == 0, text
    path = out / "my-model-Q8_0.gguf"
    assert field(path, "tokenizer.chat_template") == CHATML
    tokens = field(path, "tokenizer.ggml.tokens")
    assert tokens[field(path, "tokenizer.ggml.eos_token_id")] == "<|im_end|>"
    entry = report_of(out)["files"][0]
    assert entry["verify"]["passed"]
    assert entry["verify"]["stop"]["token"] == "<|im_end|>"
    assert entry["verify"]["gate"]["allowances"] == [], "the truth has the same base weights"
    assert 'PARAMETER stop "<|im_end|>"' in (out / "Modelfile").read_text()
    said = "16-bit weights\n" if weights == "original" else "base's NF4 values"
    assert said in text

    before = stamps(out)
    status, text = export(out, [chatml], *words)
    assert status == 0
    assert "nothing to do" in text
    assert stamps(out) == before
    path.write_bytes(path.read_bytes()[:-1])
    status, text = export(out, [chatml], *words, "--no-verify")
    assert status == 0, text
    assert report_of(out)["files"][0]["sha256"] == entry["sha256"]
    assert path.stat().st_size == entry["bytes"]


def test_two_adapters_on_top_of_each_other_are_both_in_the_merged_model(
    export, base, first, chatml, tmp_path
):
    words = ("--quant", "f32", "--merged", "--base", base, "--base-weights", "original")
    status, text = export(tmp_path / "out", [first, chatml], *words)
    assert status == 0, text
    assert report_of(tmp_path / "out")["files"][0]["verify"]["passed"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for folder in (first, chatml):
        model = PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    merged = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    for name, expected in model.state_dict().items():
        # float16 keeps 11 bits of a value, or 2**-25 of one below its smallest normal.
        assert torch.allclose(merged[name].float(), expected, rtol=6e-4, atol=1e-7), name


@pytest.mark.parametrize("template", ["zephyr", "own"])
def test_a_template_is_given_where_nobody_has_one(export, base, first, tmp_path, template):
    own = tmp_path / "own.jinja"
    own.write_text(CHATML)
    out = tmp_path / "out"
    status, text = export(out, [first], *Q8, "--base", base)
    assert status == 2
    assert "no chat template" in text
    assert "--chat-template FILE, or zephyr" in text
    assert not out.exists()
    named = own if template == "own" else "zephyr"
    status, text = export(out, [first], *Q8, "--base", base, "--chat-template", named)
    assert status == 0, text
    stored = field(out / "out-Q8_0.gguf", "tokenizer.chat_template")
    assert stored == CHATML if template == "own" else "<|assistant|>" in stored


def test_a_file_is_no_model_and_another_choice_goes_on_from_its_part(export, spiky_base, tmp_path):
    adapter = save_adapter(spiky_base, tmp_path / "adapter", 3)
    out, words = tmp_path / "out", ("--base-weights", "original", "--chat-template", "zephyr")
    both = ("--quant", "f32", *Q8, *words)
    status, text = export(out, [adapter], *both)
    assert status == 7
    assert "error: out-Q8_0.gguf is not the trained model: mean KL" in text
    report = report_of(out)
    assert report["failed"]["file"] == "out-Q8_0.gguf"
    assert report["files"] == []
    assert not list(out.glob("*.gguf"))
    assert {p.name for p in out.glob("*.part")} == {"out-F32.gguf.part", "out-Q8_0.gguf.part"}
    status, text = export(out, [adapter], "--quant", "f32", *words)
    assert status == 0, text
    assert (out / "out-F32.gguf").exists()
    assert "failed" not in report_of(out)
    assert (out / "out-Q8_0.gguf.part").exists()


# ---------------------------------------------------------------- refused


def widened(base: Path, folder: Path) -> Path:
    """An adapter for a base twice as wide."""
    weights = load_file(save_adapter(base, folder, 4, r=2) / WEIGHTS)
    wider = {n: torch.cat([t, t], -1) if "lora_A" in n else t for n, t in weights.items()}
    save_file(wider, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--base", "./nowhere", "--chat-template", "zephyr"), "nowhere"),
        (("--chat-template", "no.jinja"), "--chat-template no.jinja: cannot be read"),
        (("--merged", "--set", "export.merged_dtype=nf4"), "merged 4-bit"),
        (("--stage", "sft"), "--stage"),
        (("--run", "x"), "--run"),
        (("--quant", "q9_9"), "q9_9"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_leaves_no_trace(export, base, first, tmp_path, words, said):
    named = () if "--base" in words else ("--base", base)
    status, text = export(tmp_path / "out", [first], *named, *words)
    assert status == 2, text
    assert said in text
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_leave_no_trace(export, base, tmp_path):
    words = ("--base", base, "--chat-template", "zephyr")
    for folder, said in (
        (widened(base, tmp_path / "wide"), "is for shape"),
        (tmp_path / "none", "none"),
    ):
        status, text = export(tmp_path / "out", [folder], *words)
        assert status == 2, text
        assert said in text
        assert not (tmp_path / "out").exists()


def test_adapter_and_out_belong_together(command, home, first):
    for words in (("--adapter", str(first)), ("--out", "x"), ("--base", "x")):
        status, text = command.run("export", *words, home=home)
        assert status == 2
        assert "needs --adapter and --out" in text
        assert "hint: zephyr-lite export --adapter DIR" in text


def test_original_weights_of_a_base_that_has_none(export, base, first, home, tmp_path):
    words = (*Q8, "--chat-template", "zephyr")
    assert export(tmp_path / "nf4", [first], *words, "--base", base)[0] == 0
    quantised = next(p for p in (home / "bases").iterdir() if p.is_dir())
    more = ("--base", quantised, "--base-weights", "original")
    status, text = export(tmp_path / "out", [first], *words, *more)
    assert status == 2
    assert "is quantised already" in text
    assert "hint: leave it at nf4" in text
    assert not (tmp_path / "out").exists()


def test_places_that_cannot_be_written(export, base, first, tmp_path):
    words = (*Q8, "--base", base, "--chat-template", "zephyr")
    file = tmp_path / "file"
    file.write_text("mine")
    for out in (file, file / "below", Path("/proc/out")):
        status, text = export(out, [first], *words)
        assert status == 5, text
        assert f"error: {out}: cannot be written" in text
    assert file.read_text() == "mine"


def test_a_folder_in_use_is_left_alone(export, base, first, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, text = export(out, [first], *Q8, "--base", base, "--chat-template", "zephyr")
    assert status == 6
    assert "in use by another zephyr-lite" in text
    assert [p.name for p in out.iterdir()] == [".lock"]


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize(
    ("sig", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_stopped_it_goes_on_where_it_was(export, base, chatml, tmp_path, sig, code):
    out, words = tmp_path / "out", (*Q8, "--base", base)
    journal = out / "out-Q8_0.gguf.part.jsonl"

    def written() -> bool:
        return journal.exists() and journal.read_bytes().count(b"\n") >= 20

    status, text = export(out, [chatml], *words, kill_when=written, sig=sig)
    assert status == code, text
    if code > 0:
        assert "same command again" in text
    assert not (out / "report.json").exists()
    kept = [journal.read_bytes().count(b"\n")]

    def watch() -> bool:
        with suppress(FileNotFoundError):
            kept.append(journal.read_bytes().count(b"\n"))
        return False

    status, text = export(out, [chatml], *words, kill_when=watch)
    assert status == 0, text
    assert min(kept) >= 20, "what was written is not written again"
    assert not list(out.glob("*.part*"))


# ---------------------------------------------------------------- around it


def test_without_llama_cpp_weights_are_read_back(export, base, chatml, tmp_path):
    words = (*Q8, "--base", base, "--lora-gguf")
    status, text = export(tmp_path, [chatml], *words, without=["xllamacpp"])
    assert status == 0, text
    assert "weights read back, at most" in text
    assert report_of(tmp_path)["files"][0]["verify"]["passed"]


def test_no_verify_and_then_verify(export, base, chatml, tmp_path):
    words = (*Q8, "--base", base)
    status, text = export(tmp_path, [chatml], *words, "--no-verify")
    assert status == 0, text
    assert "not verified" in text
    status, text = export(tmp_path, [chatml], *words)
    assert status == 0, text
    assert report_of(tmp_path)["files"][0]["verify"]["passed"], "it was not compared before"


def test_ollama(export, base, chatml, tmp_path):
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "made: $*"\n')
    program.chmod(0o755)
    out, words = tmp_path / "Out", (*Q8, "--base", base, "--no-verify", "--ollama")
    status, text = export(out, [chatml], *words, env={"PATH": str(tmp_path)})
    assert status == 3
    assert "hint: install it" in text
    path = {"PATH": f"{program.parent}:{os.environ['PATH']}"}
    status, text = export(out, [chatml], *words, env=path)
    assert status == 0, text
    assert "nothing to do" in text
    assert "made: create out -f Modelfile" in text
