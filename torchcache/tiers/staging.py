"""Rows on their way from a GPU to the host: the training step does not wait for them.

They are copied to pinned memory on a second stream. The chain of tiers drains this queue before it looks at a tier, so
rows are written late and never missed, in the order in which they were enqueued.
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

Write = Callable[[list[Tensor]], None]

_MAX_QUEUED_BYTES = 256 << 20  # that may be on their way; more would be pinned for no use


class HostCopy:
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


def enqueue(leaves: list[Tensor], writes: list[Write]) -> None:
    """Calls each of `writes` with copies of the leaves on the host, later, in whatever thread drains the queue."""
    try:
        copy = HostCopy(leaves)
    except RuntimeError:  # no memory to be had on the device, or none to be pinned
        on_host = [t.cpu() for t in leaves]
        for write in writes:
            write(on_host)
        return
    with _lock:
        queue.append((copy, writes))
        is_full = sum(copy.bytes for copy, _ in queue) > _MAX_QUEUED_BYTES
    _drain_at_exit()
    if is_full:
        drain()


def drain() -> None:
    """Returns when everything that was enqueued has arrived and is written."""
    if not queue:
        return
    with _lock:
        while queue:
            copy, writes = queue[0]
            try:
                on_host = copy.wait()
                for write in writes:
                    write(on_host)
            finally:
                queue.popleft()  # not before: another thread would look for the rows too early


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _drain_at_exit() -> None:
    """Before the stores are closed: what is registered last runs first."""
    atexit.unregister(drain)
    atexit.register(drain)
    if multiprocessing.parent_process() is not None:  # such children leave without atexit
        _finalize_child()


@functools.cache
def _finalize_child() -> None:
    multiprocessing.util.Finalize(None, drain, exitpriority=20)


def _forget_queue() -> None:
    """In a forked child: its parent sees to them, and a GPU is out of reach here."""
    global _lock
    _lock = threading.RLock()
    queue.clear()


_lock = threading.RLock()
queue: deque[tuple[HostCopy, list[Write]]] = deque()  # the oldest first
os.register_at_fork(after_in_child=_forget_queue)
