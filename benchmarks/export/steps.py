"""The steps that export_cost.py measures, each a process of its own.

make WORK --tokenizer FOLDER --layers N     the model, its NF4 copy, an adapter
ours WORK QUANT BASE QUANTISER OUT          our whole export, as `zephyr-lite export` writes it
merge WORK OUT                              PEFT's merge, saved
quantise IN OUT QUANT                       llama.cpp's own; needs llama-cpp-python and nothing else
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(work: Path, tokenizer: Path, layers: int) -> None:
    """Write `original/` (bf16), `nf4/` and `adapter/` into `work`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

    from zephyr_lite.model.base import prepare
    from zephyr_lite.recipe import Base

    torch.manual_seed(0)
    config = MistralConfig(num_hidden_layers=layers, dtype="bfloat16")
    torch.set_default_dtype(torch.bfloat16)
    model = MistralForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    folder = work / "original"
    model.save_pretrained(folder)
    _copy_tokenizer(tokenizer, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    adapted = get_peft_model(loaded, LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    adapted.save_pretrained(str(work / "adapter"))
    files = prepare(Base(model=str(folder)), torch.device("cpu"), offline=True)
    shutil.copytree(files.folder, work / "nf4")
    shutil.rmtree(files.folder)


def ours(work: Path, quant: str, base: str, quantiser: str, out: Path) -> None:
    """Fold and write one GGUF as the export stage does, without the comparison that follows."""
    import torch

    from zephyr_lite.data.chat import ZEPHYR_TEMPLATE
    from zephyr_lite.export.artefacts import Source, plan
    from zephyr_lite.export.streaming import stream
    from zephyr_lite.export.weights.fold import FoldedModel
    from zephyr_lite.recipe import Export

    settings = Export.model_validate({"quants": [quant], "quantiser": quantiser})
    model = FoldedModel(work / base, work / "adapter")
    cpu = torch.device("cpu")
    source = Source(model, work / base, ZEPHYR_TEMPLATE, "model", "benchmark", {}, cpu)
    targets = plan(source, settings, out)
    stream(model, targets)
    for target in targets:
        target.commit()


def merge(work: Path, out: Path) -> None:
    """PEFT's merge in bf16, saved with the tokenizer's files."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(work / "original", dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(base, str(work / "adapter")).merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(out)
    _copy_tokenizer(work / "original", out)


def quantise(source: Path, out: Path, quant: str) -> None:
    """llama.cpp's llama_model_quantize with its default settings."""
    import llama_cpp  # pyright: ignore[reportMissingImports] - of an environment of its own

    settings = llama_cpp.llama_model_quantize_default_params()
    kind = f"LLAMA_FTYPE_MOSTLY_{quant.upper()}"
    settings.ftype = getattr(llama_cpp, kind)
    names = (str(source).encode(), str(out).encode())
    if status := llama_cpp.llama_model_quantize(*names, settings):
        raise SystemExit(f"llama_model_quantize: {status}")


def _copy_tokenizer(source: Path, out: Path) -> None:
    """The converter wants SentencePiece's own file, which transformers does not save."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def main() -> None:
    """Run the step that the command line names."""
    step, *words = sys.argv[1:]
    if step == "make":
        options = dict(zip(words[1::2], words[2::2], strict=True))
        make(Path(words[0]), Path(options["--tokenizer"]), int(options["--layers"]))
    elif step == "ours":
        ours(Path(words[0]), words[1], words[2], words[3], Path(words[4]))
    elif step == "merge":
        merge(Path(words[0]), Path(words[1]))
    elif step == "quantise":
        quantise(Path(words[0]), Path(words[1]), words[2])
    else:
        raise SystemExit(f"no step {step}")


if __name__ == "__main__":
    main()
