"""The training loop: the only one in the project. Pre-training, dSFT and dDPO all pass here.

    order -> examples of a step -> micro-batches -> log-probs -> objective -> backward -> optimizer

The loop can be killed at any instant and started again: it goes on from the last checkpoint and
ends in the same bytes, because nothing in a step depends on anything but (seed, step) and state.
For the same reason a step that runs out of memory is done again; see train/fitting.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from zephyr_lite.data.layout import Order
from zephyr_lite.errors import DivergedError
from zephyr_lite.model.policy import Policy
from zephyr_lite.recipe import Training
from zephyr_lite.stopping import Stop
from zephyr_lite.train.checkpoint import Best, Checkpoints, Figures
from zephyr_lite.train.fitting import Fitting, PolicyLadder, missing_states
from zephyr_lite.train.masters import Masters, Place, make_masters
from zephyr_lite.train.metrics import MetricsLog, peak_memory_gib
from zephyr_lite.train.objectives import MicroBatch, Objective, Sums
from zephyr_lite.train.optimizer import learning_rate


class Listener(Protocol):
    """Who watches a training; `report.progress` draws it."""

    def start(self, label: str, total: int, done: int) -> None:
        """A piece of work of `total` steps begins at `done`."""
        ...

    def step(self, record: dict[str, Any]) -> None:
        """One more step is done; `record` has its metrics."""
        ...

    def note(self, text: str) -> None:
        """Something a person should know."""
        ...

    def end(self) -> None:
        """The piece of work is over."""
        ...


@dataclass
class Job:
    """One training: what is trained, on what, under which settings, and where it is kept.

    evaluate: figures on held-out rows, called during and after training.
    rank: what of those figures says which evaluation's weights are kept, more is better; None keeps
        the last step's.
    masters: where fp32 masters and optimizer states live.
    rehearses: whether the longest micro-batch is tried before the first step.
    notches: what was given up because memory ran out, in words, before a checkpoint that this goes
        on from too; see `fitting.PolicyLadder`.
    """

    label: str
    policy: Policy
    objective: Objective
    settings: Training
    folder: Path
    seed: int
    listener: Listener
    stop: Stop
    evaluate: Callable[[], Figures]
    rank: Callable[[Figures], tuple[float, ...]] | None = None
    masters: Place = "device"
    rehearses: bool = False
    notches: list[str] = field(default_factory=list, init=False)
    _seconds: float = field(default=0.0, init=False)

    def run(self) -> dict[str, Any]:
        """Train to the end, resuming where a checkpoint stands; figures of the weights kept.

        With `rank`, `step` says whose weights those are, and `last` has the last step's figures.
        """
        parameters = self.policy.trainable()
        masters = make_masters(self.settings, parameters, self.masters, self.policy.dtype)
        order = self._order()
        checkpoints, best = self.checkpoints(), Best(self.rank)
        state = (masters.tensors, masters.optimizer)
        meta = checkpoints.restore(*state, best) or {"step": 0, "seconds": 0.0}
        masters.publish()
        done: int = meta["step"]
        self._seconds = meta["seconds"]
        self._warn_about_threads(meta)
        fitting = self._fitting(parameters)
        fitting.resume(meta)
        if self.rehearses and done < order.total_steps:
            self._rehearse(order, masters, fitting)
        log = MetricsLog(self.folder / "metrics.jsonl", done)
        self.listener.start(self.label, order.total_steps, done)
        last_save = time.monotonic()
        try:
            with self.stop.deferred():
                for step in range(done, order.total_steps):
                    record = self._step(step, order, masters, fitting)
                    finished = step + 1
                    final = finished == order.total_steps
                    evaluated = self._every(self.settings.eval_every, finished) and not final
                    if evaluated:
                        held_out = self.evaluate()
                        best.offer(finished, held_out, masters.tensors)
                        record |= held_out
                    if self._every(self.settings.log_every, finished) or evaluated or final:
                        log.write(record)
                    self.listener.step(record)
                    due = time.monotonic() - last_save > 60 * self.settings.checkpoint_minutes
                    if (
                        due
                        or final
                        or self.stop.requested
                        or self._every(self.settings.checkpoint_every, finished)
                    ):
                        checkpoints.save(finished, *state, self._meta(fitting), best)
                        last_save = time.monotonic()
                    self.stop.check(f"{self.label} stopped after step {finished}; state is saved")
            masters.release()  # what is measured now is what is kept
            figures: dict[str, Any] = self.evaluate()
            log.write({"step": order.total_steps} | figures)
        finally:
            log.close()
            self.listener.end()
        if self.rank is not None:
            best.offer(order.total_steps, figures, parameters)
            best.put_back(parameters)
            figures = {**best.figures, "step": best.step, "last": figures}
        return figures | {"steps": order.total_steps, "seconds": round(self._seconds, 3)}

    def checkpoints(self) -> Checkpoints:
        """Where this training's checkpoints lie."""
        folder = self.folder / "checkpoints"
        return Checkpoints(folder, self.settings.checkpoint_keep, self.listener.note)

    def _fitting(self, parameters: dict[str, torch.nn.Parameter]) -> Fitting:
        ladder, values = PolicyLadder(self.policy, self.objective), list(parameters.values())
        note, device = self.listener.note, self.policy.device
        return Fitting(self.label, ladder, values, device, note, self.notches)

    def _order(self) -> Order:
        s = self.settings
        return Order(self.objective.n_examples, s.batch_size, s.epochs, self.seed, s.max_steps)

    def _rehearse(self, order: Order, masters: Masters, fitting: Fitting) -> None:
        """Forward and backward of the longest micro-batch; nothing of the training's state moves.

        Raises: MachineError when it does not fit.
        """

        def longest() -> None:
            micro = self.objective.heaviest(order)
            if len(micro.examples) < order.batch_size:  # others of its step came before
                fitting.hold_gradients()
            self._backward(micro, 1.0, (self.seed, 0, 0))

        states = missing_states(self.settings.optimizer, masters, self.policy.device)
        fitting.rehearse(longest, states)

    def _step(self, step: int, order: Order, masters: Masters, fitting: Fitting) -> dict[str, Any]:
        """One optimizer step; its metrics."""
        began = time.monotonic()
        examples, at = order.step(step), f"at step {step + 1}"
        micros, divisor, sums = fitting.run(lambda: self._gradients(step, examples), at)
        rate = learning_rate(self.settings, step, order.total_steps)
        with fitting.optimizer(at):
            limit = self.settings.max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(fitting.parameters, limit)
            self._refuse_nan(step, sums, micros, norm)
            masters.step(rate)
        seconds = time.monotonic() - began
        self._seconds += seconds
        tokens = sum(m.layout.n_tokens for m in micros)
        metrics = {k: sum(s[k].item() for s in sums) / divisor for k in sums[0]}
        record = {
            "step": step + 1,
            "epoch": round((step + 1) / order.steps_per_epoch, 4),
            **metrics,
            "learning_rate": rate,
            "grad_norm": norm.item(),
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_gib": round(peak_memory_gib(self.policy.device), 3),
        }
        if "rewards/margins" in metrics:
            record["pairs_per_second"] = round(len(examples) / seconds, 2)
        return record

    def _gradients(
        self, step: int, examples: list[int]
    ) -> tuple[list[MicroBatch], float, list[Sums]]:
        """Forwards and backwards of a step: its micro-batches, its divisor, sums of each."""
        micros, divisor = self.objective.step(examples)
        sums = [self._backward(m, divisor, (self.seed, step, i)) for i, m in enumerate(micros)]
        return micros, divisor, sums

    def _backward(self, micro: MicroBatch, divisor: float, position: tuple[int, int, int]) -> Sums:
        """Forward and backward of one micro-batch, dropout seeded by its position."""
        torch.manual_seed(_mix(*position))
        logp_N = self.policy.log_probs(micro.layout, training=True)
        loss, sums = self.objective.loss(logp_N, micro)
        (loss / divisor).backward()
        return sums

    def _refuse_nan(
        self, step: int, sums: list[Sums], micros: list[MicroBatch], norm: torch.Tensor
    ) -> None:
        """Raise before a non-finite loss or gradient reaches the weights; name the rows."""
        losses = torch.stack([s["loss"] for s in sums])
        if torch.isfinite(losses).all() and torch.isfinite(norm):
            return
        bad = [m for m, loss in zip(micros, losses.tolist(), strict=True) if not np.isfinite(loss)]
        rows = [name for m in bad or micros for name in self.objective.names(m.examples)]
        what = "loss" if bad else "gradient"
        raise DivergedError(
            f"{self.label}: the {what} is not finite at step {step + 1}; "
            f"rows: {', '.join(rows[:16])}"
            + (f" and {len(rows) - 16} more" if len(rows) > 16 else ""),
            hint="look at these rows, or lower the learning rate; no update was applied and the "
            "last checkpoint is kept",
        )

    def _meta(self, fitting: Fitting) -> dict[str, Any]:
        threads = torch.get_num_threads()
        return {"seconds": self._seconds, "threads": threads, **fitting.state()}

    def _warn_about_threads(self, meta: dict[str, Any]) -> None:
        threads = meta.get("threads")
        if threads not in (None, torch.get_num_threads()):
            self.listener.note(
                f"{self.label}: resumed with {torch.get_num_threads()} threads after {threads}: "
                "not bit-exact from here"
            )

    @staticmethod
    def _every(interval: int | None, step: int) -> bool:
        return interval is not None and step % interval == 0


def _mix(seed: int, step: int, micro: int) -> int:
    """A 63-bit seed from a position; SeedSequence is stable across numpy versions."""
    state = np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
