"""A layout on the device: its tensors, and its attention planned once for all layers.

The last layer needs queries only from the first token of a segment that predicts something: of a
prompt, whose answer alone is scored, it computes keys and values, and one row of everything else.

Shapes: T tokens of the row, U rows of the last layer, N scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from zephyr_kernels.attention import Plan, make_plan
from zephyr_kernels.segments import Segment

from zephyr_lite.data.layout import Layout


@dataclass(frozen=True)
class LastRows:
    """What the last layer computes.

    rows_U: the tokens it computes queries for. plan: their attention. scored_N: where the row that
    predicts target n stands among them.
    """

    rows_U: torch.Tensor
    plan: Plan
    scored_N: torch.Tensor


@dataclass(frozen=True)
class DeviceLayout:
    """See the module; `last` is None where nothing is scored or every row is needed.

    longest: positions of the longest sequence, tokens; known here without asking the device.
    """

    longest: int
    ids_T: torch.Tensor
    positions_T: torch.Tensor
    rows_N: torch.Tensor
    targets_N: torch.Tensor
    plan: Plan
    last: LastRows | None


def to_device(layout: Layout, device: torch.device) -> DeviceLayout:
    """Move a layout to the device and plan its attention."""
    names = ("ids_T", "positions_T", "rows_N", "targets_N")
    tensors = {name: torch.from_numpy(getattr(layout, name)).to(device) for name in names}
    segments = [
        Segment(q_start=q, q_len=n, k_start=q, c_start=c, c_len=m) for q, n, c, m in _spans(layout)
    ]
    plan = make_plan(segments, layout.n_tokens, layout.n_tokens, device)
    longest = int(layout.positions_T.max()) + 1
    return DeviceLayout(longest, **tensors, plan=plan, last=_last_rows(layout, device))


def _spans(layout: Layout) -> list[tuple[int, int, int, int]]:
    columns = (layout.q_start_S, layout.q_len_S, layout.c_start_S, layout.c_len_S)
    return list(zip(*(c.tolist() for c in columns), strict=True))


def _last_rows(layout: Layout, device: torch.device) -> LastRows | None:
    """Leave out the queries before a segment's first predicting row and behind its last."""
    needed = np.unique(layout.rows_N)
    segments, rows, done = [], [], 0
    for q_at, n, c_at, c_len in _spans(layout):
        inside = needed[np.searchsorted(needed, q_at) : np.searchsorted(needed, q_at + n)]
        if len(inside) == 0:
            continue
        first, last = int(inside[0]), int(inside[-1])
        kept = last + 1 - first
        segments.append(Segment(done, kept, q_at, first - q_at, c_at, c_len))
        rows.append(np.arange(first, last + 1))
        done += kept
    if done in (0, layout.n_tokens):
        return None
    rows_U = np.concatenate(rows)
    at_T = np.zeros(layout.n_tokens, np.int64)
    at_T[rows_U] = np.arange(done)
    plan = make_plan(segments, done, layout.n_tokens, device)
    rows, scored = (torch.from_numpy(x).to(device) for x in (rows_U, at_T[layout.rows_N]))
    return LastRows(rows, plan, scored)
