"""Copies rows from a GPU to the host without delaying the training step.

A second stream copies them to pinned memory. The chain of tiers drains this queue before it uses a tier, so rows are
written late, in the order in which they were enqueued, and are never missed.
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

_MAX_QUEUED_BYTES = 256 << 20  # limits pinned memory


class HostCopy:
    """Copies leaves to pinned memory, as they are now: later edits of the leaves have no effect."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self._events: list[torch.cuda.Event] = []
        self._leaves = [self._start(t) if t.is_cuda else t for t in leaves]
        self.bytes = sum(t.nbytes for t in self._leaves)

    def wait(self) -> list[Tensor]:
        """The copies, when they are complete."""
        for event in self._events:
            event.synchronize()
        return self._leaves

    def _start(self, t: Tensor) -> Tensor:
        clone = t.clone(memory_format=torch.contiguous_format)  # because the caller may edit the rows afterwards
        host = torch.empty(clone.shape, dtype=clone.dtype, device="cpu", pin_memory=True)
        stream = _stream(t.device)
        stream.wait_stream(torch.cuda.current_stream(t.device))
        with torch.cuda.stream(stream):
            host.copy_(clone, non_blocking=True)
            self._events.append(stream.record_event())
        clone.record_stream(stream)
        return host


def is_needed(leaves: list[Tensor]) -> bool:
    """Whether rows must be copied from a GPU."""
    return any(t.is_cuda for t in leaves)


def enqueue(leaves: list[Tensor], writes: list[Write]) -> None:
    """Has the thread that drains the queue call each of `writes` with copies of the leaves on the host."""
    try:
        copy = HostCopy(leaves)
    except RuntimeError:  # out of memory on the device, or of memory that can be pinned
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
    """Waits until all enqueued rows are copied and written."""
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
                queue.popleft()  # not earlier: another thread would not wait for the rows


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _drain_at_exit() -> None:
    """Drains before the stores are closed: atexit runs the last registered function first."""
    atexit.unregister(drain)
    atexit.register(drain)
    if multiprocessing.parent_process() is not None:  # such a child exits without atexit
        _finalize_child()


@functools.cache
def _finalize_child() -> None:
    multiprocessing.util.Finalize(None, drain, exitpriority=20)


def _reset_in_child() -> None:
    """Empties the queue of a forked child: its parent writes the rows, and a child cannot use the GPU."""
    global _lock
    _lock = threading.RLock()
    queue.clear()


_lock = threading.RLock()
queue: deque[tuple[HostCopy, list[Write]]] = deque()  # the oldest first
os.register_at_fork(after_in_child=_reset_in_child)
