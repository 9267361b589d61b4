"""Bytes of the operations beside a product: LoRA, dropout, fp16 sums. What `projections.py` takes.

Each method is the function of that name in model/projections.py or zephyr_kernels, with bytes in
place of tensors. Results are returned as bytes, which the caller's frame takes; what only passes is
taken and given back inside.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from zephyr_lite.plan.groups import Group, Lora
from zephyr_lite.plan.ledger import Frame, Ledger
from zephyr_lite.plan.setting import Setting
from zephyr_lite.plan.standing import FP32

# Of zephyr_kernels, which only `model` imports; a test compares them.
RANK_TILE, RANKS_AT_MOST, A_CHUNK, PIECE_K, K_ALIGNMENT, MASKS = 256, 128, 512, 4096, 64, 3
FP16 = 2


@dataclass(frozen=True)
class Returned:
    """What came back to a group, bytes: dX, dS, and dB of all its adapters."""

    dx: int
    ds: int
    db: int


class Products:
    """Products with frozen weights and what LoRA does beside them."""

    def __init__(self, ledger: Ledger, setting: Setting) -> None:
        self._ledger, self._setting = ledger, setting
        self._element, self._is_cpu = setting.element, setting.device == "cpu"
        self._masks: OrderedDict[tuple[int, str], int] = OrderedDict()

    def product(self, frame: Frame, rows: int, inputs: int, outputs: int) -> int:
        """Y of one product; under fp16acc X in fp16, and a sum in fp16 for each piece of K."""
        y = rows * outputs * self._element
        if self._setting.gemm == "exact":
            return y
        pieces = _pieces(inputs)
        sums = pieces * rows * outputs * FP16
        is_in_place = pieces == 1 and self._element == FP16
        frame.pass_(rows * (inputs * FP16 + FP32) + sums + (0 if is_in_place else y))
        return y

    def shrink(self, frame: Frame, rows: int, group: Group, layer: int) -> int:
        """S = drop(X) A'. A CPU makes a mask for each adapter, and drop(X)."""
        s = rows * group.ranks * self._element
        if self._drops:
            frame.take(s)
            for lora in group.loras:
                dropped = self._mask(frame, rows, group.inputs, (layer, lora.name))
                frame.pass_(dropped + rows * lora.trained * FP32)
            frame.drop(s)
        return s

    def rank_gradients(
        self, rows: int, group: Group, queries: int | None = None, *, has_room: bool
    ) -> tuple[int, int]:
        """Bytes of dS, none where it has room elsewhere, and of dB.

        queries: rows of q's gradient where only those are needed.
        """
        ds = 0 if has_room else rows * group.ranks * self._element
        with self._ledger.frame() as local:
            local.take(ds)
            for lora in group.loras:
                some = rows if queries is None or lora.name != "q_proj" else queries
                copies = 0 if some == rows else some * (group.ranks + lora.ranks) * self._element
                one_read = self._one_read(some, lora)
                local.pass_(some * lora.ranks * self._element + copies + one_read)
                local.take(lora.trained * lora.outputs * FP32)
        return ds, sum(lora.trained * lora.outputs * FP32 for lora in group.loras)

    def input_gradient(self, frame: Frame, rows: int, group: Group, layer: int) -> None:
        """What dropout adds to dX on a CPU: dS A and a mask for each adapter, the one before not
        yet let go of."""
        if not (self._drops and self._is_cpu):
            return
        size = rows * group.inputs * FP32
        for number, lora in enumerate(group.loras):
            frame.take(size)
            frame.pass_(size if number else 0)
            frame.pass_(self._mask(frame, rows, group.inputs, (layer, lora.name)))
            frame.drop(size)

    def adapter_gradients(self, rows: int, group: Group, layer: int) -> int:
        """dA and dB with its scale: the gradients that are handed to autograd."""
        gradients = FP32 * sum(x.trained * (group.inputs + x.outputs) for x in group.loras)
        da = group.trained * group.inputs * FP32
        with self._ledger.frame() as local:
            if group.trained < group.ranks:
                local.take(rows * group.trained * self._element)
            if self._drops and not self._is_cpu:
                local.pass_(_blocks(rows, A_CHUNK) * da + da)
            local.take(da)
            for lora in group.loras if self._drops and self._is_cpu else ():
                dropped = self._mask(local, rows, group.inputs, (layer, lora.name))
                local.pass_(dropped + lora.trained * group.inputs * FP32)
            local.take(gradients - da)
        return gradients

    @property
    def _drops(self) -> bool:
        return self._setting.dropout and self._setting.trained > 0

    def _mask(self, frame: Frame, rows: int, width: int, key: tuple[int, str]) -> int:
        """A mask in fp32, of bools that the last few calls for one are remembered with.

        While it is drawn: two int32 for a pair of elements.
        """
        if not self._is_cpu:
            return 0
        elements = rows * width
        if key in self._masks:
            self._masks.move_to_end(key)
        else:
            frame.pass_(2 * 4 * _blocks(elements, 2))
            self._masks[key] = self._ledger.take("workspace", elements)
            if len(self._masks) > MASKS:
                self._ledger.give("workspace", self._masks.popitem(last=False)[1])
        return elements * FP32

    def _one_read(self, rows: int, lora: Lora) -> int:
        """Partial sums of dS and dB in fp32, where one read of dY makes both (kernels' lora.py)."""
        ranks = lora.ranks
        is_whole = lora.trained == ranks
        if self._is_cpu or self._element != FP16 or ranks > RANKS_AT_MOST or not is_whole:
            return 0
        strips, chunks = _blocks(lora.outputs, RANK_TILE), _blocks(rows, RANK_TILE)
        partial = strips * rows + chunks * lora.outputs
        if 8 * ranks * partial >= 2 * rows * lora.outputs:
            return 0
        return FP32 * ranks * (partial + rows)


def _pieces(width: int) -> int:
    """Pieces of K whose sums stay in fp16 (kernels' fp16acc.py)."""
    count = max(1, _blocks(width, PIECE_K))
    step = max(1, _blocks(width, count * K_ALIGNMENT)) * K_ALIGNMENT
    return _blocks(max(1, width), step)


def _blocks(n: int, block: int) -> int:
    return -(-n // block)
