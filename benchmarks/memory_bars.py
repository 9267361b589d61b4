"""What the built-in recipes take on the cards they are for: rows and a picture, PROJECTED.

    python benchmarks/memory_bars.py [--out results/plans.jsonl] [--figure ../docs/memory-cards.svg]

Every figure is `zephyr-lite plan NAME --gpu CARD --json`: arithmetic, not a run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

from pages.svg_chart import WIDTH
from rows.provenance import installed_version

HERE = Path(__file__).resolve().parent
PLANS = (
    ("zephyr-7b", "RTX 4090"),
    ("zephyr-7b", "RTX 3090"),
    ("zephyr-llama-3.1-8b", "RTX 4090"),
    ("zephyr-qwen2.5-7b", "RTX 4090"),
    ("zephyr-7b-16gb", "RTX 4080"),
    ("zephyr-7b-16gb", "RTX 4060 Ti 16GB"),
    ("zephyr-7b-12gb", "RTX 4070"),
    ("zephyr-7b-12gb", "RTX 3060 12GB"),
    ("zephyr-7b-8gb", "RTX 4060"),
)
DRAWN = ("RTX 4090", "RTX 4080", "RTX 4070", "RTX 4060")
PARTS = (
    ("weights", ("weights", "embeddings"), "#0a63c9"),
    ("adapters", ("adapters",), "#c4420a"),
    ("gradients", ("gradients",), "#e8a33d"),
    ("optimizer", ("optimizer",), "#8250df"),
    ("activations", ("activations",), "#2da44e"),
    ("workspace", ("workspace",), "#57606a"),
    ("CUDA and slack", ("context", "slack"), "#a0a8b0"),
)
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.free { fill: none; stroke: #8b949e; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }"""
LEFT, RIGHT, TOP, STEP, HEIGHT = 210, 70, 78, 30, 20


def plan(recipe: str, card: str) -> dict[str, Any]:
    """What the command says of a recipe on a card."""
    words = ["plan", recipe, "--gpu", card, "--offline", "--json", "--quiet"]
    command = [sys.executable, "-m", "zephyr_lite.cli", *words]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


def rows() -> list[dict[str, Any]]:
    """One row a training."""
    found = []
    for recipe, card in PLANS:
        planned = plan(recipe, card)
        for stage, entry in planned["stages"].items():
            chosen = entry["chosen"]
            found.append(
                {
                    "benchmark": "plans",
                    "kind": "projection",
                    "recipe": recipe,
                    "card": card,
                    "task": stage,
                    "budget_bytes": planned["budget_bytes"],
                    **{k: v for k, v in chosen.items() if k != "step_seconds_projected"},
                    "steps": entry["steps"],
                    "step_seconds": round(chosen["step_seconds_projected"], 3),
                    "hours": round(entry["seconds"] / 3600, 2),
                    "reference_hours": round(entry.get("reference_seconds", 0) / 3600, 2),
                    "lengths": entry["lengths"]["source"],
                    "version": installed_version("zephyr-lite"),
                }
            )
    return found


def table(found: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    heads = "recipe | card | training | tokens | layers keep | planned GiB | of | hours, PROJECTED"
    lines = [f"| {heads} |", "|---|---|---|---:|---:|---:|---:|---:|"]
    for row in found:
        total, budget = row["bytes"]["total"] / 2**30, row["budget_bytes"] / 2**30
        others = " (offload)" if row["checkpointing"] == "offload" else ""
        hours = row["hours"] + row["reference_hours"]
        cells = (
            row["recipe"], row["card"], {"sft": "dSFT", "dpo": "dDPO + reference"}[row["task"]],
            row["tokens_per_micro_batch"], f"{row['keep_layers']}{others}",
            f"{total:.1f}", f"{budget:.1f}", f"{hours:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def figure(found: list[dict[str, Any]]) -> str:
    """A bar a training on one card of each class, as wide as what the card lends."""
    drawn = [row for row in found if row["card"] in DRAWN and "-7b" in row["recipe"]]
    drawn = [row for row in drawn if row["recipe"].startswith("zephyr-7b")]
    most = max(row["budget_bytes"] for row in drawn)
    title = "Planned GPU memory of zephyr-7b by card (projected, GiB)"
    height = TOP + STEP * len(drawn) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{STYLE}</style>',
        f'<text x="16" y="22">{escape(title)}</text>',
    ]
    at = 16.0
    for name, _, colour in PARTS:
        parts.append(f'<rect x="{at:.0f}" y="38" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{at + 17:.0f}" y="49">{escape(name)}</text>')
        at += 33 + 6.6 * len(name)
    for number, row in enumerate(drawn):
        parts += _bar(row, TOP + STEP * number, (WIDTH - LEFT - RIGHT) / most)
    return "\n".join([*parts, "</svg>", ""])


def _bar(row: dict[str, Any], top: int, scale: float) -> list[str]:
    name = f"{row['card'].removeprefix('RTX ')}, {'dSFT' if row['task'] == 'sft' else 'dDPO'}"
    parts = [f'<text x="{LEFT - 8}" y="{top + 15}" text-anchor="end">{escape(name)}</text>']
    at = float(LEFT)
    for _, names, colour in PARTS:
        wide = scale * sum(row["bytes"][part] for part in names)
        place = f'x="{at:.1f}" y="{top}" width="{wide:.1f}" height="{HEIGHT}"'
        parts.append(f'<rect {place} fill="{colour}"/>')
        at += wide
    end = scale * row["budget_bytes"]
    parts.append(
        f'<rect class="free" x="{LEFT}" y="{top}" width="{end:.1f}" height="{HEIGHT}"/>'
        f'<text x="{LEFT + end + 8:.1f}" y="{top + 15}">{row["bytes"]["total"] / 2**30:.1f}</text>'
    )
    return parts


def main() -> None:
    """Plan all, write rows and picture, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "plans.jsonl")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "memory-cards.svg")
    arguments = parser.parse_args()
    found = rows()
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    arguments.figure.write_text(figure(found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
