"""The memory tier: an arena for each layout, and a native table from keys to slots. A hit is one gather a leaf."""

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

NONE, MIXED = -1, -2  # instead of the number of a layout: nothing was found, rows of several were

_FULL = "the memory cache is full: new rows are computed but not kept; raise max_memory_cache_size to keep more"


class MemoryTier:
    """Rows in memory, up to `limit` bytes of rows. When it is full, new rows are not kept and old ones stay."""

    name = "memory"
    is_described = True

    def __init__(self, device: str, limit: int, warnings: WarnOnce | None = None) -> None:
        self.device = torch.device(device)
        self.is_on_host = self.device.type == "cpu"
        self.limit = limit
        self._warnings = WarnOnce("memory cache") if warnings is None else warnings
        self._lock = lock(self)
        self._begin()

    def _begin(self) -> None:
        self.bytes = 0
        self.rows = 0
        self.full = False
        self._held = _Held()

    # ---- as a tier

    def lookup(self, keys: Tensor) -> Tensor:
        return self.lookup_batch(keys).slots >= 0

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        return self.lookup_batch(keys).restricted(layout).rows()

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        try:
            self._write(keys, layout, leaves)
        except (RuntimeError, MemoryError) as error:
            self.full = True
            self._warnings.warn("memory", "rows cannot be kept in memory: %s", error)
        if self.full and self.limit:
            self._warnings.warn("memory full", _FULL)

    def describe(self, meta: Mapping[str, Any]) -> None:
        """Rows in memory need no description."""

    def stats(self) -> TierStats:
        return TierStats(rows=self.rows, bytes=self.bytes, full=self.full)

    def flush(self) -> None:
        """Rows in memory never survive the process."""

    def clear(self) -> None:
        with self._lock:
            self._held.synchronize()
            self._begin()

    def close(self) -> None:
        """The rows go with their last reader, such as a `CachedRows`."""

    # ---- whole batches

    def hash_and_read(self, rows: list[Tensor], call_digest: Digest, watch: int = 0) -> tuple[Rows | MemoryLookup, int]:
        """All rows of a call if they are here and of one layout, else what was found; and a probe.

        See `Keys.hash_request`, and `State.watch` for the native watch that is probed unless it is 0.
        """
        held = self._held
        if held.written:
            held.wait_for_writes()
        whole, tensors, number, probe = ops.table_hash_and_read(held.table.id, rows, call_digest, watch)
        if whole:
            return Rows(None, held.arenas[number].layout, tensors), probe
        keys, slots, missing = tensors
        found = MemoryLookup(held, keys, slots, missing, number)
        if number >= 0 and not missing.numel():  # in arenas that native code cannot read
            return Rows(None, held.arenas[number].layout, found.gather(slots)), probe
        return found, probe

    def read_whole(self, keys: Tensor) -> Rows | None:
        """The rows with these keys, if that is one step: all are here and have one layout."""
        held = self._held
        held.wait_for_writes()
        leaves, number = held.table.read(keys)
        return Rows(None, held.arenas[number].layout, leaves) if leaves else None

    def lookup_batch(self, keys: Tensor) -> MemoryLookup:
        """Which of the rows with these keys (int64 ``[B, 2]``) are here, and which distinct ones are not."""
        held = self._held
        held.wait_for_writes()
        return MemoryLookup(held, keys, *held.table.lookup(keys))

    def find(self, low: int) -> Rows | None:
        """A copy of the row whose key has that low half."""
        held = self._held
        held.wait_for_writes()
        number, slot = held.table.find(low)
        if number < 0:
            return None
        arena = held.arenas[number]
        return Rows(None, arena.layout, arena.gather(torch.tensor([slot], device="cpu")))

    def low_keys(self) -> list[int]:
        """The low halves of all keys."""
        return self._held.table.low_keys()

    # ---- writing

    def _write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Copies the rows that are new, as far as they fit."""
        with self._lock:
            held = self._held
            room = (self.limit - self.bytes) // layout.row_bytes if layout.row_bytes else keys.shape[0]
            if room > 0:
                device = self.device if self.is_on_host else self._device_for(leaves)
                number = held.number(layout, device, self.limit - self.bytes)
                written, new = held.write(keys, number, leaves, room)
            else:
                written, new = 0, held.table.lookup(keys)[1].shape[0]
            self.full |= written < new
            self.bytes += written * layout.row_bytes
            self.rows += written

    def _device_for(self, leaves: list[Tensor]) -> torch.device:
        """Which of the GPUs, where that was left open: the one of the rows that come first."""
        if self.device.type != "cuda" or self.device.index is not None:
            return self.device
        return leaves[0].device if leaves[0].is_cuda else torch.device("cuda", torch.cuda.current_device())


class _Held:
    """The rows between two clears: one object, so that nobody sees the table of one time with the arenas of another."""

    def __init__(self) -> None:
        self.table = _Table()
        self.arenas: list[RowArena] = []  # by the number of their layout
        self._numbers: dict[Layout, int] = {}
        self.written: list[tuple[torch.device, torch.cuda.Event]] = []  # on GPUs, and perhaps not there yet

    def write(self, keys: Tensor, number: int, leaves: list[Tensor], most: int) -> tuple[int, int]:
        """How many of the rows were copied, at most so many, and how many are new."""
        arena = self.arenas[number]
        if arena.is_native:
            first = arena.used
            # Ahead: wherever this is interrupted, a slot that somebody can find must not be used again.
            arena.used += min(keys.shape[0], most)
            written, new = self.table.write(keys, number, first, leaves, most)
            arena.used = first + max(0, written)
            if written >= 0:
                return written, new
        _, rows, _ = self.table.lookup(keys)
        new = rows.shape[0]
        rows = rows[:most]
        if rows.shape[0] == 0:
            return 0, new
        if rows.shape[0] < keys.shape[0]:
            keys, leaves = keys.index_select(0, rows), [select(t, rows.to(t.device)) for t in leaves]
        first = arena.append(leaves, keys.shape[0])
        self._note_write(arena.device)
        self.table.insert(keys, number, first)
        return keys.shape[0], new

    def _note_write(self, device: torch.device) -> None:
        """After rows were copied to an arena, and before anybody can find them."""
        if device.type == "cuda":
            self.written = [*self._unfinished(), (device, torch.cuda.current_stream(device).record_event())]

    def wait_for_writes(self) -> None:
        """Has what is queued next on the current streams come after what other streams write."""
        if self.written:
            self.written = self._unfinished()
            for device, event in self.written:
                torch.cuda.current_stream(device).wait_event(event)

    def synchronize(self) -> None:
        """Before the arenas go: what still reads them, on whatever stream, ends first."""
        for device in {arena.device for arena in self.arenas if arena.device.type == "cuda"}:
            torch.cuda.synchronize(device)

    def _unfinished(self) -> list[tuple[torch.device, torch.cuda.Event]]:
        return [(device, event) for device, event in self.written if not event.query()]  # type: ignore[no-untyped-call]

    def number(self, layout: Layout, device: torch.device, limit: int) -> int:
        """The number of a layout, whose arenas are made when it is new."""
        number = self._numbers.get(layout)
        if number is None:
            number = len(self.arenas)
            self.arenas.append(RowArena(layout, device, limit, self._native_chunks(layout, number, device)))
            self._numbers[layout] = number  # last: wherever this is interrupted, a number has its arena
        return number

    def _native_chunks(self, layout: Layout, number: int, device: torch.device) -> AddChunk | None:
        """Tells the native table of new chunks, which it then reads and writes itself; None: it cannot."""
        foreign = any(leaf.stored in ops.FOREIGN_DTYPES for leaf in layout.leaves)
        if foreign or device.type not in ("cpu", "cuda"):
            return None
        return functools.partial(self.table.add_chunk, number)


class MemoryLookup:
    """What a lookup of B rows found in memory.

    Attributes:
        keys: int64 ``[B, 2]``.
        slots: int64 ``[B]``, where each row is; -1 - j: it is the j-th distinct row that is not here.
        missing: int64 ``[M]``, the first positions of those in the batch.
    """

    __slots__ = ("_held", "_number", "keys", "missing", "slots")

    def __init__(self, held: _Held, keys: Tensor, slots: Tensor, missing: Tensor, number: int) -> None:
        self.keys = keys
        self.slots = slots
        self.missing = missing
        self._held = held
        self._number = number

    @property
    def is_mixed(self) -> bool:
        """Whether rows of several layouts were found: they cannot be one output."""
        return self._number == MIXED

    @property
    def layout(self) -> Layout | None:
        """The layout of all rows that were found; None where there are none, or several."""
        return self._held.arenas[self._number].layout if self._number >= 0 else None

    def gather(self, slots: Tensor) -> list[Tensor]:
        """Rows of these slots (int64, on the CPU) as new leaves, on the tier's device."""
        return self._held.arenas[self._number].gather(slots)

    def rows(self) -> Rows | None:
        """Those that were found; None if there are none."""
        positions = (self.slots >= 0).nonzero().squeeze(1)
        count = positions.shape[0]
        if self.layout is None or count == 0:
            return None
        whole = count == self.keys.shape[0]
        return Rows(None if whole else positions, self.layout, self.gather(self.slots.index_select(0, positions)))

    def restricted(self, layout: Layout | None) -> MemoryLookup:
        """The same with rows of other layouts than this, or, for None, than that of the first row, as if not here."""
        if not self.is_mixed and (layout is None or self.layout in (None, layout)):
            return self
        # Rows of several layouts are rare, so each is looked up alone.
        alone = [self._held.table.lookup(key) for key in self.keys.unsqueeze(1).unbind(0)]
        number = next((n for _, _, n in alone if n >= 0 and layout in (None, self._held.arenas[n].layout)), NONE)
        slots: list[int] = []
        missing: list[int] = []
        seen: dict[tuple[int, ...], int] = {}
        for position, ((slot, _, own), key) in enumerate(zip(alone, self.keys.tolist())):
            if own == number >= 0:
                slots.append(int(slot))
                continue
            if tuple(key) not in seen:
                seen[tuple(key)] = len(missing)
                missing.append(position)
            slots.append(-1 - seen[tuple(key)])
        as_tensor = functools.partial(torch.tensor, dtype=torch.int64, device="cpu")
        return MemoryLookup(self._held, self.keys, as_tensor(slots), as_tensor(missing), number)


class _Table:
    """A native key table that is closed with its owner."""

    def __init__(self) -> None:
        self.id = ops.table_open()
        weakref.finalize(self, ops.table_close, self.id).atexit = False

    def lookup(self, keys: Tensor) -> tuple[Tensor, Tensor, int]:
        return ops.table_lookup(self.id, keys)

    def read(self, keys: Tensor) -> tuple[list[Tensor], int]:
        return ops.table_read(self.id, keys)

    def write(self, keys: Tensor, layout: int, first: int, leaves: list[Tensor], most: int) -> tuple[int, int]:
        return ops.table_write(self.id, keys.contiguous(), layout, first, leaves, most)

    def add_chunk(self, layout: int, first: int, chunk: list[Tensor]) -> None:
        ops.table_add_chunk(self.id, layout, first, chunk)

    def insert(self, keys: Tensor, layout: int, first: int) -> None:
        ops.table_insert(self.id, keys.contiguous(), layout, first)

    def find(self, low: int) -> tuple[int, int]:
        return ops.table_find(self.id, low)

    def low_keys(self) -> list[int]:
        return ops.table_low_keys(self.id).tolist()


class RowView(Mapping[int, Any]):
    """A read-only view of the rows in memory."""

    def __init__(self, memory: MemoryTier) -> None:
        self._memory = memory

    def __len__(self) -> int:
        return self._memory.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._memory.low_keys())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and -(2**63) <= key < 2**63 and self._memory.find(key) is not None

    def __getitem__(self, key: int) -> Any:
        found = self._memory.find(key) if isinstance(key, int) and -(2**63) <= key < 2**63 else None
        if found is None:
            raise KeyError(key)
        return found.layout.join(found.layout.restore(found.leaves, self._memory.device))
