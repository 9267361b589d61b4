"""A decoder layer's forward and backward in bytes: model/layer.py with sizes in place of tensors.

Functions bear the names of those they follow, and take and give back in their order, so that a
change there is made here in the same place. What a forward leaves for its backward goes under
`activations`; everything else passes as workspace.

Shapes: T tokens, U rows that are needed (T, but in the last layer), D hidden width, F feed-forward
width.
"""

from __future__ import annotations

from dataclasses import dataclass

from zephyr_lite.plan.attention import Attention
from zephyr_lite.plan.geometry import Geometry
from zephyr_lite.plan.groups import groups_of
from zephyr_lite.plan.ledger import Frame, Ledger
from zephyr_lite.plan.products import Products, Returned
from zephyr_lite.plan.setting import Setting
from zephyr_lite.plan.standing import FP32
from zephyr_lite.plan.work import Work


@dataclass(frozen=True)
class Rows:
    """Rows of one layer: T tokens, and U of them whose output is needed."""

    tokens: int
    needed: int

    @property
    def is_cut(self) -> bool:
        """Whether some rows are not needed."""
        return self.needed < self.tokens


@dataclass(frozen=True)
class Kept:
    """What `_attend_and_project` returns, bytes; the names are those of `layer._Kept`."""

    rstds: int
    qkv: int
    out: int
    lse: int
    mid: int
    gate_up: int
    shrunk: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum((self.rstds, self.qkv, self.out, self.lse, self.mid, self.gate_up, self.shrunk))


class Layers:
    """Layers of one geometry under one setting; what each call takes and gives is in the ledger."""

    def __init__(self, ledger: Ledger, geometry: Geometry, setting: Setting, work: Work) -> None:
        self._ledger, self._geometry, self._work = ledger, geometry, work
        self._element, self._is_cpu = setting.element, setting.device == "cpu"
        self._setting = setting
        self._products = Products(ledger, setting)
        self._attentions: dict[int, Attention] = {}
        self._groups = groups_of(geometry, setting)
        self._d = geometry.hidden * setting.element
        self._f = geometry.feed_forward * setting.element
        self._q = geometry.heads * geometry.head_width * setting.element
        self._head_q = self._q if geometry.head_norms else 0
        self._kv = 2 * geometry.kv_heads * geometry.head_width * setting.element

    def forward(self, number: int, rows: Rows, *, keeps: bool) -> int:
        """A layer's forward. Its output and what it keeps beside its input become activations.

        Returns: bytes of what it keeps.
        """
        with self._ledger.frame() as frame:
            kept = self._attend_and_project(number, rows)
            frame.take(kept.total)
            down = self._groups["down"]
            frame.take(rows.needed * (self._f + self._room("down")))  # h
            s_down = frame.take(self._products.shrink(frame, rows.needed, down, number))
            y = self._products.product(frame, rows.needed, down.inputs, down.outputs)
            frame.take(y)
        kept_bytes = kept.total + s_down if keeps else 0
        self._ledger.take("activations", kept_bytes + y)
        return kept_bytes

    def backward(self, number: int, rows: Rows, kept: int, *, wants_dx: bool) -> tuple[int, int]:
        """A layer's backward, with dy in the caller's frame.

        Args: kept: bytes that its forward kept; 0: it is computed again.
        Returns: bytes of dx, and of the adapters' gradients; the caller takes both at once.
        """
        gate_up = self._gate_up(rows)
        with self._ledger.frame() as frame:
            s_down = rows.needed * self._groups["down"].ranks * self._element if kept else 0
            if not kept:
                frame.take(self._attend_and_project(number, rows).total)
            dmid, grads = self._mlp_backward(number, rows, s_down)
            frame.take(dmid + grads)
            part = "activations" if kept else "workspace"  # gate, up and S are gone from here on
            self._ledger.give(part, gate_up)
            dx, more = self._attention_backward(number, rows, wants_dx)
            self._ledger.take(part, gate_up)
        return dx, grads + more

    def _kept(self, rows: Rows) -> Kept:
        """Sizes of what `_attend_and_project` returns."""
        attention = self._attention(rows)
        ranks = {name: group.ranks * self._element for name, group in self._groups.items()}
        return Kept(
            rstds=FP32 * (rows.tokens + rows.needed),
            qkv=rows.needed * self._q + rows.tokens * self._kv,
            out=attention.out,
            lse=attention.lse,
            mid=rows.needed * self._d,
            gate_up=self._gate_up(rows),
            shrunk=rows.tokens * ranks["qkv"] + rows.needed * ranks["o"],
        )

    def _gate_up(self, rows: Rows) -> int:
        """gate and up, and their S, in the room behind them if they have some."""
        group = self._groups["gate_up"]
        return rows.needed * (2 * self._f + (group.room or group.ranks) * self._element)

    def _attend_and_project(self, number: int, rows: Rows) -> Kept:
        """Everything up to gate and up; what it returns, which the caller takes."""
        kept, t, u = self._kept(rows), rows.tokens, rows.needed
        with self._ledger.frame() as local:
            local.take(t * (self._d + self._room("qkv")) + kept.rstds)  # n1 stays to the end
            self._project(local, number, "qkv", rows)
            self._turn(local, rows)
            local.take(self._head_copies(rows))
            local.pass_(self._head_rows(rows) + self._squares(u, self._head_q))
            self._attention(rows).forward(local)
            local.take(kept.out + kept.lse)
            self._project(local, number, "o", rows)
            # n2, and the residual's rows; room behind gate and up
            local.take(u * self._d * (2 if rows.is_cut else 1) + 2 * u * self._room("gate_up"))
            self._project(local, number, "gate_up", rows)
        return kept

    def _project(self, frame: Frame, number: int, name: str, rows: Rows) -> None:
        """`projections.forward`: S and Y, which stay in the frame."""
        group, count = self._groups[name], self._input_rows(name, rows)
        frame.take(self._products.shrink(frame, count, group, number))
        if name != "qkv" or not rows.is_cut:
            frame.take(self._products.product(frame, count, group.inputs, group.outputs))
            return
        q = self._q // self._element
        copies = frame.take(rows.needed * (self._d + group.ranks * self._element))
        frame.take(self._products.product(frame, rows.needed, group.inputs, q))
        frame.drop(copies)
        frame.take(self._products.product(frame, count, group.inputs, group.outputs - q))

    def _mlp_backward(self, number: int, rows: Rows, s_down: int) -> tuple[int, int]:
        """Bytes of d mid and of the gradients of gate's, up's and down's adapters."""
        u, products = rows.needed, self._products
        down, gate_up = self._groups["down"], self._groups["gate_up"]
        with self._ledger.frame() as local:
            if not s_down and down.loras:
                local.take(u * self._f)
                s_down = products.shrink(local, u, down, number)
                local.take(s_down)
                local.drop(u * self._f)
            found = self._returned(local, number, "down", rows)
            local.pass_(self._swiglu_backward(u))
            grads = local.take(products.adapter_gradients(u, down, number))
            local.drop(found.dx + found.ds + found.db)
            dmid = local.take(u * (self._d + self._room("o"))) if self._room("o") else 0
            returned = self._returned(local, number, "gate_up", rows, given=dmid)
            local.take(u * self._d)  # n2
            grads += local.take(products.adapter_gradients(u, gate_up, number))
            local.pass_(self._squares(u, self._d))
        return returned.dx, grads

    def _attention_backward(self, number: int, rows: Rows, wants_dx: bool) -> tuple[int, int]:
        """Bytes of dx and of the gradients of q's, k's, v's and o's adapters."""
        t, u, products = rows.tokens, rows.needed, self._products
        o, qkv = self._groups["o"], self._groups["qkv"]
        with self._ledger.frame() as local:
            self._returned(local, number, "o", rows)
            grads = local.take(products.adapter_gradients(u, o, number))
            room = 0 if rows.is_cut else t * self._room("qkv")
            local.take(u * self._q + t * self._kv + room)  # gradients of q, k and v
            local.take(self._head_copies(rows))
            local.pass_(self._head_rows(rows) + self._squares(u, self._head_q))
            self._attention(rows).backward(local)
            self._turn(local, rows)
            local.pass_(2 * self._head_rows(rows) + self._squares(rows.needed, self._head_q))
            returned = self._returned(local, number, "qkv", rows, wants_dx=wants_dx)
            local.take(t * self._d)  # n1
            grads += local.take(products.adapter_gradients(t, qkv, number))
            local.pass_(self._squares(t, self._d) if wants_dx else 0)
            local.pass_(u * self._d if rows.is_cut and wants_dx else 0)
        return returned.dx, grads

    def _returned(
        self,
        frame: Frame,
        number: int,
        name: str,
        rows: Rows,
        *,
        wants_dx: bool = True,
        given: int = 0,
    ) -> Returned:
        """`projections.backward`: dS, dB and dX, which stay in the frame.

        given: bytes of where dX goes, which the caller took; 0: a tensor of its own.
        """
        group, count, products = self._groups[name], self._input_rows(name, rows), self._products
        is_cut = name == "qkv" and rows.is_cut
        queries = rows.needed if is_cut else None
        ds = db = dx = 0
        if group.loras:
            # dy of down came from outside; all others' were made with room behind them.
            has_room = group.has_border and name != "down" and not is_cut
            ds, db = products.rank_gradients(count, group, queries, has_room=has_room)
            frame.take(ds + db)
        if wants_dx:
            q = self._q // self._element if is_cut else 0
            dx = given or frame.take(
                products.product(frame, count, group.outputs - q, group.inputs)
            )
            if is_cut:  # q's part, and the rows that it is added to
                frame.pass_(2 * products.product(frame, rows.needed, q, group.inputs))
            products.input_gradient(frame, count, group, number)
        return Returned(dx, ds, db)

    def _room(self, name: str) -> int:
        """Bytes behind a row of a group's operands."""
        return self._groups[name].room * self._element

    def _input_rows(self, name: str, rows: Rows) -> int:
        """Rows of a group's input: keys and values are of all tokens."""
        return rows.tokens if name == "qkv" else rows.needed

    def _attention(self, rows: Rows) -> Attention:
        if rows.needed not in self._attentions:
            made = Attention(self._geometry, self._setting, self._work, rows.needed)
            self._attentions[rows.needed] = made
        return self._attentions[rows.needed]

    def _head_copies(self, rows: Rows) -> int:
        """Normed copies of q and k and their rstd; none without norms of heads."""
        if not self._geometry.head_norms:
            return 0
        heads = rows.needed * self._geometry.heads + rows.tokens * self._geometry.kv_heads
        return heads * (self._geometry.head_width * self._element + FP32)

    def _squares(self, rows: int, width: int) -> int:
        """A CPU's norm, or its backward, writes the products whose mean it takes."""
        return rows * width if self._is_cpu else 0

    def _head_rows(self, rows: Rows) -> int:
        """q, a head a row: a copy where its norm reads or writes it among k and v."""
        is_copied = self._geometry.head_norms and not rows.is_cut
        return rows.needed * self._q if is_copied else 0

    def _turn(self, frame: Frame, rows: Rows) -> None:
        """A CPU turns half of q and k through a buffer of their size."""
        if self._is_cpu:
            frame.pass_((rows.needed * self._q + rows.tokens * self._kv // 2) // 2)

    def _swiglu_backward(self, count: int) -> int:
        """A CPU has silu(gate) and its product with dh beside what it writes over."""
        return 2 * count * self._f if self._is_cpu else 0
