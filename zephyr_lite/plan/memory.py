"""The memory of one training, before it starts: where the peak of its heaviest micro-batch lies.

A step is walked through as the code goes, forward, head, backward, layer by layer, in a ledger of
bytes (`ledger.py`); no figure is fitted. What stands throughout is in `standing.py`, a layer in
`layers.py`, its products in `products.py`, its attention in `attention.py`. The optimizer's step
needs nothing beside what stands and the gradients, and is never the peak.

    forward     x of every layer, and all that a layer that keeps made
    head        gradient of the predicting rows, a chunk of logits
    backward    last layer first: what it kept is freed, what it lacks is computed again

Two figures are not walked: what CUDA takes before the first tensor, and what its allocator rounds
up and cannot use. They are constants below, not yet measured on a GPU.

On a CPU the figures are of fp32, in which a CPU computes: in bf16 it widens operands as it goes,
which is not counted. On a GPU attention is torch's flash attention; xformers' is not counted.
"""

from __future__ import annotations

from zephyr_lite.plan.attention import SHORT
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.layers import Layers, Rows
from zephyr_lite.plan.ledger import Frame, HostParts, Ledger, Parts
from zephyr_lite.plan.setting import Cut, Setting
from zephyr_lite.plan.standing import (
    FP32,
    INT64,
    adapter_bytes,
    embedding_bytes,
    gradient_bytes,
    master_bytes,
    optimizer_bytes,
    pinned_bytes,
    slot_bytes,
    stack_bytes,
    weight_bytes,
)
from zephyr_lite.plan.work import Work

# Not measured yet. CUDA's context with torch's and Triton's modules: 0.5 GB is what users of
# consumer cards see. cuBLAS' workspace: torch takes 32 MiB on Hopper, 8 before it, for each of two
# threads, for autograd runs a GPU's backward in one of its own.
CONTEXT_BYTES = 500 * 10**6 + 2 * 32 * 2**20
# Not measured yet; benchmarks/gpu/questions/fragmentation.py asks a GPU. Requests are rounded up to
# 512 bytes; what is left of a block that is taken again, up to 1 MiB, is not split off unless
# segments are expandable; and tensors of another micro-batch's sizes leave gaps in segments of
# 20 MiB.
SLACK_FRACTION, SLACK_BYTES = 0.03, 2 * 20 * 2**20
# kernels' linear_logprob.py: rows and vocabulary entries of a tile on a CPU. A test compares them.
TILE_ROWS, TILE_VOCAB = 1024, 1600


def peak(
    geometry: Geometry, setting: Setting, cut: Cut, work: Work, *, first: bool = False
) -> Parts:
    """Bytes on the device when most are taken in a step that has this micro-batch.

    Args: first: it is the first micro-batch of the step, and gradients come into being with its
        backward; else they stand from the beginning.
    """
    step = _Step(geometry, setting, cut, work, first)
    step.walk()
    held = step.ledger.at_most()
    names = ("weights", "embeddings", "adapters", "gradients", "optimizer")
    parts = {name: held.get(name, 0) for name in (*names, "activations", "workspace")}
    on_gpu = setting.device == "cuda"
    passing = parts["activations"] + parts["workspace"]
    return Parts(
        **parts,
        context=CONTEXT_BYTES if on_gpu else 0,
        slack=SLACK_BYTES + round(SLACK_FRACTION * passing) if on_gpu else 0,
        may_leave=step.may_leave,
    )


def host(geometry: Geometry, setting: Setting, cut: Cut, work: Work) -> HostParts:
    """Bytes of host memory that this cut takes in place of the device's: see `HostParts`."""
    pinned = ordinary = 0
    if cut.rest == "offload":
        waiting = max(0, geometry.layers - cut.keep)
        size = work.tokens * geometry.hidden * setting.element
        pinned += waiting * pinned_bytes(size, setting)
    if cut.place == "host":
        masters = master_bytes(geometry, setting)
        pinned, ordinary = pinned + masters.pinned, masters.ordinary
    return HostParts(pinned, ordinary)


class _Step:
    """One micro-batch of one step, in bytes. Shapes: as in `layers.py`, N scored rows."""

    def __init__(
        self, geometry: Geometry, setting: Setting, cut: Cut, work: Work, first: bool
    ) -> None:
        self.ledger, self.may_leave = Ledger(), 0
        self._geometry, self._setting, self._cut, self._work = geometry, setting, cut, work
        self._layers = Layers(self.ledger, geometry, setting, work)
        self._accumulates = not first or cut.place == "host"
        self._d = geometry.hidden * setting.element
        self._first_kept = geometry.layers - cut.keep
        self._leaving: int | None = None  # the layer whose input was put last, and is still there
        self._ahead = 0  # bytes of an input that is on its way back
        cuts = 0 < work.needed < work.tokens
        self._last_rows = Rows(work.tokens, work.needed if cuts else work.tokens)

    def walk(self) -> None:
        """From an empty device to the end of the backward."""
        self._stand()
        work, ledger = self._work, self.ledger
        ledger.take("activations", self._layout_bytes())
        width = self._geometry.head_width
        with ledger.frame() as frame:
            frame.pass_(FP32 * work.tokens * 4 * width)
        ledger.take("activations", FP32 * work.tokens * width)  # cos and sin, half a width each
        kept = self._forward()
        self._head()
        with ledger.frame() as frame:
            self._backward(frame, kept)

    def _stand(self) -> None:
        """What stands throughout the step."""
        g, s, on_host = self._geometry, self._setting, self._cut.place == "host"
        take = self.ledger.take
        take("weights", weight_bytes(g, s))
        take("embeddings", embedding_bytes(g, s))
        take("adapters", adapter_bytes(g, s, on_host=on_host))
        take("workspace", slot_bytes(g, s))
        if not on_host:
            states, self.may_leave = optimizer_bytes(g, s)
            take("optimizer", states)
        if self._accumulates:
            take("gradients", gradient_bytes(g, s, on_host=on_host))

    def _layout_bytes(self) -> int:
        """Indices, int64: ids and positions of tokens; the last layer's rows; targets, their rows,
        and these among the last layer's; in two plans five for each token of a short segment, or on
        a GPU the keys of the call and where each token's own stand among them."""
        w = self._work
        planned = 5 * sum(n for n in w.queries if n <= SHORT)
        if self._setting.device == "cuda":
            planned = w.keys + 2 * w.tokens
        return INT64 * (2 * w.tokens + self._last_rows.needed + 3 * w.scored + 2 * planned)

    def _rows(self, number: int) -> Rows:
        is_last = number == self._geometry.layers - 1
        return self._last_rows if is_last else Rows(self._work.tokens, self._work.tokens)

    def _forward(self) -> list[int]:
        """Embedding and layers; bytes that each layer kept beside its input."""
        ledger, kept = self.ledger, []
        ledger.take("activations", self._work.tokens * self._d)
        for number in range(self._geometry.layers):
            keeps = number >= self._first_kept
            stack = ledger.take("adapters", stack_bytes(self._geometry, self._setting))
            if not keeps and self._cut.rest == "offload":
                if self._leaving is not None:  # it has arrived in host memory
                    ledger.give("activations", self._work.tokens * self._d)
                self._leaving = number
            kept.append(self._layers.forward(number, self._rows(number), keeps=keeps))
            ledger.give("adapters", stack)
        return kept

    def _head(self) -> None:
        """Final norm, predicting rows, log-probs and the gradient of those rows."""
        ledger, work = self.ledger, self._work
        n, u = work.scored, self._last_rows.needed
        ledger.take("activations", FP32 * u)  # rstd; its input is the last layer's output
        with ledger.frame() as frame:
            frame.take(u * self._d)
            hidden = frame.take(n * self._d)
            frame.drop(u * self._d)
            ledger.take("activations", n * self._d + FP32 * n)  # gradient and log-probs
            frame.pass_(self._logits())
            frame.drop(hidden)

    def _logits(self) -> int:
        """A chunk's logits in fp32 and, in a narrower dtype, their excess; a tile on a CPU."""
        g, e, rows = self._geometry, self._setting.element, self._work.scored
        if self._setting.device == "cpu" and e == FP32:
            rows = min(rows, TILE_ROWS)
            return FP32 * rows * (min(TILE_VOCAB, g.vocabulary) + g.hidden)
        rows = min(rows, self._cut.head_rows)
        return rows * g.vocabulary * (FP32 + (e if e < FP32 else 0))

    def _backward(self, frame: Frame, kept: list[int]) -> None:
        """Of the head, the predicting rows, the norm and all layers."""
        ledger, work = self.ledger, self._work
        n, u = work.scored, self._last_rows.needed
        scaled = frame.take(n * self._d)
        ledger.give("activations", n * self._d)
        dy = frame.take(u * self._d)
        frame.drop(scaled)
        frame.take(u * self._d)  # the norm's backward writes over a copy
        frame.drop(dy)
        ledger.give("activations", u * (self._d + FP32))  # the norm's input, and rstd
        for number in reversed(range(self._geometry.layers)):
            dy = self._layer_backward(frame, number, kept[number], dy)

    def _layer_backward(self, frame: Frame, number: int, kept: int, dy: int) -> int:
        """One layer's backward; bytes of its dx, now in the frame in place of dy."""
        ledger, x = self.ledger, self._work.tokens * self._d
        if number < self._first_kept and self._cut.rest == "offload":
            self._get(number, x)
        rows = self._rows(number)
        stack = ledger.take("adapters", stack_bytes(self._geometry, self._setting))
        dx, grads = self._layers.backward(number, rows, kept, wants_dx=number > 0)
        ledger.give("adapters", stack)
        frame.take(dx + grads)
        frame.drop(dy)
        ledger.give("activations", x + kept)
        frame.drop(grads)
        if not self._accumulates:
            ledger.take("gradients", grads)
        return dx

    def _get(self, number: int, x: int) -> None:
        """`HostStore.get`: the input is here or was on its way; the one before it follows."""
        if number != self._leaving and not self._ahead:
            self.ledger.take("activations", x)
        self._ahead = self.ledger.take("activations", x) if number else 0
