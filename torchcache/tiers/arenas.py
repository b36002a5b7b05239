"""An arena stores the rows of one layout in memory: in chunks of tensors ``[rows, …]``, one tensor for each leaf.

On the CPU it reserves one chunk for all rows that the limit allows, which uses no memory before rows are written. If
the system refuses or limits (``ulimit -v``) that much address space, and on other devices, it adds chunks as rows come.
"""

from __future__ import annotations

import contextlib
import mmap
import resource
from bisect import bisect_right
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchcache.tiers.layout import Layout, Leaf, movable, select

_CHUNK_BYTES = 64 << 20
_GROWTH = 8  # a chunk has at least 1/8 of the rows of all earlier ones: few chunks, little unused memory
_FOR_THE_PROGRAM = 8  # arenas leave 1/8 of a limited address space
_SHARE = 4  # a chunk takes at most 1/4 of what they may take of it
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it
_SMALL_BYTES = 16 << 20  # huge pages start at this offset of a leaf, because the last one is mostly unused

# Called with every new chunk: the slot of its first row, and its tensors.
AddChunk = Callable[[int, list[Tensor]], None]


class _Chunk(NamedTuple):
    first: int  # slot
    end: int  # slot behind the last one
    leaves: list[Tensor]


class _Span(NamedTuple):
    chunk: _Chunk
    start: int  # first row in the chunk
    rows: int
    done: int  # rows of earlier spans


class RowArena:
    """Rows of one layout on one device, numbered by slots. Rows are never removed.

    Args:
        layout: the layout of all rows.
        device: the device of the chunks.
        limit: the most bytes of rows that the arena may hold.
        add_chunk: registers every new chunk with native code; None: native code cannot use the chunks.

    Attributes:
        used: the number of used slots, which is the first free one.
        is_native: whether native code can write rows here.
    """

    def __init__(self, layout: Layout, device: torch.device, limit: int, add_chunk: AddChunk | None) -> None:
        self.layout = layout
        self.device = device
        self.is_native = add_chunk is not None and device.type == "cpu"
        self._capacity = 0  # in rows, as all below
        self._add_chunk = add_chunk
        self._chunks: list[_Chunk] = []
        self._registered = 0  # chunks that native code knows
        self.used = 0
        self.resize(limit)

    def resize(self, limit: int) -> None:
        """Sets how many more bytes of rows the arena may hold."""
        row_bytes = self.layout.row_bytes
        self._capacity = max(1, self.used + (max(0, limit) // row_bytes if row_bytes else 2**40))

    @property
    def _allocated(self) -> int:
        return self._chunks[-1].end if self._chunks else 0

    def append(self, leaves: list[Tensor], count: int) -> int:
        """Copies rows to the first free slots. If it raises, no slot is used.

        Returns:
            The first of these slots.
        """
        first = self.used
        while self._allocated < first + count:
            self._grow()
        self._register_chunks()
        for span in self._spans(first, count):
            for target, rows in zip(span.chunk.leaves, leaves):
                with torch.no_grad():
                    target[span.start : span.start + span.rows].copy_(rows[span.done : span.done + span.rows])
        self.used += count
        return first

    def gather(self, slots: Tensor) -> list[Tensor]:
        """The rows of these slots (int64 ``[N]``, on the CPU) as new leaves ``[N, …]`` on the device."""
        if len(self._chunks) == 1:
            slots = slots.to(self.device)
            return [select(stored, slots) for stored in self._chunks[0].leaves]
        outputs = [self._empty(leaf, slots.shape[0]) for leaf in self.layout.leaves]
        starts = torch.tensor([chunk.first for chunk in self._chunks], device="cpu")
        numbers = torch.bucketize(slots, starts, right=True) - 1
        for number in torch.unique(numbers).tolist():
            chunk = self._chunks[number]
            positions = (numbers == number).nonzero().squeeze(1)
            rows = (slots.index_select(0, positions) - chunk.first).to(self.device)
            positions = positions.to(self.device)
            for stored, out in zip(chunk.leaves, outputs):
                movable(out).index_copy_(0, positions, movable(select(stored, rows)))
        return outputs

    def _spans(self, first: int, count: int) -> Iterator[_Span]:
        """The parts of chunks that hold the slots first … first + count - 1."""
        done = 0
        number = bisect_right(self._chunks, first, key=attrgetter("first")) - 1
        while done < count:
            chunk = self._chunks[number]
            start = first + done
            span = _Span(chunk, start - chunk.first, min(count - done, chunk.end - start), done)
            yield span
            done += span.rows
            number += 1

    def _grow(self) -> None:
        """Adds a chunk, by one assignment: an interrupt must not leave half of one."""
        first = self._allocated
        left, at_most = max(1, self._capacity - first), self._room()
        rows, leaves = left, self._reserve() if self.device.type == "cpu" and left <= at_most else None
        if leaves is None:
            least = max(1, _CHUNK_BYTES // max(1, self.layout.row_bytes))
            rows = min(left, at_most, max(least, first // _GROWTH))
            leaves = [self._empty(leaf, rows) for leaf in self.layout.leaves]
        self._chunks.append(_Chunk(first, first + rows, leaves))

    def _room(self) -> int:
        """How many rows a new chunk may have, so that the program keeps room in a limited address space.

        Raises:
            MemoryError: there is none left.
        """
        spare = spare_address_space() if self.device.type == "cpu" else None
        if spare is None or not self.layout.row_bytes:
            return 2**62
        if spare // _SHARE < self.layout.row_bytes:
            raise MemoryError("most of the address space that the system allows this process (ulimit -v, -d) is used")
        return spare // _SHARE // self.layout.row_bytes

    def _register_chunks(self) -> None:
        """Registers new chunks with native code. After an interrupt it registers one again, which changes nothing."""
        while self._registered < len(self._chunks):
            chunk = self._chunks[self._registered]
            if self._add_chunk is not None:
                self._add_chunk(chunk.first, chunk.leaves)
            self._registered += 1

    def _reserve(self) -> list[Tensor] | None:
        """A chunk for all further rows; None if the system refuses the address space."""
        leaves = []
        for leaf in self.layout.leaves:
            stored = _reserve(leaf, max(1, self._capacity - self._allocated))
            if stored is None:
                return None
            leaves.append(stored)
        return leaves

    def _empty(self, leaf: Leaf, rows: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty((rows, *leaf.shape), dtype=leaf.stored, device=self.device)


def spare_address_space() -> int | None:
    """The bytes that arenas may still take where the system limits what this process maps; None: it does not."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if limits == [resource.RLIM_INFINITY] * 2:
        return None
    pages = Path("/proc/self/statm").read_text().split()  # proc(5): the first is all memory, the sixth data
    used = [int(pages[0]) * mmap.PAGESIZE, int(pages[5]) * mmap.PAGESIZE]
    limited = [(limit, size) for limit, size in zip(limits, used) if limit != resource.RLIM_INFINITY]
    return max(0, min(limit - limit // _FOR_THE_PROGRAM - size for limit, size in limited))


def _reserve(leaf: Leaf, capacity: int) -> Tensor | None:
    """Reserves address space for all rows of a leaf. The system adds memory when rows are written."""
    size = capacity * leaf.row_bytes
    if size == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        # Private, so that a forked child does not write into its parent. The tensor keeps the map alive.
        memory = mmap.mmap(-1, size, flags=flags)
        _use_huge_pages(memory)
        with torch.inference_mode(False):
            flat = torch.frombuffer(memory, dtype=leaf.stored)
    except (OSError, ValueError, OverflowError):
        return None
    return flat.view(capacity, *leaf.shape)


def _use_huge_pages(memory: mmap.mmap) -> None:
    """Reduces page faults while rows are written, and TLB misses while they are gathered."""
    if hasattr(mmap, "MADV_HUGEPAGE") and len(memory) > _SMALL_BYTES:
        with contextlib.suppress(OSError):  # the system has none
            memory.madvise(mmap.MADV_HUGEPAGE, _SMALL_BYTES)
