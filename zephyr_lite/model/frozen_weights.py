"""The frozen matrix of a group of linears, in the dtype that its products are computed in.

Plain weights are laid below each other once, and the modules' parameters become views of that, so
that nothing is held twice and every other user of the modules sees what it saw. NF4 weights are
dequantised into a slot that the same group of every layer shares, and stay there until another
layer's come: what a layer computes again in its backward is not dequantised again for it. A CPU,
which has the room and not the bandwidth, keeps all that it dequantised, a slot for each group.

A slot may have a border, in which a layer lays the adapters of the group:

    [[W, B],        [X | S] [W | B]' = X W' + S B'
     [A, -]]        [dY | dS] [W ; A] = dY W + dS A

    exact      in the dtype that the layer computes in
    fp16acc    in fp16, whose sums are fp16 too; plain weights are cast into the slot as well
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from zephyr_kernels.nf4 import Nf4, dequantise

from zephyr_lite.errors import MachineError

Gemm = Literal["exact", "fp16acc"]


# Elements: Triton moves 16 bytes at a time where it sees that rows lie multiples of 16 apart.
ROW_STEP = 16


@dataclass(frozen=True)
class Bordered:
    """W [O, I], B [O, R] to its right and A [R, I] below it: views of one buffer."""

    w_OI: torch.Tensor
    b_OR: torch.Tensor
    a_RI: torch.Tensor


class Slot:
    """A buffer for the dense weights of one group at a time, which it remembers."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.holder: FrozenWeight | None = None
        self.ranks = 0

    def fill(self, frozen: FrozenWeight, dtype: torch.dtype, ranks: int = 0) -> Bordered:
        """The weights of `frozen` in `dtype`, dequantised unless they are what lies here, and a
        border for so many ranks, whose contents are the last caller's."""
        outputs, inputs = frozen.shape
        shape = (outputs + ranks, inputs + with_step(ranks))
        size = shape[0] * shape[1]
        buffer = self.buffer
        if buffer is None or buffer.numel() < size or buffer.dtype != dtype:
            buffer = self.buffer = self.holder = None  # freed before there is another
            buffer = self.buffer = torch.empty(size, dtype=dtype, device=frozen.device)
        matrix = buffer[:size].view(shape)
        w_OI = matrix[:outputs, :inputs]
        if self.holder is not frozen or self.ranks != ranks:
            self.holder = None  # of what lies here, should this run out of memory halfway
            frozen.dequantise(w_OI)
            self.holder, self.ranks = frozen, ranks
        b_OR = matrix[:outputs, inputs : inputs + ranks]
        return Bordered(w_OI, b_OR, matrix[outputs:, :inputs])


def with_step(ranks: int) -> int:
    """Columns that so many ranks take up behind a row."""
    return -(-ranks // ROW_STEP) * ROW_STEP


class FrozenWeight:
    """W [O, I] and bias [O] (or None) of linears that read the same input, below each other.

    slot: where a quantised base's weights are dequantised to on a GPU; its own by default.
    """

    def __init__(
        self, linears: Sequence[Any], dtype: torch.dtype, slot: Slot | None = None
    ) -> None:
        device = linears[0].weight.device
        widths = [int(x.out_features) for x in linears]
        self.shape = (sum(widths), int(linears[0].in_features))
        self.dtype, self.device = dtype, device
        self.slot = slot if slot is not None and device.type != "cpu" else Slot()
        self.bias_O = _join_biases(linears, widths, dtype)
        self.dense_OI: torch.Tensor | None = None
        self.packed: tuple[Nf4, ...] = ()
        self.is_shared = False
        if not isinstance(linears[0], Linear4bit):
            self.dense_OI = _join_weights(linears, widths, dtype)
            # Whether the linears' weights are views of W.
            self.is_shared = all(x.weight.dtype == dtype for x in linears)
        else:
            self.packed = tuple(_nf4(x.weight.detach(), x.weight.quant_state) for x in linears)

    def weight(self, gemm: Gemm = "exact") -> torch.Tensor:
        """W [O, I], to be read only; in a slot it holds until another group of it asks, or this
        one in another dtype."""
        dtype = torch.float16 if gemm == "fp16acc" else self.dtype
        if self.dense_OI is not None and self.dense_OI.dtype == dtype:
            return self.dense_OI
        return self.slot.fill(self, dtype).w_OI

    def bordered(self, ranks: int) -> Bordered | None:
        """W in `self.dtype` with a border, by the rule of `weight`; None where W is held as it
        came, for its memory is the model's own."""
        return None if self.dense_OI is not None else self.slot.fill(self, self.dtype, ranks)

    @property
    def kind(self) -> str:
        """What W is made of and what products read, for a person."""
        dtype = str(self.dtype).removeprefix("torch.")
        if self.packed:
            return f"nf4, dequantised to {dtype}"
        return f"{dtype}, joined in place" if self.is_shared else f"{dtype}, a copy"

    def give_back(self, linears: Sequence[Any]) -> None:
        """Give the linears memory of their own again; W stays as it is."""
        for x in linears if self.is_shared else ():
            x.weight.data = x.weight.detach().clone()

    def check_fp16(self) -> None:
        """Raise MachineError where a weight is beyond fp16, which no trained model's is."""
        largest = max((_bound(nf4) for nf4 in self.packed), default=0.0)
        if not self.packed and self.dense_OI is not None:
            largest = self.dense_OI.abs().max().item()
        if not largest <= torch.finfo(torch.float16).max:
            raise MachineError(
                f"gemm: fp16acc: a frozen weight of magnitude {largest:.3g} is beyond fp16",
                hint="set gemm=exact",
            )

    def dequantise(self, out_OI: torch.Tensor) -> torch.Tensor:
        """Straight to the dtype of `out_OI`. bitsandbytes' state names the dtype of the weights it
        was given; its own forward does not round to that either."""
        if not self.packed and self.dense_OI is not None:
            return out_OI.copy_(self.dense_OI)
        row = 0
        for nf4 in self.packed:
            dequantise(nf4, out_OI[row : row + nf4.shape[0]])
            row += nf4.shape[0]
        return out_OI


def _join_weights(linears: Sequence[Any], widths: list[int], dtype: torch.dtype) -> torch.Tensor:
    weight_OI = torch.cat([x.weight.detach() for x in linears]).to(dtype)
    if all(x.weight.dtype == dtype for x in linears):
        for x, rows in zip(linears, weight_OI.split(widths), strict=True):
            x.weight.data = rows
    return weight_OI


def _join_biases(
    linears: Sequence[Any], widths: list[int], dtype: torch.dtype
) -> torch.Tensor | None:
    if all(x.bias is None for x in linears):
        return None
    device = linears[0].weight.device
    parts = [
        torch.zeros(n, device=device) if x.bias is None else x.bias.detach()
        for x, n in zip(linears, widths, strict=True)
    ]
    return torch.cat([part.to(dtype) for part in parts])


def dequantised(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """An NF4 weight by bitsandbytes' packed codes and quant state, rounded once, to `dtype`."""
    nf4 = _nf4(packed, state)
    out_OI = torch.empty(nf4.shape, dtype=dtype, device=packed.device)
    dequantise(nf4, out_OI)
    return out_OI


def is_misread(linear: Linear4bit) -> bool:
    """Whether bitsandbytes' CPU code reads other numbers than it packed.

    Where rows are no multiple of its blocks of 64 but of 32, it takes the scale of a wrong block
    (seen in 0.50.2: an error of 0.22 where 4 bits cost 0.09). Its GPU code is right.
    """
    weight: Any = linear.weight
    if weight.device.type != "cpu" or linear.in_features % 64 == 0:
        return False
    packed, state = weight.detach(), weight.quant_state
    return not torch.equal(dequantize_4bit(packed, state), dequantised(packed, state, state.dtype))


def _bound(nf4: Nf4) -> float:
    """What no weight's magnitude exceeds: the largest level times the largest scale."""
    scale = nf4.absmax.max()
    if nf4.absmax_code is not None and nf4.absmax_scale is not None:
        scale = nf4.absmax_code.abs().max() * nf4.absmax_scale.abs().max() + nf4.absmax_offset
    return (nf4.levels.abs().max() * scale).item()


def _nf4(packed: torch.Tensor, state: Any) -> Nf4:
    """bitsandbytes' state of a weight in the kernel's terms."""
    outer = state.state2 if state.nested else None
    return Nf4(
        packed=packed.flatten(),
        absmax=state.absmax,
        absmax_code=None if outer is None else outer.code,
        absmax_scale=None if outer is None else outer.absmax,
        absmax_offset=0.0 if outer is None else float(state.offset),
        levels=state.code,
        shape=(int(state.shape[0]), int(state.shape[1])),
    )
