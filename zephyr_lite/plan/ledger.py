"""A ledger of bytes: a step is walked through as the code goes, with sizes in place of tensors.

What is taken stands under a part until it is given back; what stands when most does is the plan.
A frame is a function's locals: at its end it gives back all that was taken in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

Part = Literal[
    "weights", "embeddings", "adapters", "gradients", "optimizer", "activations", "workspace"
]


@dataclass(frozen=True)
class Parts:
    """Bytes on the device when most are taken.

    weights: frozen linears, quantised or not; on a CPU also what was dequantised of them.
    embeddings: embedding, head, norms and biases. adapters: masters, or copies where masters are
    elsewhere, and what a forward made of them in the compute dtype. gradients: of what trains.
    optimizer: its states; `may_leave` of them are in managed memory, which leaves the device when
    there is no room. activations: kept for the backward. workspace: everything that passes, a GPU's
    dense weights and the logits included. context: what CUDA takes before the first tensor. slack:
    what the allocator rounds up or cannot use.
    """

    weights: int
    embeddings: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    context: int = 0
    slack: int = 0
    may_leave: int = 0

    @property
    def live(self) -> int:
        """Bytes of tensors alone."""
        return self.total - self.context - self.slack

    @property
    def total(self) -> int:
        """All bytes; `may_leave` is in it, under `optimizer`."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "may_leave")


@dataclass(frozen=True)
class HostParts:
    """Bytes of host memory that a cut takes there in place of the device.

    pinned: what is transferred: masters, gradients and copies under `place: host`, layers' inputs
    under `rest: offload`. ordinary: optimizer states. On a CPU nothing is pinned, and both are
    taken beside `Parts`, of the same memory.
    """

    pinned: int
    ordinary: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.pinned + self.ordinary


class Ledger:
    """Bytes by part, now and when most were taken."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._held: dict[Part, int] = {}
        self._when_most: dict[Part, int] = {}

    def take(self, part: Part, size: int) -> int:
        """Take bytes until they are given back; returns them."""
        self._held[part] = self._held.get(part, 0) + size
        self.now += size
        if self.now > self.most:
            self.most, self._when_most = self.now, dict(self._held)
        return size

    def give(self, part: Part, size: int) -> None:
        """Give back bytes that were taken."""
        self._held[part] -= size
        self.now -= size

    @contextmanager
    def frame(self) -> Iterator[Frame]:
        """A block whose workspace is given back at its end."""
        frame = Frame(self)
        try:
            yield frame
        finally:
            frame.drop(frame.size)

    def at_most(self) -> dict[Part, int]:
        """Bytes by part when most were taken."""
        return self._when_most


class Frame:
    """Workspace of one function."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger, self.size = ledger, 0

    def take(self, size: int) -> int:
        """Take workspace until the frame's end; returns its bytes."""
        self.size += size
        if size:
            self._ledger.take("workspace", size)
        return size

    def drop(self, size: int) -> None:
        """Give some of it back before."""
        self.size -= size
        if size:
            self._ledger.give("workspace", size)

    def pass_(self, size: int) -> None:
        """Take workspace and give it back at once."""
        self.take(size)
        self.drop(size)
