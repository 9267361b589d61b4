"""What the ablations' rows say: Markdown tables beside the paper's, and the figure over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pages.svg_chart import Axis, Line, line_chart

Row = dict[str, Any]

VERDICTS = ("right", "off_form", "wrong", "neither")
# MT-Bench and AlpacaEval of arXiv 2310.16944, table 3; of these only 4.76 was checked against a
# second source.
PAPER = {
    "dsft-ddpo": ("dSFT + dDPO", 7.00, 86.07),
    "dsft": ("dSFT (dSFT-1)", 6.64, 85.65),
    "dsft-2": ("dSFT, dSFT on chosen (dSFT-2)", 6.19, 78.54),
    "ddpo": ("dDPO without dSFT", 4.76, 30.76),
}
EPOCHS = (1, 2, 3)
OURS = ("score", "wins, %", "right", "off form", "wrong", "neither")
OURS += ("first line right", "by log-prob", "by reward")
SMOOTHED = 24  # steps in one point of the training curve: 192 pairs of the tiny recipe


def everything(rows: Sequence[Row]) -> str:
    """All tables that the rows suffice for."""
    named = {row["name"]: row for row in rows}
    parts = []
    if PAPER.keys() <= named.keys():
        parts.append(ablation_table(named))
    if {"ddpo-pure", "dsft-ddpo-pure"} <= named.keys():
        parts.append(pure_table(named))
    if all(f"sft{s}-dpo{d}" in named for s in EPOCHS for d in (0, *EPOCHS)):
        parts += [grid_table(named), accuracy_table(named)]
    return "\n\n".join(parts)


def ablation_table(named: dict[str, Row]) -> str:
    """The paper's four rows, best first, with ours beside them."""
    head = ("", "MT-Bench", "AlpacaEval, %", *OURS)
    lines = []
    for name, (label, bench, wins) in PAPER.items():
        # dSFT's own preferences stand in the run that went on from it.
        prefers = named["dsft-ddpo"]["parent_logps_accuracy"] if name == "dsft" else None
        lines.append((label, f"{bench:.2f}", f"{wins:.2f}", *_ours(named[name], prefers)))
    return _table(head, lines)


def pure_table(named: dict[str, Row]) -> str:
    """dDPO with the paper's loss alone: without tiny's term of the chosen answer's likelihood."""
    lines = [(PAPER[name][0], *_ours(named[f"{name}-pure"])) for name in ("dsft-ddpo", "ddpo")]
    return _table(("`dpo.sft_weight: 0`", *OURS), lines)


def _ours(row: Row, prefers: float | None = None) -> list[str]:
    """The cells under OURS."""
    score = f"{row['score']:.2f} ± {row['score_standard_error']:.2f}"
    verdicts = [str(row["verdicts"][verdict]) for verdict in VERDICTS]
    accuracies = [_share(row["logps_accuracy"] or prefers), _share(row["rewards_accuracy"])]
    lines = str(row["first_lines_right"])
    return [score, f"{row['wins']:.1f}", *verdicts, lines, *accuracies]


def grid_table(named: dict[str, Row]) -> str:
    """Score by epochs of dSFT (down) and dDPO (across), with the right answers."""
    head = ("dSFT epochs", "no dDPO", *(f"dDPO {d}" for d in EPOCHS), "held-out dSFT loss")
    lines = []
    for sft in EPOCHS:
        rows = [named[f"sft{sft}-dpo{dpo}"] for dpo in (0, *EPOCHS)]
        cells = [f"{row['score']:.2f} ({row['verdicts']['right']})" for row in rows]
        lines.append((str(sft), *cells, f"{rows[0]['sft_eval_loss']:.4f}"))
    return _table(head, lines)


def accuracy_table(named: dict[str, Row]) -> str:
    """Held-out pairs whose chosen answer has the higher reward / the higher log-prob."""
    head = ("dSFT epochs", "no dDPO", *(f"dDPO {d}" for d in EPOCHS))
    lines = []
    for sft in EPOCHS:
        rows = [named[f"sft{sft}-dpo{dpo}"] for dpo in EPOCHS]
        cells = [f"{_share(r['rewards_accuracy'])} / {_share(r['logps_accuracy'])}" for r in rows]
        lines.append((str(sft), f"- / {_share(rows[0]['parent_logps_accuracy'])}", *cells))
    return _table(head, lines)


def figure(lines: Sequence[Row]) -> str:
    """Training and held-out accuracy over epochs of dDPO, from its metrics with every step logged.

    Raises: ValueError when steps are missing, or nothing was evaluated on the way.
    """
    steps = [line for line in lines if "loss" in line]
    if [line["step"] for line in steps] != list(range(1, len(steps) + 1)):
        raise ValueError("the figure needs dpo.log_every=1")
    name = "rewards/accuracies"
    trained = []
    for at in range(SMOOTHED, len(steps) + 1):
        window = steps[at - SMOOTHED : at]
        middle = sum(line["epoch"] for line in window) / SMOOTHED
        trained.append((middle, sum(line[name] for line in window) / SMOOTHED))
    per_epoch = steps[-1]["step"] / steps[-1]["epoch"]
    held_out = [(x["step"] / per_epoch, x[f"eval_{name}"]) for x in lines if f"eval_{name}" in x]
    if len(held_out) < 2:
        raise ValueError("the figure needs dpo.eval_every")
    lowest = min(y for _, y in trained + held_out)
    floor = int(lowest * 10) / 10 if lowest < 1 else 0.9
    ticks = [round(floor + 0.05 * i, 2) for i in range(round((1 - floor) / 0.05) + 1)]
    return line_chart(
        "Accuracy over epochs of dDPO",
        Axis("epochs of dDPO", [0, 0.5, 1, 1.5, 2, 2.5, 3]),
        Axis("accuracy: chosen has the higher reward", ticks),
        [
            Line(f"training pairs, mean of {SMOOTHED} steps", trained),
            Line("held-out pairs", held_out, dots=True),
        ],
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown; the first column to the left, figures to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines))
