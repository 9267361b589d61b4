"""Linears of a layer that read the same input, with their adapters: what model/projections.py sees.

Shapes: R ranks of all adapters of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

from zephyr_lite.plan.geometry import GROUPS, Geometry
from zephyr_lite.plan.setting import Setting

# Of model/projections.py and model/frozen_weights.py, which `plan` does not import; a test compares
# them: zero columns that a product may have, and elements that rows of a border are multiples of.
MOST_WASTED, ROW_STEP = 256, 16


@dataclass(frozen=True)
class Lora:
    """Adapters of one projection: its place among the group's, outputs, ranks that train or not."""

    name: str
    outputs: int
    trained: int
    frozen: int

    @property
    def ranks(self) -> int:
        """All of its ranks."""
        return self.trained + self.frozen


@dataclass(frozen=True)
class Group:
    """A group's stacked matrix [outputs, inputs] and its adapters.

    is_slotted: dense weights are written into a slot, which may have a border for the adapters.
    """

    name: str
    outputs: int
    inputs: int
    loras: tuple[Lora, ...]
    is_slotted: bool

    @property
    def ranks(self) -> int:
        """Rows of the stacked A."""
        return sum(lora.ranks for lora in self.loras)

    @property
    def trained(self) -> int:
        """Of those the ones that train."""
        return sum(lora.trained for lora in self.loras)

    @property
    def has_border(self) -> bool:
        """Whether the adapters lie around the dense weights."""
        used = sum(lora.outputs * lora.ranks for lora in self.loras) / self.outputs
        return self.is_slotted and 0 < self.ranks <= used + MOST_WASTED

    @property
    def room(self) -> int:
        """Columns behind the rows of a product's operands."""
        return -(-self.ranks // ROW_STEP) * ROW_STEP if self.has_border else 0

    @property
    def dense(self) -> int:
        """Numbers of the dense weights, a border included."""
        rows = self.outputs + (self.ranks if self.has_border else 0)
        return rows * (self.inputs + self.room)

    @property
    def stack(self) -> int:
        """Numbers of A and B where they lie apart from the weights."""
        if self.has_border:
            return 0
        return sum(lora.ranks * (self.inputs + lora.outputs) for lora in self.loras)


def groups_of(geometry: Geometry, setting: Setting) -> dict[str, Group]:
    """The four groups of a layer."""
    found, is_slotted = {}, setting.quantization == "nf4" and setting.gemm == "exact"
    for name, linears in GROUPS.items():
        loras = tuple(
            Lora(linear, geometry.linears[linear][0], setting.trained, setting.frozen)
            for linear in linears
            if linear in setting.targets
        )
        found[name] = Group(name, *geometry.group(name), loras, is_slotted)
    return found
