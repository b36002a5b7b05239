"""The memory tier: an arena for each layout, and a native table from keys to slots. A hit is one gather per leaf."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchcache._native import ops
from torchcache._native.ops import Digest
from torchcache._utils.locks import lock
from torchcache._utils.logs import WarnOnce
from torchcache.tiers.arenas import AddChunk, RowArena
from torchcache.tiers.layout import Layout, select
from torchcache.tiers.tier import Rows, TierStats

NONE, MIXED = -1, -2  # instead of the number of a layout: there are no rows, or rows of several layouts

_FULL = (
    "the memory cache is full and stores no new rows: they are computed again or, with persistent=True, read from "
    "disk; raise max_memory_cache_size to store more"
)


class MemoryTier:
    """Rows in memory. When it is full, old rows stay and new rows are not stored.

    Args:
        device: the device of the rows.
        limit: the limit for rows, in bytes.
        warnings: logs faults, each once.

    Attributes:
        limit: the limit; `resize` changes it.
    """

    name = "memory"
    is_described = True

    def __init__(self, device: str, limit: int, warnings: WarnOnce | None = None) -> None:
        self.device = torch.device(device)
        self.is_on_host = self.device.type == "cpu"
        self.limit = limit
        self._warnings = WarnOnce("memory cache") if warnings is None else warnings
        self._lock = lock(self)
        self._contents = _Contents()

    @property
    def bytes(self) -> int:
        """The size of the rows."""
        return self._contents.bytes

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._contents.rows

    @property
    def full(self) -> bool:
        """Whether a row was not stored for lack of space."""
        return self._contents.full

    def resize(self, limit: int) -> None:
        """Sets the limit, in bytes. Rows that are there stay."""
        with self._lock:
            self.limit = limit
            contents = self._contents
            contents.full = False
            for arena in contents.arenas:
                arena.resize(limit - contents.bytes)

    # ---- as a tier

    def lookup(self, keys: Tensor) -> Tensor:
        """Which of these rows are in memory: bool ``[B]``."""
        return self.lookup_batch(keys).slots >= 0

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        """See `Tier.read`. Memory of the host is never pinned."""
        return self.lookup_batch(keys).restricted(layout).rows()

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Copies new rows into the arenas, as far as they fit."""
        try:
            self._write(keys, layout, leaves)
        except (RuntimeError, MemoryError) as error:
            self._contents.full = True
            self._warnings.warn("memory", "rows cannot be stored in memory: %s", error)
        if self.full and self.limit:
            self._warnings.warn("memory full", _FULL)

    def describe(self, meta: Mapping[str, Any]) -> None:
        """Does nothing: rows in memory need no metadata."""

    def stats(self) -> TierStats:
        """Rows and bytes in memory."""
        return TierStats(rows=self.rows, bytes=self.bytes, full=self.full)

    def flush(self) -> None:
        """Does nothing: rows in memory do not survive the process."""

    def clear(self) -> None:
        """Removes all rows."""
        with self._lock:
            self._contents.synchronize()
            self._contents = _Contents()

    def close(self) -> None:
        """Does nothing: the rows are freed with their last reader, such as a `CachedRows`."""

    # ---- whole batches

    def hash_and_read(self, rows: list[Tensor], call_digest: Digest, watch: int = 0) -> tuple[Rows | MemoryLookup, int]:
        """Computes the keys of a call's rows and reads the rows, by one native operation: see `Chain.hash_and_read`.

        Returns:
            All rows if they are in memory and of one layout, else the result of the lookup; and that of the probe.
        """
        contents = self._contents
        if contents.written:
            contents.wait_for_writes()
        whole, tensors, number, probe = ops.table_hash_and_read(contents.table.id, rows, call_digest, watch)
        if whole:
            return Rows(None, contents.arenas[number].layout, tensors), probe
        keys, slots, missing = tensors
        lookup = MemoryLookup(contents, keys, slots, missing, number)
        if number >= 0 and not missing.numel():  # in an arena that native code cannot read
            return Rows(None, contents.arenas[number].layout, lookup.gather(slots)), probe
        return lookup, probe

    def read_whole(self, keys: Tensor) -> Rows | None:
        """The rows of these keys if one native operation can read them: all are in memory and have one layout."""
        contents = self._contents
        contents.wait_for_writes()
        leaves, number = contents.table.read(keys)
        return Rows(None, contents.arenas[number].layout, leaves) if leaves else None

    def lookup_batch(self, keys: Tensor) -> MemoryLookup:
        """Looks up keys (int64 ``[B, 2]``) without reading rows."""
        contents = self._contents
        contents.wait_for_writes()
        return MemoryLookup(contents, keys, *contents.table.lookup(keys))

    def find(self, low: int) -> Rows | None:
        """A copy of the row whose key has this low half (int64); None if there is none."""
        contents = self._contents
        contents.wait_for_writes()
        number, slot = contents.table.find(low)
        if number < 0:
            return None
        arena = contents.arenas[number]
        return Rows(None, arena.layout, arena.gather(torch.tensor([slot], device="cpu")))

    def low_keys(self) -> list[int]:
        """The low halves of all keys, as int64."""
        return self._contents.table.low_keys()

    # ---- writing

    def _write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Copies the rows that are new, as far as they fit."""
        with self._lock:
            contents = self._contents
            left = self.limit - contents.bytes
            room = left // layout.row_bytes if layout.row_bytes else keys.shape[0]
            if room > 0:
                device = self.device if self.is_on_host else self._device_for(leaves)
                number = contents.number(layout, device, left)
                written, new = contents.write(keys, number, leaves, room)
            else:
                written, new = 0, contents.table.lookup(keys)[1].shape[0]
            contents.full |= written < new
            contents.bytes += written * layout.row_bytes
            contents.rows += written

    def _device_for(self, leaves: list[Tensor]) -> torch.device:
        """The device of a new arena. For "cuda" without a number, it is the GPU of the first rows."""
        if self.device.type != "cuda" or self.device.index is not None:
            return self.device
        return leaves[0].device if leaves[0].is_cuda else torch.device("cuda", torch.cuda.current_device())


class _Contents:
    """The table and the arenas between two clears, in one object so that no reader can mix old and new ones."""

    def __init__(self) -> None:
        self.bytes = 0  # of the rows
        self.rows = 0
        self.full = False  # a row was not stored for lack of space
        self.table = _Table()
        self.arenas: list[RowArena] = []  # indexed by the number of their layout
        self._numbers: dict[Layout, int] = {}
        self.written: list[tuple[torch.device, torch.cuda.Event]] = []  # on GPUs, perhaps unfinished

    def write(self, keys: Tensor, number: int, leaves: list[Tensor], max_rows: int) -> tuple[int, int]:
        """Copies at most `max_rows` of the rows that are new.

        Returns:
            How many rows were copied, and how many are new.
        """
        arena = self.arenas[number]
        if arena.is_native:
            first = arena.used
            # In advance: if this is interrupted anywhere, a slot that lookups can return must not be used again.
            arena.used += min(keys.shape[0], max_rows)
            written, new = self.table.write(keys, number, first, leaves, max_rows)
            arena.used = first + max(0, written)
            if written >= 0:
                return written, new
        _, rows, _ = self.table.lookup(keys)
        new = rows.shape[0]
        rows = rows[:max_rows]
        if rows.shape[0] == 0:
            return 0, new
        if rows.shape[0] < keys.shape[0]:
            keys, leaves = keys.index_select(0, rows), [select(t, rows.to(t.device)) for t in leaves]
        first = arena.append(leaves, keys.shape[0])
        self._note_write(arena.device)
        self.table.insert(keys, number, first)
        return keys.shape[0], new

    def _note_write(self, device: torch.device) -> None:
        """Records an event after rows were copied to an arena and before lookups can return them."""
        if device.type == "cuda":
            self.written = [*self._unfinished(), (device, torch.cuda.current_stream(device).record_event())]

    def wait_for_writes(self) -> None:
        """Makes the current streams wait for writes of other streams."""
        if self.written:
            self.written = self._unfinished()
            for device, event in self.written:
                torch.cuda.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Waits for all streams that may still read the arenas, before these are freed."""
        for device in {arena.device for arena in self.arenas if arena.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def _unfinished(self) -> list[tuple[torch.device, torch.cuda.Event]]:
        return [(device, event) for device, event in self.written if not event.query()]  # type: ignore[no-untyped-call]

    def number(self, layout: Layout, device: torch.device, limit: int) -> int:
        """The number of a layout. A new layout gets an arena."""
        number = self._numbers.get(layout)
        if number is None:
            number = len(self.arenas)
            self.arenas.append(RowArena(layout, device, limit, self._native_chunks(layout, number, device)))
            self._numbers[layout] = number  # last: wherever this is interrupted, a number has its arena
        return number

    def _native_chunks(self, layout: Layout, number: int, device: torch.device) -> AddChunk | None:
        """Registers new chunks with the native table, which then reads and writes them; None: it cannot."""
        foreign = any(leaf.stored in ops.FOREIGN_DTYPES for leaf in layout.leaves)
        if foreign or device.type not in ("cpu", "cuda"):
            return None
        return functools.partial(self.table.add_chunk, number)


class MemoryLookup:
    """The result of a lookup of B keys.

    Attributes:
        keys: int64 ``[B, 2]``.
        slots: int64 ``[B]``: the slot of each row; -1 - j: it is the j-th distinct row that is missing.
        missing: int64 ``[M]``: the first position in the batch of each distinct missing row.
    """

    __slots__ = ("_contents", "_number", "keys", "missing", "slots")

    def __init__(self, contents: _Contents, keys: Tensor, slots: Tensor, missing: Tensor, number: int) -> None:
        self.keys = keys
        self.slots = slots
        self.missing = missing
        self._contents = contents
        self._number = number

    @property
    def is_mixed(self) -> bool:
        """Whether rows have several layouts, so that they cannot be one output."""
        return self._number == MIXED

    @property
    def layout(self) -> Layout | None:
        """The layout of all rows in memory; None if there are no rows, or several layouts."""
        return self._contents.arenas[self._number].layout if self._number >= 0 else None

    def gather(self, slots: Tensor) -> list[Tensor]:
        """The rows of these slots (int64, on the CPU) as new leaves, on the device of the tier."""
        return self._contents.arenas[self._number].gather(slots)

    def rows(self) -> Rows | None:
        """The rows that are in memory; None if there are none."""
        positions = (self.slots >= 0).nonzero().squeeze(1)
        count = positions.shape[0]
        if self.layout is None or count == 0:
            return None
        whole = count == self.keys.shape[0]
        return Rows(None if whole else positions, self.layout, self.gather(self.slots.index_select(0, positions)))

    def restricted(self, layout: Layout | None) -> MemoryLookup:
        """The same lookup, where rows of other layouts count as missing.

        Args:
            layout: the only layout that counts; None: that of the first row.
        """
        if not self.is_mixed and (layout is None or self.layout in (None, layout)):
            return self
        # Several layouts are rare, so each key is looked up separately.
        lookups = [self._contents.table.lookup(key) for key in self.keys.unsqueeze(1).unbind(0)]
        number = next((n for _, _, n in lookups if n >= 0 and layout in (None, self._contents.arenas[n].layout)), NONE)
        slots: list[int] = []
        missing: list[int] = []
        numbers: dict[tuple[int, ...], int] = {}
        for position, ((slot, _, row_number), key) in enumerate(zip(lookups, self.keys.tolist())):
            if row_number == number >= 0:
                slots.append(int(slot))
                continue
            if tuple(key) not in numbers:
                numbers[tuple(key)] = len(missing)
                missing.append(position)
            slots.append(-1 - numbers[tuple(key)])
        as_tensor = functools.partial(torch.tensor, dtype=torch.int64, device="cpu")
        return MemoryLookup(self._contents, self.keys, as_tensor(slots), as_tensor(missing), number)


class _Table:
    """A native key table, which is closed when this object is deleted."""

    def __init__(self) -> None:
        self.id = ops.table_open()
        weakref.finalize(self, ops.table_close, self.id).atexit = False

    def lookup(self, keys: Tensor) -> tuple[Tensor, Tensor, int]:
        return ops.table_lookup(self.id, keys)

    def read(self, keys: Tensor) -> tuple[list[Tensor], int]:
        return ops.table_read(self.id, keys)

    def write(self, keys: Tensor, layout: int, first: int, leaves: list[Tensor], max_rows: int) -> tuple[int, int]:
        return ops.table_write(self.id, keys.contiguous(), layout, first, leaves, max_rows)

    def add_chunk(self, layout: int, first: int, chunk: list[Tensor]) -> None:
        ops.table_add_chunk(self.id, layout, first, chunk)

    def insert(self, keys: Tensor, layout: int, first: int) -> None:
        ops.table_insert(self.id, keys.contiguous(), layout, first)

    def find(self, low: int) -> tuple[int, int]:
        return ops.table_find(self.id, low)

    def low_keys(self) -> list[int]:
        return ops.table_low_keys(self.id).tolist()


class RowView(Mapping[int, Any]):
    """A read-only view of the rows in memory: low half of the key (int64) → a copy of the output ``[1, …]``."""

    def __init__(self, memory: MemoryTier) -> None:
        self._memory = memory

    def __len__(self) -> int:
        return self._memory.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._memory.low_keys())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and -(2**63) <= key < 2**63 and self._memory.find(key) is not None

    def __getitem__(self, key: int) -> Any:
        row = self._memory.find(key) if isinstance(key, int) and -(2**63) <= key < 2**63 else None
        if row is None:
            raise KeyError(key)
        return row.layout.join(row.layout.restore(row.leaves, self._memory.device))
