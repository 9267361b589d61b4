"""Attention over a layout, by torch's scaled_dot_product_attention.

Segments of similar length are gathered into a padded batch (a *bucket*) and go through one call.
Padding is harmless: a query never sees a key behind it, and padded queries are not read back.
The same function serves packed documents, shared prompts and any mixture of them.

Shapes: T tokens, B segments of a bucket, Q and K their padded queries and keys, H query heads,
J key/value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from zephyr_lite.data.layout import Layout

# Lengths are rounded up to a multiple of 8, above 128 to one of 8 steps per octave (12.5 %).
SHORTEST_STEP, STEPS_PER_OCTAVE = 8, 8


@dataclass(frozen=True)
class Bucket:
    """Segments that go through one call.

    mask_B1QK is None where the plain causal mask is right: no context, as many keys as queries. It
    is added to the scores (0 or -inf): of a mask of booleans every layer would make, and keep for
    its backward, a copy of that form.
    """

    query_rows_BQ: torch.Tensor
    key_rows_BK: torch.Tensor
    mask_B1QK: torch.Tensor | None


@dataclass(frozen=True)
class DeviceLayout:
    """A layout's tensors on the device, its attention planned once for all layers."""

    ids_T: torch.Tensor
    positions_T: torch.Tensor
    rows_N: torch.Tensor
    targets_N: torch.Tensor
    buckets: tuple[Bucket, ...]
    output_row_T: torch.Tensor  # where token t's output stands among all buckets' queries


def to_device(
    layout: Layout, device: torch.device, dtype: torch.dtype = torch.float32
) -> DeviceLayout:
    """Move a layout to the device and plan its attention for queries of `dtype`."""
    buckets, output_row_T = _plan(layout, device, dtype)
    fields = ("ids_T", "positions_T", "rows_N", "targets_N")
    tensors = {name: torch.from_numpy(getattr(layout, name)).to(device) for name in fields}
    return DeviceLayout(**tensors, buckets=buckets, output_row_T=output_row_T)


def attention(
    q_THD: torch.Tensor,
    k_TJD: torch.Tensor,
    v_TJD: torch.Tensor,
    layout: DeviceLayout,
    scale: float,
) -> torch.Tensor:
    """Attention of every token to what its segment lets it see.

    Args:
        q_THD, k_TJD, v_TJD: rotated queries and keys, and values; H a multiple of J.
        scale: factor on the scores, 1 / sqrt(D) as a rule.
    Returns: [T, H, D] in the dtype of q.
    """
    heads = q_THD.shape[1]
    outputs = []
    for bucket in layout.buckets:
        mask = bucket.mask_B1QK
        k_BJKD = k_TJD[bucket.key_rows_BK].transpose(1, 2)
        v_BJKD = v_TJD[bucket.key_rows_BK].transpose(1, 2)
        groups = heads // k_BJKD.shape[1]
        # On a GPU only repeated heads reach a fast kernel when there is a mask; a CPU's own kernel
        # reads each key head once for its group, and keeps no repeated copy for the backward.
        if grouped := q_THD.device.type == "cpu":
            groups = 1
        out_BHQD = scaled_dot_product_attention(
            q_THD[bucket.query_rows_BQ].transpose(1, 2),
            k_BJKD.repeat_interleave(groups, 1) if groups > 1 else k_BJKD,
            v_BJKD.repeat_interleave(groups, 1) if groups > 1 else v_BJKD,
            attn_mask=None if mask is None else mask.to(q_THD.dtype),
            is_causal=mask is None,
            scale=scale,
            enable_gqa=grouped,
        )
        outputs.append(out_BHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[layout.output_row_T]


def _plan(
    layout: Layout, device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Bucket, ...], torch.Tensor]:
    """Group segments by padded length; note where each token's output will stand."""
    groups: dict[tuple[int, int], list[int]] = {}
    for s, (q_len, c_len) in enumerate(zip(layout.q_len_S, layout.c_len_S, strict=True)):
        # A segment without context has exactly its queries as keys.
        keys = _round_up(int(q_len + c_len)) if c_len else 0
        groups.setdefault((_round_up(int(q_len)), keys), []).append(s)
    output_row_T = np.zeros(layout.n_tokens, np.int64)
    buckets, done = [], 0
    for (width, keys), members in sorted(groups.items()):
        segments = np.array(members)
        q_start, q_len = layout.q_start_S[segments, None], layout.q_len_S[segments, None]
        c_start, c_len = layout.c_start_S[segments, None], layout.c_len_S[segments, None]
        slot_Q, slot_K = np.arange(width)[None], np.arange(keys or width)[None]
        query_rows = q_start + np.minimum(slot_Q, q_len - 1)
        own = q_start + np.minimum(slot_K - c_len, q_len - 1)
        key_rows = np.where(slot_K < c_len, c_start + slot_K, own)
        real = slot_Q < q_len
        output_row_T[query_rows[real]] = (done + np.arange(real.size)).reshape(real.shape)[real]
        mask = None
        if keys:  # bottom right: query i sees the context and its own tokens up to i
            seen = slot_K[:, None, :] <= c_len[:, :, None] + slot_Q[:, :, None]
            hidden = torch.from_numpy(~seen[:, None]).to(device)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
            mask.masked_fill_(hidden, float("-inf"))
        queries_BQ, keys_BK = (torch.from_numpy(x).to(device) for x in (query_rows, key_rows))
        buckets.append(Bucket(queries_BQ, keys_BK, mask))
        done += real.size
    return tuple(buckets), torch.from_numpy(output_row_T).to(device)


def _round_up(length: int) -> int:
    step = max(SHORTEST_STEP, (1 << (length.bit_length() - 1)) // STEPS_PER_OCTAVE)
    return -(-length // step) * step
