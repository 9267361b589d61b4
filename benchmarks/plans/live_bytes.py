"""The peak of live tensor bytes: what a step's tensors take, whatever an allocator makes of it.

Under a dispatch mode every operation's arguments and results pass by, also those inside autograd
functions and of the backward, which a CPU runs in the same thread. A storage is counted once, from
when one of its tensors is first seen until the storage dies: views add nothing, nor does what is
written in place or to `out`. A kernel's own scratch, allocated below the dispatcher, is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts while it is entered; `now` and `peak` in bytes.

    Args: existing: tensors that were there before, of which no operation may ever be seen.
    """

    def __init__(self, existing: Iterator[torch.Tensor] | list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in existing:
            self._see(tensor)

    def reset(self) -> None:
        """Look for a new peak from here on."""
        self.peak = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, then count what it took and gave."""
        result = func(*args, **(kwargs or {}))
        self._see_all((result, args, kwargs))
        return result

    def _see_all(self, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._see(value)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self._see_all(item)
        elif isinstance(value, dict):
            self._see_all(list(value.values()))

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        known = self._sizes.get(key)
        if known is None:
            # A storage's Python object lives as long as the storage itself.
            weakref.finalize(storage, self._forget, key).atexit = False
        self._sizes[key] = size
        self.now += size - (known or 0)
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def tensors_in(*roots: Any) -> list[torch.Tensor]:
    """Every tensor that can be reached from these objects by attributes and containers."""
    found, seen, waiting = [], set(), list(roots)
    while waiting:
        x = waiting.pop()
        if id(x) in seen or isinstance(x, (str, bytes, int, float, type, torch.dtype)):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            found.append(x)
            waiting += [x.grad] if x.is_leaf and x.grad is not None else []
        if isinstance(x, dict):
            waiting += [*x.keys(), *x.values()]
        elif isinstance(x, (list, tuple, set, frozenset)):
            waiting += x
        waiting += vars(x).values() if hasattr(x, "__dict__") and not _is_code(x) else []
    return found


def _is_code(x: Any) -> bool:
    """Whether x is a function or a Python module: what hangs on those is nobody's memory here."""
    return isinstance(x, type(weakref)) or type(x).__name__ in ("function", "method")
