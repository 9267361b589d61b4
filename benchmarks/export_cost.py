"""What an export costs beside the usual route: time, memory, temporary disk, type by type.

    python benchmarks/export_cost.py --tokenizer FOLDER --llama-cpp FOLDER --llama-python PYTHON
    python benchmarks/export_cost.py --tokenizer FOLDER --layers 1 --quants f16       a trial

The model has Mistral-7B's widths, 4 of its 32 layers, embedding and head: 1.14 B parameters, drawn
at random, in bf16, with a LoRA of rank 16 on every linear. The usual route is what people run:

    merge       PEFT's merge_and_unload, save_pretrained in bf16
    convert     llama.cpp's convert_hf_to_gguf.py to an F16 GGUF
    quantise    llama.cpp's llama_model_quantize

FOLDER of --llama-cpp is its source tree with the converter (which needs sentencepiece besides);
PYTHON of --llama-python has llama-cpp-python, built from that tree. Without the two only
our side is measured. Every step is a process of its own, one after the other, with as many threads
as there are cores; ours runs beside theirs in each round, and a row has medians over rounds.

Memory is the highest anonymous resident set (RssAnon), sampled; what is mapped from files the
kernel may drop. Temporary disk is the most that a route has on disk beyond the model it starts from
and the file that it makes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rows.provenance import cpu_name, installed_version, read_commit

ROOT = Path(__file__).resolve().parent.parent
STEPS = ROOT / "benchmarks" / "export" / "steps.py"
QUANTS = ("f16", "q8_0", "q4_k_m", "q5_k_m", "q6_k")
CONVERTED = ("f32", "bf16")  # types that llama.cpp's converter writes, and its quantiser does not
SAMPLE_SECONDS = 0.02


def main() -> None:
    """Make the model, measure every route and type, append rows, print them."""
    arguments = _parse()
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        source = ["--tokenizer", str(arguments.tokenizer), "--layers", str(arguments.layers)]
        cache = {"ZEPHYR_LITE_HOME": str(work / "home")}
        _run([sys.executable, STEPS, "make", work, *source], work, cache)
        for _ in range(arguments.rounds):
            for key, figures in _round(arguments, work):
                found.setdefault(key, []).append(figures)
                print(key, json.dumps(figures), file=sys.stderr, flush=True)
    rows = [_row(key, runs, arguments) for key, runs in found.items()]
    with arguments.out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for row in rows:
        print(
            f"{row['quant']:7} {row['route']:15} {row['seconds']:8.1f} s {row['cpu_seconds']:8.1f} "
            f"CPU s {row['peak_anonymous_gib']:6.2f} GiB {row['temporary_gb']:6.2f} GB disk"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Our export beside the usual route.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--llama-cpp", type=Path, help="llama.cpp's source tree")
    parser.add_argument("--llama-python", type=Path, help="a Python with llama-cpp-python")
    parser.add_argument("--quants", nargs="+", default=list(QUANTS))
    parser.add_argument("--brief", action="store_true", help="ours by `auto` alone")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--work", type=Path, help="folder for temporary files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/export_cost.jsonl")
    return parser.parse_args()


def _round(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(quant/route, figures) of every case, once."""
    for quant in arguments.quants:
        for base, quantiser in _ours(quant)[: 1 if arguments.brief else None]:
            out = work / "ours"
            command = [sys.executable, STEPS, "ours", work, quant, base, quantiser, out]
            yield f"{quant}/ours {base} {quantiser}", _measure([command], out, quant)
    if arguments.llama_cpp and arguments.llama_python:
        yield from _usual(arguments, work)


def _ours(quant: str) -> list[tuple[str, str]]:
    """(base, quantiser) to measure; both routes where there are two."""
    if quant in ("f16", "bf16", "f32", "q8_0"):
        return [("original", "auto"), ("nf4", "auto")]
    return [("original", q) for q in ("auto", "ggml", "torch")] + [("nf4", "auto")]


def _usual(arguments: argparse.Namespace, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Merge and convert once, quantise to each type; a case sums the steps that it needs."""
    out, source = work / "usual", arguments.llama_cpp
    merged, f16 = out / "merged", out / "f16.gguf"
    merge = [sys.executable, STEPS, "merge", work, merged]
    convert = [sys.executable, source / "convert_hf_to_gguf.py", merged, "--outtype"]
    own = os.environ.get("PYTHONPATH", "")
    environment = {"PYTHONPATH": f"{source / 'gguf-py'}{os.pathsep}{own}"}
    shared = [_step(merge, out), _step([*convert, "f16", "--outfile", f16], out, environment)]
    for quant in arguments.quants:
        if quant in CONVERTED:
            continue
        final, steps = f16, list(shared)
        if quant != "f16":
            final = out / f"{quant}.gguf"
            command = [arguments.llama_python, STEPS, "quantise", f16, final, quant]
            steps.append(_step(command, out))
        yield f"{quant}/usual", _sum(steps, final.stat().st_size)
        if final != f16:
            final.unlink()
    f16.unlink()
    for quant in arguments.quants:
        if quant in (*CONVERTED, "q8_0"):  # the last one both can write
            final = out / "direct.gguf"
            step = _step([*convert, quant, "--outfile", final], out, environment)
            name = f"{quant}/usual" + " direct" * (quant == "q8_0")
            yield name, _sum([shared[0], step], final.stat().st_size)
            final.unlink()
    shutil.rmtree(out)


def _measure(commands: list[list[Any]], out: Path, quant: str) -> dict[str, Any]:
    """Figures of some steps of which the last leaves one file in `out`."""
    steps = [_step(command, out) for command in commands]
    size = sum(f.stat().st_size for f in out.rglob("*.gguf"))
    shutil.rmtree(out)
    return _sum(steps, size) | {"quant": quant}


def _sum(steps: list[dict[str, float]], final_bytes: int) -> dict[str, Any]:
    return {
        "seconds": sum(s["seconds"] for s in steps),
        "cpu_seconds": sum(s["cpu_seconds"] for s in steps),
        "peak_anonymous_gib": max(s["peak_anonymous_gib"] for s in steps),
        "temporary_gb": max(0.0, (max(s["disk"] for s in steps) - final_bytes) / 1e9),
        "file_gb": final_bytes / 1e9,
        "steps": [round(s["seconds"], 2) for s in steps],
    }


def _step(
    command: list[Any], out: Path, environment: dict[str, str] | None = None
) -> dict[str, float]:
    """Run one process to its end; its time, memory and the most that lay in `out`."""
    out.mkdir(exist_ok=True)
    return _run(command, out, environment)


def _run(
    command: list[Any], out: Path, environment: dict[str, str] | None = None
) -> dict[str, float]:
    began, before = time.monotonic(), os.times()
    process = subprocess.Popen(
        [str(word) for word in command],
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **(environment or {})},
        stdout=sys.stderr,
    )
    peaks = {"memory": 0, "disk": 0}
    watcher = threading.Thread(target=_watch, args=(process, out, peaks), daemon=True)
    watcher.start()
    status = process.wait()
    watcher.join()
    if status:
        raise SystemExit(f"{command[:4]} ended with {status}")
    after = os.times()
    spent = after.children_user + after.children_system
    spent -= before.children_user + before.children_system
    return {
        "seconds": time.monotonic() - began,
        "cpu_seconds": spent,
        "peak_anonymous_gib": peaks["memory"] / 2**20,
        "disk": max(peaks["disk"], _size(out)),
    }


def _watch(process: subprocess.Popen[bytes], out: Path, peaks: dict[str, int]) -> None:
    """Keep the highest RssAnon (KiB) of a process and the most bytes in a folder."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text(encoding="utf-8").splitlines()
        except OSError:
            return
        anonymous = next((line for line in lines if line.startswith("RssAnon")), None)
        if anonymous:
            peaks["memory"] = max(peaks["memory"], int(anonymous.split()[1]))
        peaks["disk"] = max(peaks["disk"], _size(out))
        time.sleep(SAMPLE_SECONDS)


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed between the two calls
            continue
    return total


def _row(key: str, runs: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    quant, _, route = key.partition("/")
    figures = ("seconds", "cpu_seconds", "peak_anonymous_gib", "temporary_gb", "file_gb")
    return {
        "benchmark": "export_cost",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        **{name: installed_version(name) for name in ("torch", "gguf", "xllamacpp", "peft")},
        "load": round(os.getloadavg()[0], 2),
        "commit": read_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "layers": arguments.layers,
        "quant": quant,
        "route": route,
        "repeats": len(runs),
        **{name: round(median(run[name] for run in runs), 3) for name in figures},
        "steps": runs[0]["steps"],
    }


if __name__ == "__main__":
    main()
