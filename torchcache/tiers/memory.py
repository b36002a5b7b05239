"""The memory tier: an arena for each layout, and a native table from keys to slots. A hit is one gather a leaf."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchcache._native import ops
from torchcache._utils.locks import lock
from torchcache.tiers.arenas import Know, RowArena
from torchcache.tiers.layout import Layout, select

MIXED = -2  # the layout of a lookup that found rows of several


class MemoryTier:
    """Rows in memory, up to `limit` bytes of rows. When full, new rows are dismissed and old ones stay."""

    def __init__(self, device: str, limit: int) -> None:
        self.device = torch.device(device)
        self.limit = limit
        self._lock = lock(self)
        self._begin()

    def _begin(self) -> None:
        self.bytes = 0
        self.rows = 0
        self.full = False
        self._held = _Held()

    def clear(self) -> None:
        with self._lock:
            self._held.synchronize()
            self._begin()

    def take(
        self, rows: list[Tensor], call_digest: ops.Digest, watch: int = 0
    ) -> tuple[tuple[Layout, list[Tensor]] | Found, int]:
        """Layout and leaves ``[B, …]`` of a call (see `Keys.parts`) if all its rows are here, else what was found.

        And what a native watch that is not 0 sees on the way.
        """
        held = self._held
        if held.written:
            held.wait_for_writes()
        whole, tensors, number, seen = ops.table_hash_and_read(held.table.id, rows, call_digest, watch)
        if whole:
            return (held.arenas[number].layout, tensors), seen
        keys, slots, missing = tensors
        found = Found(held.arenas, keys, slots, missing, number)
        if number >= 0 and not found.missing.numel():
            return (held.arenas[number].layout, found.gather(found.slots)), seen
        return found, seen

    def take_keys(self, keys: Tensor) -> tuple[Layout, list[Tensor]] | None:
        """Layout and leaves ``[B, …]`` of the rows with these keys, if that is one step: all here, of one layout."""
        held = self._held
        held.wait_for_writes()
        leaves, number = held.table.take_keys(keys)
        return (held.arenas[number].layout, leaves) if leaves else None

    def lookup(self, keys: Tensor) -> Found:
        """Which of the rows with these keys (int64 ``[B, 2]``) are here."""
        held = self._held
        held.wait_for_writes()
        return Found(held.arenas, keys, *held.table.lookup(keys))

    def put(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Keeps copies of the rows, as far as they fit; of those that do not, none."""
        with self._lock:
            held = self._held
            _, new, _ = held.table.lookup(keys)
            fits = (self.limit - self.bytes) // layout.row_bytes if layout.row_bytes else len(new)
            if fits < len(new):
                self.full = True
                new = new[:fits]
            if not len(new):
                return
            number = held.number(layout, self._device_for(leaves), self.limit - self.bytes)
            whole = len(new) == len(keys)
            first = held.arenas[number].append(
                leaves if whole else [select(t, new.to(t.device)) for t in leaves], len(new)
            )
            held.note_write(number)
            held.table.insert(keys if whole else keys.index_select(0, new), number, first)
            self.bytes += len(new) * layout.row_bytes
            self.rows += len(new)

    def _device_for(self, leaves: list[Tensor]) -> torch.device:
        """Which of the GPUs, where that was left open: the one of the rows that come first."""
        if self.device.type != "cuda" or self.device.index is not None:
            return self.device
        return leaves[0].device if leaves[0].is_cuda else torch.device("cuda", torch.cuda.current_device())

    def find(self, low: int) -> tuple[Layout, list[Tensor]] | None:
        """A copy of the row whose key has that low half: its layout and leaves ``[1, …]``."""
        held = self._held
        held.wait_for_writes()
        number, slot = held.table.find(low)
        if number < 0:
            return None
        arena = held.arenas[number]
        return arena.layout, arena.gather(torch.tensor([slot], device="cpu"))

    def lows(self) -> list[int]:
        """The low halves of all keys."""
        return self._held.table.lows()


class _Held:
    """The rows between two clears: one object, so that nobody sees the table of one time with the arenas of another."""

    def __init__(self) -> None:
        self.table = _Table()
        self.arenas: list[RowArena] = []  # by the number of their layout
        self._numbers: dict[Layout, int] = {}
        self.written: list[tuple[torch.device, torch.cuda.Event]] = []  # on GPUs, and perhaps not there yet

    def note_write(self, number: int) -> None:
        """After rows were copied to an arena, and before anybody can find them."""
        device = self.arenas[number].device
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
            number = self._numbers[layout] = len(self.arenas)
            self.arenas.append(RowArena(layout, device, limit, self._know(layout, number, device)))
        return number

    def _know(self, layout: Layout, number: int, device: torch.device) -> Know:
        """Native code gathers itself, where it can."""
        foreign = any(leaf.stored in ops.FOREIGN_DTYPES for leaf in layout.leaves)
        if foreign or device.type not in ("cpu", "cuda"):
            return lambda first, chunk: None
        return functools.partial(self.table.know, number)


class Found:
    """What a lookup of B rows found.

    `keys` ``[B, 2]``, `slots` ``[B]`` (negative: missing), `missing` ``[M]``: the first rows of those.
    """

    __slots__ = ("_arenas", "_number", "keys", "missing", "slots")

    def __init__(self, arenas: list[RowArena], keys: Tensor, slots: Tensor, missing: Tensor, number: int) -> None:
        self._arenas = arenas
        self.keys = keys
        self.slots = slots
        self.missing = missing
        self._number = number

    @property
    def mixed(self) -> bool:
        """Rows of several layouts: they cannot be one output."""
        return self._number == MIXED

    @property
    def layout(self) -> Layout | None:
        return self._arenas[self._number].layout if self._number >= 0 else None

    def gather(self, slots: Tensor) -> list[Tensor]:
        """Rows of these slots (int64, on the CPU) as fresh leaves, on the tier's device."""
        return self._arenas[self._number].gather(slots)


class _Table:
    """A native key table that is closed with its owner."""

    def __init__(self) -> None:
        self.id = ops.table_open()
        weakref.finalize(self, ops.table_close, self.id).atexit = False

    def lookup(self, keys: Tensor) -> tuple[Tensor, Tensor, int]:
        return ops.table_lookup(self.id, keys)

    def take_keys(self, keys: Tensor) -> tuple[list[Tensor], int]:
        return ops.table_read(self.id, keys)

    def know(self, layout: int, first: int, chunk: list[Tensor]) -> None:
        ops.table_add_chunk(self.id, layout, first, chunk)

    def insert(self, keys: Tensor, layout: int, first: int) -> None:
        ops.table_insert(self.id, keys.contiguous(), layout, first)

    def find(self, low: int) -> tuple[int, int]:
        return ops.table_find(self.id, low)

    def lows(self) -> list[int]:
        return ops.table_low_keys(self.id).tolist()


class RowView(Mapping[int, Any]):
    """A read-only view of the rows in memory."""

    def __init__(self, memory: MemoryTier) -> None:
        self._memory = memory

    def __len__(self) -> int:
        return self._memory.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._memory.lows())

    def __contains__(self, key: object) -> bool:
        return isinstance(key, int) and -(2**63) <= key < 2**63 and self._memory.find(key) is not None

    def __getitem__(self, key: int) -> Any:
        found = self._memory.find(key) if isinstance(key, int) and -(2**63) <= key < 2**63 else None
        if found is None:
            raise KeyError(key)
        layout, leaves = found
        device = self._memory.device
        return layout.join([leaf.restore(rows, device) for leaf, rows in zip(layout.leaves, leaves)])
