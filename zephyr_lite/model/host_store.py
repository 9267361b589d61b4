"""Layers' inputs in host memory: they leave in the forward and come back one layer ahead.

A forward puts them in order, its backward gets them in reverse. The copies run on a stream of their
own, from and to pinned memory, beside the layer that computes meanwhile:

    forward     copy 0 out | copy 1 out | ...          backward    copy i - 1 back |
                layer 0    | layer 1    | ...                      layer i         | layer i - 1

What is copied out stays on the device until the next layer begins, so that no more than two inputs
are there; what comes back is one layer's. Off a GPU the same happens without streams.
"""

from __future__ import annotations

import weakref

import torch


class HostStore:
    """The tensors of one forward. One owner: the forward that puts, and its graph that gets."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._last: weakref.ref[Held] | None = None
        self._leaving: _Leaving | None = None
        self._ahead: _Fetch | None = None

    def put(self, x: torch.Tensor) -> Held:
        """Copy x out. It must not be written to before the next `put` or `get`."""
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if x.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        # Without its history: x belongs to the graph that holds this store.
        held, x = Held(self, host, x.device, self._last), x.detach()
        self._arrive()
        self._leaving = _Leaving(weakref.ref(held), x, _copy(host, x, self._stream))
        self._last = weakref.ref(held)
        return held

    def get(self, held: Held) -> torch.Tensor:
        """The tensor on its device again; the one put before it follows on its own."""
        leaving, ahead, self._ahead = self._leaving, self._ahead, None
        self._arrive()
        if leaving is not None and leaving.held() is held:
            x = leaving.x  # the last one is still there
        else:
            is_here = ahead is not None and ahead.held() is held
            x = (ahead if is_here and ahead is not None else self._fetch(held)).wait()
        before = held.before() if held.before is not None else None
        self._ahead = None if before is None else self._fetch(before)
        return x

    def _arrive(self) -> None:
        """Let go of what was leaving, once the computing stream has waited for its copy.

        Whoever takes its memory then is behind the copy in that stream.
        """
        if self._leaving is not None and self._leaving.done is not None:
            torch.cuda.current_stream(self._leaving.x.device).wait_event(self._leaving.done)
        self._leaving = None

    def _fetch(self, held: Held) -> _Fetch:
        # Memory of the computing stream, whose earlier work on it the copy waits for.
        x = torch.empty(held.host.shape, dtype=held.host.dtype, device=held.device)
        return _Fetch(weakref.ref(held), x, _copy(x, held.host, self._stream), self._stream)


class Held:
    """One tensor in host memory, as long as somebody holds this."""

    def __init__(
        self,
        store: HostStore,
        host: torch.Tensor,
        device: torch.device,
        before: weakref.ref[Held] | None,
    ) -> None:
        self.store, self.host, self.device, self.before = store, host, device, before

    def get(self) -> torch.Tensor:
        """See `HostStore.get`."""
        return self.store.get(self)


class _Leaving:
    """What is being copied out, and when that is done (None: it is)."""

    def __init__(
        self, held: weakref.ref[Held], x: torch.Tensor, done: torch.cuda.Event | None
    ) -> None:
        self.held, self.x, self.done = held, x, done


class _Fetch:
    """What is being copied back."""

    def __init__(
        self,
        held: weakref.ref[Held],
        x: torch.Tensor,
        done: torch.cuda.Event | None,
        stream: torch.cuda.Stream | None,
    ) -> None:
        self.held, self.x, self.done, self.stream = held, x, done, stream

    def wait(self) -> torch.Tensor:
        """The tensor, for the stream that computes now."""
        if self.done is not None:
            torch.cuda.current_stream(self.x.device).wait_event(self.done)
            self.done = None
        return self.x

    def __del__(self) -> None:
        # Nobody waited: the memory must not be given away while the copy writes into it.
        if self.done is not None and self.stream is not None:
            self.x.record_stream(self.stream)


def _copy(
    to: torch.Tensor, source: torch.Tensor, stream: torch.cuda.Stream | None
) -> torch.cuda.Event | None:
    """Copy on the stream, behind what the computing stream was given so far."""
    if stream is None:
        to.copy_(source)
        return None
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        to.copy_(source, non_blocking=True)
    done = torch.cuda.Event()
    done.record(stream)
    return done
