"""Bytes of attention: what zephyr_kernels/attention.py takes beside its inputs and results.

A GPU has one variable-length call, whose keys are copied once per segment where a prompt is shared;
its backward takes fp32 sums of dQ and, where key heads are shared, dK and dV of every query head
(torch's mha_varlen_bwd). In fp32 a GPU has the definition alone, with all scores at once. A CPU
calls segment by segment; short ones share padded calls.

Shapes: U queries, E keys of the call, H and J heads, W width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.ledger import Frame
from zephyr_lite.plan.setting import Setting
from zephyr_lite.plan.standing import FP32
from zephyr_lite.plan.work import Work

# Of zephyr_kernels, which only `model` imports; a test compares them.
SHORT, LENGTH_STEP = 128, 8
FLASH_ROWS = 128  # torch's flash backward: rows between the segments of its sums


@dataclass(frozen=True)
class _Call:
    """One call of a CPU's attention, tokens: what it gathers, and its queries and keys."""

    gathered: int
    queries: int
    keys: int


class Attention:
    """Attention of one layer's queries, in bytes."""

    def __init__(self, geometry: Geometry, setting: Setting, work: Work, queries: int) -> None:
        self._work, self._queries = work, queries
        self._is_cpu = setting.device == "cpu"
        self._is_dense = setting.element == FP32  # flash attention computes no fp32
        self._is_cut = queries < work.tokens
        self._q = geometry.heads * geometry.head_width * setting.element
        self._kv = 2 * geometry.kv_heads * geometry.head_width * setting.element
        self._heads, self._shared = geometry.heads, geometry.heads // geometry.kv_heads
        block = 32 if geometry.head_width <= 128 else 64
        self._sum_width = -(-geometry.head_width // block) * block

    @property
    def out(self) -> int:
        """The output [U, H, W]."""
        return self._queries * self._q

    @property
    def lse(self) -> int:
        """The log-sum-exp [U, H], fp32."""
        return self._queries * self._heads * FP32

    def forward(self, frame: Frame) -> None:
        """What passes while `out` and `lse` are made, which the caller takes."""
        if not self._is_cpu:
            dense = self._dense(3) if self._is_dense else self._copies
            frame.pass_(dense + self.out + self.lse)
            return
        found = [
            (c.gathered * (self._q + self._kv), c.queries * (self._q + self._heads * FP32))
            for c in self._calls()
        ]
        frame.pass_(self.out + self.lse + _worst(found))

    def backward(self, frame: Frame) -> None:
        """What passes while gradients are made, which go where the caller has room for them."""
        if not self._is_cpu:
            frame.pass_(self._dense(5) if self._is_dense else self._copies + self._flash_backward)
            return
        found = [
            (c.gathered * (3 * self._q + self._kv), c.queries * self._q + c.keys * self._kv)
            for c in self._calls()
        ]
        frame.pass_(_worst(found))

    def _dense(self, copies: int) -> int:
        """Upper estimate of the definition: a mask, keys and values of every head in fp32, and so
        many copies of all heads' scores."""
        pairs = self._queries * self._work.tokens
        expanded = self._work.tokens * self._kv * self._shared
        return pairs * (1 + copies * self._heads * FP32) + 2 * expanded

    @property
    def _copies(self) -> int:
        """Keys and values in the order of the call, unless that is the row itself."""
        is_row = not any(self._work.contexts) and not self._is_cut
        return 0 if is_row else self._work.keys * self._kv

    @property
    def _flash_backward(self) -> int:
        """dQ, dK and dV; dQ's sums and the softmax's in fp32, the segments apart; and dK and dV of
        every query head where heads share theirs."""
        apart = self._queries + FLASH_ROWS * len(self._work.queries)
        sums = apart * self._heads * (self._sum_width + 1) * FP32
        expanded = self._work.keys * self._kv * self._shared if self._shared > 1 else 0
        return self.out + self._work.keys * self._kv + sums + expanded

    def _calls(self) -> Iterator[_Call]:
        """A CPU's calls, in their order: long segments, short ones by width, contexts."""
        scale = self._queries / self._work.tokens
        lengths = [max(1, round(n * scale)) for n in self._work.queries]
        widths: dict[int, list[int]] = {}
        for n in lengths:
            width = -(-n // LENGTH_STEP) * LENGTH_STEP
            widths.setdefault(width if width <= SHORT else -1, []).append(n)
        alone = widths.pop(-1, [])
        alone += [n for members in widths.values() if len(members) == 1 for n in members]
        yield from (_Call(0, n, n) for n in alone)
        for width, members in sorted(widths.items()):
            if len(members) > 1:
                yield _Call(*[width * len(members)] * 3)
        for n, whole, context in zip(lengths, self._work.queries, self._work.contexts, strict=True):
            if context:
                yield _Call(0, n, context)
            if n < whole:  # a layer that needs some queries alone: the keys before them
                yield _Call(0, n, whole - n)


def _worst(calls: list[tuple[int, int]]) -> int:
    """Bytes at the worst moment of calls that gather and give: a call's result is there before the
    one before it is let go of, and what was gathered is copied back through two more."""
    most, gathered_before, given_before = 0, 0, 0
    for gathered, given in calls:
        back = 2 * given if gathered else 0
        standing = gathered_before if gathered else 0
        most = max(most, standing + gathered + given_before + max(given, back))
        gathered_before, given_before = gathered, given
    return most
