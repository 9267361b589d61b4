"""Fitting: what a training does about memory before it runs out, and when it has.

    rehearsal   before the first step the longest micro-batch goes forward and backward beside all
                that a step holds, so that what cannot fit fails in the first minute
    a notch     where memory runs out all the same, the whole step is done again with less of it

A notch changes how the work is cut, never what is computed; see `PolicyLadder` for which there are.
Checkpoints keep how far down a training stands, and one that is resumed begins there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from zephyr_lite.errors import MachineError, is_out_of_memory
from zephyr_lite.model.native import NativeEngine
from zephyr_lite.model.policy import Policy
from zephyr_lite.train.masters import Masters
from zephyr_lite.train.objectives import Objective

FEWEST_HEAD_ROWS = 64
ROUNDED = "results are the same but for rounding"
# bitsandbytes: smaller tensors have fp32 states; states share a scale by blocks; smaller than this
# they are not paged.
LEAST_8BIT, BLOCK, LEAST_PAGED = 4096, 256, 100_000

Result = TypeVar("Result")


class Ladder(Protocol):
    """What can be given up for memory, step by step.

    levels: where the last notch of each kind led, for a checkpoint.
    """

    levels: dict[str, Any]

    def down(self) -> str | None:
        """Give up the next thing; what that was, in words, or None when there is none left."""
        ...

    def down_to(self, levels: dict[str, Any]) -> list[str]:
        """Stand no higher than another ladder's levels; what was given up for it, in words."""
        ...


@dataclass
class PolicyLadder:
    """The notches of a policy and its objective, the cheapest first.

    keep_layers    an eighth of the layers fewer keep what their backward wants    same bits
    checkpointing  inputs of the layers wait in host memory (on a GPU)             same bits
    head_rows      half as many rows of logits at once, to 64                      up to rounding
    tokens         half as large micro-batches, to the longest example             up to rounding,
                   and dropout is drawn anew, for it is drawn by micro-batch

    The first two are engine native's, the third a frozen head's.
    """

    policy: Policy
    objective: Objective
    levels: dict[str, Any] = field(default_factory=dict)

    def down(self) -> str | None:
        """See `Ladder.down`."""
        found = (notch(None) for notch in self._notches().values())
        return next((words for words in found if words is not None), None)

    def down_to(self, levels: dict[str, Any]) -> list[str]:
        """See `Ladder.down_to`."""
        found = [n(levels[name]) for name, n in self._notches().items() if name in levels]
        self.levels = levels | self.levels  # what stood lower already was not touched
        return [words for words in found if words is not None]

    def _notches(self) -> dict[str, Callable[[Any], str | None]]:
        """Each kind by its name; it goes down by one, or to the level that it is given."""
        return {
            "keep_layers": self._keep_layers,
            "checkpointing": self._offload,
            "head_rows": self._head_rows,
            "tokens": self._tokens,
        }

    def _keep_layers(self, level: int | None) -> str | None:
        engine = self.policy.engine
        if not isinstance(engine, NativeEngine):
            return None
        before, notch = engine.keep, max(1, len(engine.layers) // 8)
        after = max(0, before - notch) if level is None else min(before, level)
        if after == before:
            return None
        engine.keep = self.levels["keep_layers"] = after
        return f"fewer layers keep their activations ({before} -> {after})"

    def _offload(self, _: str | None) -> str | None:
        engine = self.policy.engine
        if not isinstance(engine, NativeEngine) or engine.rest != "lean":
            return None
        if self.policy.device.type == "cpu":  # whose memory is the host's
            return None
        engine.rest = self.levels["checkpointing"] = "offload"
        return "inputs of the layers wait in host memory (lean -> offload)"

    def _head_rows(self, level: int | None) -> str | None:
        before = self.policy.chunk_rows
        if before <= FEWEST_HEAD_ROWS or self.policy.head_VD.requires_grad:  # then it is not cut
            return None
        after = max(FEWEST_HEAD_ROWS, before // 2) if level is None else min(before, level)
        if after == before:
            return None
        self.policy.chunk_rows = self.levels["head_rows"] = after
        return f"fewer rows of logits at once ({before} -> {after}); {ROUNDED}"

    def _tokens(self, level: int | None) -> str | None:
        before, longest = self.objective.tokens_per_micro_batch, self.objective.longest
        if before <= longest:
            return None
        after = max(longest, before // 2) if level is None else min(before, level)
        if after == before:
            return None
        self.objective.tokens_per_micro_batch = self.levels["tokens"] = after
        return f"smaller micro-batches ({before} -> {after} tokens); {ROUNDED} and dropout's draw"


@dataclass
class Fitting:
    """Does the work of one training's steps, a notch lower where it does not fit.

    Made where no gradients wait to be applied. note: told what was given up. notches: that, in
    words, from first to last. Where something did not fit is said as in "at step 12".
    """

    label: str
    ladder: Ladder
    parameters: Sequence[torch.nn.Parameter]
    device: torch.device
    note: Callable[[str], None]
    notches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._between_steps = [p.grad for p in self.parameters]  # None, or a buffer of zeros

    def run(self, work: Callable[[], Result], where: str) -> Result:
        """What forwards and backwards give; all of them again after each notch.

        Raises: MachineError when they do not fit and nothing is left to give up.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = _first_line(error)
            # Outside of the block, for the error held every tensor of the frames it went through.
            self._clear()
            words = self.ladder.down()
            if words is None:
                raise MachineError(
                    f"{self.label}: out of memory {where}, and nothing is left to give up: "
                    f"{reason}",
                    hint="memory.tokens_per_micro_batch is at the longest example already: lower "
                    "max_length or lora.r, or choose an optimizer with smaller states "
                    "(adamw_8bit, or adamw under memory.optimizer=host)",
                )
            self.notches.append(words)
            self.note(f"{self.label}: out of memory {where}; {words}")

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps for `resume`: nothing where nothing was given up."""
        if not self.notches:
            return {}
        return {"notches": {"words": self.notches, "levels": self.ladder.levels}}

    def resume(self, meta: dict[str, Any]) -> None:
        """Stand as far down as a checkpoint's training did; say what was given up for it.

        Args: meta: of a checkpoint; those of earlier versions have no notches.
        """
        stored = meta.get("notches")
        if stored is None:
            return
        self.notches[:] = stored["words"]
        if found := self.ladder.down_to(stored["levels"]):
            words = "; ".join(found)
            self.note(f"{self.label}: resumed as it stood after memory had run out: {words}")

    def rehearse(self, work: Callable[[], object], states: int) -> None:
        """Do work as `run` does it, before there are optimizer states, and clear its gradients.

        Args: states: bytes of what the optimizer will hold.
        Raises: MachineError as `run`, and when the states alone do not fit.
        """
        devices = [] if self.device.type == "cpu" else [self.device]
        with torch.random.fork_rng(devices):
            with self.optimizer("before the first step"):
                held = torch.empty(states, dtype=torch.uint8, device=self.device)
            self.run(work, "in the rehearsal of the longest micro-batch")
            del held
        self._clear()

    def hold_gradients(self) -> None:
        """Gradients of zeros, as if an earlier micro-batch of the step had left some."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    @contextmanager
    def optimizer(self, where: str) -> Iterator[None]:
        """Work that is not done again: an update, of which a part may have been applied.

        Raises: MachineError when it does not fit.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MachineError(
                f"{self.label}: out of memory in the optimizer {where}: {_first_line(error)}",
                hint="set optimizer=adamw_8bit, or memory.optimizer=host under adamw, or lower "
                "lora.r; the last checkpoint is kept",
            ) from error

    def _clear(self) -> None:
        """Drop the gradients, and what is left of a forward and backward that went wrong."""
        for parameter, buffer in zip(self.parameters, self._between_steps, strict=True):
            parameter.grad = None if buffer is None else buffer.zero_()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def missing_states(optimizer: str, masters: Masters, device: torch.device) -> int:
    """Bytes on a device that the first update will add to what an optimizer holds there.

    Args: optimizer: as in the recipe.
    """
    existing = masters.optimizer.state
    return sum(
        _states(optimizer, master)
        for master in masters.tensors.values()
        if master.device.type == device.type and not existing.get(master)
    )


def _states(optimizer: str, master: torch.Tensor) -> int:
    """Bytes of both moments of one tensor; those that the system pages do not count."""
    count = master.numel()
    has_8bit = "8bit" in optimizer and count >= LEAST_8BIT
    moments = 2 * count if has_8bit else 8 * count
    scales = 8 * -(-count // BLOCK) if has_8bit else 0
    is_paged = optimizer.startswith("paged") and master.is_cuda and count >= LEAST_PAGED
    return scales if is_paged else moments + scales


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")[:200]
