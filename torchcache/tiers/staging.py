"""Rows on their way from a GPU to the host: the training step does not wait for them.

They are copied to pinned memory on a stream beside the caller's, and kept when somebody next looks: whatever reads a
tier lets them arrive first (`land`), in the order in which they were sent.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import multiprocessing.util
import os
import threading
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

Keep = Callable[[list[Tensor]], None]

_MOST_BYTES = 256 << 20  # that may be on their way; more would be pinned for no use


class Copy:
    """Copies of leaves in pinned memory, which are there when `wait` returns. Later edits of the leaves do no harm."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._events: list[torch.cuda.Event] = []
        self._leaves = [self._start(t) if t.is_cuda else t for t in leaves]
        self.bytes = sum(t.nbytes for t in self._leaves)

    def wait(self) -> list[Tensor]:
        for event in self._events:
            event.synchronize()
        return self._leaves

    def _start(self, t: Tensor) -> Tensor:
        own = t.clone(memory_format=torch.contiguous_format)  # at once: the caller may edit the rows in the next moment
        host = torch.empty(own.shape, dtype=own.dtype, device="cpu", pin_memory=True)
        stream = _stream(t.device)
        stream.wait_stream(torch.cuda.current_stream(t.device))
        with torch.cuda.stream(stream):
            host.copy_(own, non_blocking=True)
            self._events.append(stream.record_event())
        own.record_stream(stream)
        return host


def is_needed(leaves: list[Tensor]) -> bool:
    return any(t.is_cuda for t in leaves)


def send(leaves: list[Tensor], keepers: list[Keep]) -> None:
    """Has each of the `keepers` called with copies of the leaves on the host, later, in whatever thread lands them."""
    try:
        copy = Copy(leaves)
    except RuntimeError:  # no memory to be had on the device, or none to be pinned
        on_host = [t.cpu() for t in leaves]
        for keep in keepers:
            keep(on_host)
        return
    with _lock:
        _on_their_way.append((copy, keepers))
        much = sum(copy.bytes for copy, _ in _on_their_way) > _MOST_BYTES
    _land_at_exit()
    if much:
        land()


def land() -> None:
    """Returns when everything that was sent has arrived and is kept."""
    if not _on_their_way:
        return
    with _lock:
        while _on_their_way:
            copy, keepers = _on_their_way[0]
            try:
                on_host = copy.wait()
                for keep in keepers:
                    keep(on_host)
            finally:
                _on_their_way.popleft()  # not before: another thread would look for the rows too early


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _land_at_exit() -> None:
    """Before the stores are closed: what is registered last runs first."""
    atexit.unregister(land)
    atexit.register(land)
    if multiprocessing.parent_process() is not None:  # such children leave without atexit
        _finalize_child()


@functools.cache
def _finalize_child() -> None:
    multiprocessing.util.Finalize(None, land, exitpriority=20)


def _forget() -> None:
    """In a forked child: its parent sees to them, and a GPU is out of reach here."""
    global _lock
    _lock = threading.RLock()
    _on_their_way.clear()


_lock = threading.RLock()
_on_their_way: deque[tuple[Copy, list[Keep]]] = deque()  # the oldest first
os.register_at_fork(after_in_child=_forget)
