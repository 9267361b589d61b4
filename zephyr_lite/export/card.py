"""The model card: README.md of an export folder, from the run's manifest and the export's report.

Says what the files are, what they were made from and with, how far each is from the trained model,
how to run them and what not to expect. The same run gives the same text: there is no date in it.
A place on this machine never gets into it: of a local path the last name is kept, and a name counts
as the hub's only where a revision or the absence of anything local says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
FILE_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
SMALL = 1_000_000_000  # parameters below which a model is called small
TRAINING = {
    "sft": "supervised fine-tuning on dialogues",
    "dpo": "direct preference optimisation on AI feedback",
}
MERGES = {
    "nf4": "The adapter was added, once and in fp32, to the base's 4-bit (NF4) values, which are "
    "what training multiplied by; the sum was rounded once, into each file's own type.",
    "original": "The adapter was added, once and in fp32, to the base's own 16-bit weights; the "
    "sum was rounded once, into each file's own type. Training saw the base's 4-bit (NF4) values.",
}
Node = Mapping[str, Any]


def model_card(manifest: Node, report: Node, *, license: str | None = None) -> str:
    """Markdown with a YAML head.

    Args:
        manifest: the run's: `name`, `recipe` (resolved), `base`, `stages`.
        report: the export's: `stage`, `files` and `folders`, as they were written and verified.
        license: of the base, where it is known, as the hub spells it.
    """
    sections = [
        _head(manifest, report, license),
        f"# {manifest['name']}\n",
        _summary(manifest, report),
        "## Files\n",
        *_files(report),
        "## How far each file is from the trained model\n",
        *_figures(report),
        "## What it was made from\n",
        *_parents(manifest, report),
        "## Recipe\n",
        *_recipe(manifest["recipe"], report["stage"]),
        "## How to run it\n",
        *_usage(manifest["name"], report),
        "## What not to expect\n",
        "\n".join(_limits(manifest, report)),
    ]
    return "\n".join(section.rstrip("\n") + "\n" for section in sections)


def public_name(path: str) -> str:
    """A name that says nothing about this machine: of a local path, its last part.

    `package:x`, hub ids and relative paths of two parts stay; those two cannot be told apart here.
    """
    is_local = path.startswith((".", "/", "~", "\\")) or path.endswith(FILE_SUFFIXES)
    if path.startswith("package:") or not (is_local or path.count("/") > 1 or "\\" in path):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "local"


def _head(manifest: Node, report: Node, license: str | None) -> str:
    head: dict[str, Any] = {}
    if base := _hub_base(manifest):
        head["base_model"] = base
    if license:
        head["license"] = _text(license)
    head["library_name"] = "transformers" if report.get("folders") else "gguf"
    head["pipeline_tag"] = "text-generation"
    if hub := [name for name, is_hub in _sources(manifest, report).items() if is_hub]:
        head["datasets"] = hub
    kinds = ["gguf"] * bool(report.get("files"))
    kinds += ["compressed-tensors"] * any(f.get("format") for f in report.get("folders", ()))
    head["tags"] = ["zephyr-lite", report["stage"], "qlora", "conversational", *kinds]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _summary(manifest: Node, report: Node) -> str:
    recipe, base = manifest["recipe"], _code(_base_name(manifest))
    trained = [TRAINING[stage] for stage in _stages(recipe, report["stage"])]
    how = " and then ".join(trained) or "nothing further"
    return (
        f"A chat model: {base} after {how}, by QLoRA "
        f"([Zephyr](https://arxiv.org/abs/2310.16944)'s recipe), made with zephyr-lite "
        f"{manifest.get('zephyr_lite', '')}".rstrip()
        + ".\n"
    )


def _files(report: Node) -> Iterator[str]:
    rows = [(f["file"], f) for f in report.get("files", ())]
    for folder in report.get("folders", ()):
        rows += [(f"{folder['folder']}/{name}", f) for name, f in folder["files"].items()]
    lines = (f"| {_code(name)} | {f['bytes']:,} | `{f['sha256']}` |" for name, f in rows)
    yield "| file | bytes | SHA-256 |\n|---|---:|---|\n" + "\n".join(lines)
    notes = {n for part in ("files", "folders") for f in report.get(part, ()) for n in _notes(f)}
    if notes:
        yield "\n".join(f"- {note}" for note in sorted(notes))


def _notes(entry: Node) -> Iterator[str]:
    name = entry.get("file") or entry["folder"]
    for note in entry.get("notes", ()):
        yield f"{_code(name)}: {_text(note)}"


def _figures(report: Node) -> Iterator[str]:
    measured = [(f, f["verify"]["drift"]) for f in report.get("files", ()) if _drift(f)]
    if measured:
        yield (
            "Each file was loaded in llama.cpp and compared with the trained model over held-out "
            "text: mean KL divergence of the next-token distributions and negative log-likelihood "
            "(nll), in nats per token; share of positions with the same most likely token; change "
            "of perplexity. Token ids, chat template and end of turn were compared too, and are "
            "equal.\n"
        )
        lines = [
            f"| {_code(f['file'])} | {_nats(d['kl_mean'])} | {d['top1']:.2%} "
            f"| {math.expm1(d['nll_file'] - d['nll_truth']):+.2%} "
            f"| {d['nll_truth']:.4f} | {d['nll_file']:.4f} | {d['positions']} |"
            for f, d in measured
        ]
        yield (
            "| file | KL | same top token | perplexity | model's nll | file's nll | positions |\n"
            "|---|---:|---:|---:|---:|---:|---:|\n" + "\n".join(lines) + "\n"
        )
    lines = []
    for entry in [
        *(f for f in report.get("files", ()) if not _drift(f)),
        *report.get("folders", ()),
    ]:
        said = _text(entry.get("summary") or "not compared with the trained model")
        lines.append(f"- {_code(entry.get('file') or entry['folder'])}: {said}")
    if lines:
        yield "\n".join(lines)
    if asked := report.get("questions"):
        first = _code(report["files"][0]["file"])
        yield f"Of {asked['asked']} held-out questions {first} answered {asked['right']} rightly."


def _nats(kl: float) -> str:
    """Below 1e-5 a mean KL is the rounding of its summands, and may be negative."""
    return f"{kl:.2g}" if kl >= 1e-5 else "< 0.00001"


def _drift(entry: Node) -> bool:
    return "drift" in entry.get("verify", {})


def _parents(manifest: Node, report: Node) -> Iterator[str]:
    stages, base = manifest.get("stages", {}), manifest.get("base", {})
    revision = f", revision {_code(base['revision'])}" if base.get("revision") else ""
    lines = [f"base: {_code(_base_name(manifest))}{revision}"]
    if base.get("source"):
        lines.append(f"base's files, as found (hash): `{base['source']}`")
    if base.get("sha256"):
        lines.append(f"base's files, as trained on (hash): `{base['sha256']}`")
    for stage in _stages(manifest["recipe"], report["stage"]):
        if adapter := stages.get(stage, {}).get("adapter"):
            lines.append(f"{stage} adapter (hash): `{adapter}`")
    if report["stage"] == "dpo" and (pairs := stages.get("aif", {}).get("pairs")):
        lines.append(f"preference pairs (hash): `{pairs}`")
    if template := stages.get("export", {}).get("inputs", {}).get("template"):
        lines.append(f"chat template (hash): `{template}`")
    if sources := _sources(manifest, report):
        lines.append(f"data: {', '.join(map(_code, sources))}")
    export = manifest["recipe"].get("export", {})
    yield "\n".join(f"- {line}" for line in lines) + "\n"
    quantised = base.get("quantization") not in (None, "none")
    if quantised and (merge := MERGES.get(export.get("base_weights", "nf4"))):
        yield merge


def _recipe(recipe: Node, last: str) -> Iterator[str]:
    rows: dict[str, Any] = {"seed": recipe.get("seed")}
    for stage in _stages(recipe, last):
        settings = recipe[stage]
        keys = ("epochs", "max_steps", "batch_size", "learning_rate", "schedule", "max_length")
        keys += ("packing", "loss_on") if stage == "sft" else ("adapter", "loss", "beta")
        rows |= {f"{stage}.{key}": settings.get(key) for key in keys}
        lora = settings.get("lora") or {}
        rows |= {f"{stage}.lora.{key}": lora.get(key) for key in ("r", "alpha", "dropout")}
        if start := settings.get("from"):
            rows[f"{stage}.from"] = public_name(start)
    lines = [f"| {key} | {_code(str(value))} |" for key, value in rows.items() if value is not None]
    yield "| field | value |\n|---|---|\n" + "\n".join(lines) + "\n"


def _usage(name: str, report: Node) -> Iterator[str]:
    adapters = [f["file"] for f in report.get("files", ()) if f.get("quant") == "lora"]
    models = [f["file"] for f in report.get("files", ()) if f["file"] not in adapters]
    if models:
        yield _shell("llama.cpp", f"llama-cli -m {models[0]}", f"llama-server -m {models[0]}")
        yield _shell("Ollama", f"ollama create {name} -f Modelfile", f"ollama run {name}")
    for adapter in adapters:
        yield _shell(
            "llama.cpp, with the base's own GGUF", f"llama-server -m BASE.gguf --lora {adapter}"
        )
    for folder in report.get("folders", ()):
        place = folder["folder"]
        if folder.get("format") is None:
            yield (
                f"transformers:\n```python\nfrom transformers import pipeline\n"
                f'chat = pipeline("text-generation", "./{place}", dtype="auto")\n'
                'print(chat([{"role": "user", "content": "Hello"}], max_new_tokens=256))\n```\n'
            )
        yield _shell("vLLM", f"vllm serve ./{place}")


def _limits(manifest: Node, report: Node) -> Iterator[str]:
    sizes = [f["parameters"] for f in report.get("files", ()) if f.get("quant") != "lora"]
    if sizes and sizes[0] < SMALL:
        yield (
            f"- It is small: {sizes[0] / 1e6:,.1f} million parameters. It knows little beyond its "
            "training data and is no general assistant."
        )
    yield "- It states false things with confidence. Check what it says before you rely on it."
    if report["stage"] == "dpo":
        yield (
            "- Its preferences are those of the model that rated the feedback, biases included. It "
            "was not trained to refuse harmful requests."
        )
    yield (
        "- The figures above say how close each file is to the trained model on text like its "
        "training data. They say nothing about how good that model is."
    )


def _base_name(manifest: Node) -> str:
    return public_name(manifest["recipe"]["base"]["model"])


def _hub_base(manifest: Node) -> str | None:
    """The base's hub id. Only a hub's snapshot has a revision; a local folder has none."""
    name = manifest.get("base", {}).get("model", "")
    has_revision = manifest.get("base", {}).get("revision") is not None
    return name if has_revision and HUB_ID.fullmatch(name) else None


def _stages(recipe: Node, last: str) -> list[str]:
    """The stages that made the exported model."""
    return [s for s in ("sft", "dpo") if recipe.get(s) and (s == "sft" or last == "dpo")]


def _sources(manifest: Node, report: Node) -> dict[str, bool]:
    """Name of each source of training rows -> whether it is surely a data set of the hub."""
    data, found = manifest["recipe"].get("data") or {}, {}
    for part in ("dialogues", "feedback") if report["stage"] == "dpo" else ("dialogues",):
        for source in (data.get(part) or {}).get("train") or ():
            name = public_name(source["path"])
            is_hub = any(source.get(key) for key in ("split", "file", "revision"))
            found[name] = is_hub and HUB_ID.fullmatch(name) is not None
    return found


def _shell(title: str, *lines: str) -> str:
    return f"{title}:\n```sh\n" + "\n".join(lines) + "\n```\n"


def _code(text: str) -> str:
    return f"`{_text(text).replace('`', '')}`"


def _text(text: str) -> str:
    """One line that ends neither a table's cell nor the head."""
    return " ".join(str(text).split()).replace("|", "/")
