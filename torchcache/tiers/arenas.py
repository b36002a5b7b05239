"""Where the rows of one layout lie in memory: chunks of tensors ``[rows, …]``, one tensor for each leaf.

On the CPU one chunk is reserved for all rows that the limit allows, and costs nothing until it is touched. Where the
system refuses that much address space, and on other devices, chunks are added as rows come.
"""

from __future__ import annotations

import contextlib
import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from torchcache.tiers.layout import Layout, Leaf, movable, select

_CHUNK_BYTES = 64 << 20
_GROWTH = 8  # a chunk is at least an eighth of all before it: few chunks, little of the last one unused
_MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it
_SMALL_BYTES = 16 << 20  # of a leaf: only behind those pages may be huge, of which the last is hardly ever full

# Told of every new chunk: the slot of its first row, and its tensors.
AddChunk = Callable[[int, list[Tensor]], None]


class RowArena:
    """Rows of one layout on one device, numbered by slots. Rows are only ever added.

    Args:
        layout: of the rows.
        device: where they lie.
        limit: bytes of rows that the arena may get.
        add_chunk: is told of every new chunk; None: nobody is.

    Attributes:
        used: the first slot that no row has.
        is_native: whether native code can write rows here.
    """

    def __init__(self, layout: Layout, device: torch.device, limit: int, add_chunk: AddChunk | None) -> None:
        self.layout = layout
        self.device = device
        self.is_native = add_chunk is not None and device.type == "cpu"
        self._capacity = max(1, limit // layout.row_bytes if layout.row_bytes else 2**40)  # in rows, as all below
        self._add_chunk = add_chunk
        self._chunks: list[list[Tensor]] = []
        self._starts: list[int] = []
        self._allocated = 0
        self.used = 0

    def append(self, leaves: list[Tensor], count: int) -> int:
        """Copies rows to the slots behind the last row; gives the first of these. Where it raises, no slot is used."""
        first = self.used
        while self._allocated < first + count:
            self._grow()
        for chunk, at, done, here in self._spans(first, count):
            for kept, rows in zip(chunk, leaves):
                with torch.no_grad():
                    kept[at : at + here].copy_(rows[done : done + here])
        self.used += count
        return first

    def gather(self, slots: Tensor) -> list[Tensor]:
        """Rows of these slots (int64 ``[N]``, on the CPU) as fresh leaves ``[N, …]`` on the device."""
        if len(self._chunks) == 1:
            there = slots.to(self.device)
            return [select(kept, there) for kept in self._chunks[0]]
        outputs = [self._empty(leaf, slots.shape[0]) for leaf in self.layout.leaves]
        starts = torch.tensor(self._starts, device="cpu")
        number = torch.bucketize(slots, starts, right=True) - 1
        for chunk in torch.unique(number).tolist():
            where = (number == chunk).nonzero().squeeze(1)
            rows = (slots.index_select(0, where) - self._starts[chunk]).to(self.device)
            where = where.to(self.device)
            for kept, out in zip(self._chunks[chunk], outputs):
                movable(out).index_copy_(0, where, movable(select(kept, rows)))
        return outputs

    def _spans(self, first: int, count: int) -> Iterator[tuple[list[Tensor], int, int, int]]:
        """(chunk, row in it, rows done before, rows) that hold the slots first … first + count - 1."""
        done = 0
        while done < count:
            number = bisect_right(self._starts, first + done) - 1
            at = first + done - self._starts[number]
            end = self._starts[number + 1] if number + 1 < len(self._starts) else self._allocated
            here = min(count - done, end - self._starts[number] - at)
            yield self._chunks[number], at, done, here
            done += here

    def _grow(self) -> None:
        rows, chunk = self._capacity, self._reserve() if not self._chunks and self.device.type == "cpu" else None
        if chunk is None:
            least = max(1, _CHUNK_BYTES // max(1, self.layout.row_bytes))
            rows = max(1, min(self._capacity - self._allocated, max(least, self._allocated // _GROWTH)))
            chunk = [self._empty(leaf, rows) for leaf in self.layout.leaves]
        if self._add_chunk is not None:
            self._add_chunk(self._allocated, chunk)
        self._chunks.append(chunk)
        self._starts.append(self._allocated)
        self._allocated += rows

    def _reserve(self) -> list[Tensor] | None:
        """Address space for all rows; None where that is refused."""
        leaves = []
        for leaf in self.layout.leaves:
            kept = _reserve(leaf, self._capacity)
            if kept is None:
                return None
            leaves.append(kept)
        return leaves

    def _empty(self, leaf: Leaf, rows: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.empty((rows, *leaf.shape), dtype=leaf.stored, device=self.device)


def _reserve(leaf: Leaf, capacity: int) -> Tensor | None:
    """Address space for all rows of a leaf, without memory behind it until it is touched."""
    size = capacity * leaf.row_bytes
    if size == 0 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return None
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        # Private: a forked child must not write into its parent. Never closed: the tensor keeps it alive.
        memory = mmap.mmap(-1, size, flags=flags)
        _use_huge_pages(memory)
        with torch.inference_mode(False):
            flat = torch.frombuffer(memory, dtype=leaf.stored)
    except (OSError, ValueError, OverflowError):
        return None
    return flat.view(capacity, *leaf.shape)


def _use_huge_pages(memory: mmap.mmap) -> None:
    """Fewer page faults while rows come, and fewer misses of the address cache while they are gathered."""
    if hasattr(mmap, "MADV_HUGEPAGE") and len(memory) > _SMALL_BYTES:
        with contextlib.suppress(OSError):  # a system without them
            memory.madvise(mmap.MADV_HUGEPAGE, _SMALL_BYTES)
