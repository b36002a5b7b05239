"""Rows by key, without a module: what precomputed rows are read from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcache.options import Options
from torchcache.tiers import staging
from torchcache.tiers.disk import DiskTier
from torchcache.tiers.layout import Layout, select
from torchcache.tiers.memory import Found, MemoryTier


class MissingRows(LookupError):
    """Rows that no tier has; `places` are theirs among the keys that were asked for."""

    def __init__(self, message: str, places: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


class Tiers:
    """The rows of one cache, by key: what is left of it when the module is gone.

    A copy of them in another process (by pickle) has the directory, and a memory tier of its own.
    """

    def __init__(self, memory: MemoryTier, disk: DiskTier | None, options: Options) -> None:
        self._memory = memory
        self.disk = disk
        self.options = options

    @classmethod
    def open(cls, directory: str, options: Options) -> Tiers:
        memory = MemoryTier(options.memory_cache_device, options.max_memory_cache_size)
        return cls(memory, DiskTier(Path(directory), options, dict), options)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.disk is None:
            raise TypeError(
                "these rows are in the memory of this process alone and cannot be passed on to another: "
                "cache with persistent=True, or give the DataLoader multiprocessing_context='fork'"
            )
        return Tiers.open, (str(self.disk.directory), self.options)

    def missing(self, keys: Tensor) -> Tensor:
        """Places in `keys` (int64 ``[B, 2]``) of the distinct rows that no tier has. What is on disk is read."""
        staging.land()
        found, _, place, _ = self._find(keys)
        return found.missing.index_select(0, (place < 0).nonzero().squeeze(1))

    def fetch(self, keys: Tensor) -> tuple[Layout, list[Tensor]]:
        """Layout and leaves ``[B, …]`` of these rows, in the forward's dtypes, on the memory tier's device.

        Raises:
            MissingRows: no tier has all of them.
            ValueError: they have several layouts, so they cannot be one batch.
        """
        staging.land()
        layout, leaves = self._memory.take_keys(keys) or self._fetch(keys)
        device = self._memory.device
        return layout, [t.to(device=device, dtype=leaf.dtype) for leaf, t in zip(layout.leaves, leaves)]

    def _fetch(self, keys: Tensor) -> tuple[Layout, list[Tensor]]:
        found, parts, place, layouts = self._find(keys)
        if (place < 0).any():
            places = found.missing.index_select(0, (place < 0).nonzero().squeeze(1)).tolist()
            raise MissingRows(f"{len(places)} of {len(keys)} rows are in no tier", places)
        if found.mixed or len(layouts) != 1:
            raise ValueError(
                "rows whose outputs differ in shape or type cannot be one batch: take rows of one kind, or batches of 1"
            )
        (layout,) = layouts
        return layout, gather(found, parts, place) if len(place) else found.gather(found.slots)

    def _find(self, keys: Tensor) -> tuple[Found, list[list[Tensor]], Tensor, set[Layout]]:
        """What memory has; leaves read from disk; the places of the missing rows in those (or -1); all layouts."""
        found = self._memory.lookup(keys)
        place = torch.full((len(found.missing),), -1, dtype=torch.int64, device="cpu")
        layouts = set() if found.layout is None else {found.layout}
        parts: list[list[Tensor]] = []
        read = 0
        absent = torch.arange(len(place), device="cpu")
        while len(absent) and self.disk is not None:  # once for each layout
            on_disk = self.disk.fetch(keys.index_select(0, found.missing.index_select(0, absent)), None)
            if on_disk is None:
                break
            where, layout, leaves = on_disk
            self._keep(keys.index_select(0, found.missing.index_select(0, absent[where])), layout, leaves)
            place[absent[where]] = torch.arange(len(where), device="cpu") + read
            read += len(where)
            parts.append(leaves)
            layouts.add(layout)
            absent = (place < 0).nonzero().squeeze(1)
        return found, parts, place, layouts

    def _keep(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        with contextlib.suppress(RuntimeError, MemoryError):  # then it is read again the next time
            self._memory.put(keys, layout, leaves)


def gather(found: Found, parts: list[list[Tensor]], place: Tensor | None) -> list[Tensor]:
    """Leaves ``[B, …]`` of the batch from the rows in memory and the distinct missing ones.

    The j-th of those is row ``place[j]`` of the parts one behind the other, or row j where there is no place.
    """
    slots = found.slots
    hits = (slots >= 0).nonzero().squeeze(1)
    order = -1 - slots  # in the pools below; wrong for hits, which are set last
    if place is not None:
        order = place.index_select(0, order.clamp(min=0))
    gathered = [found.gather(slots.index_select(0, hits))] if len(hits) else []
    order[hits] = torch.arange(len(hits), device="cpu") + len(found.missing)
    pools = [_concatenate(p) for p in zip(*parts, *gathered)]
    return [select(pool, order.to(pool.device)) for pool in pools]


def others(some: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of the numbers 0 … count - 1 those that are not among `some`; and the place of each in `some` and then those."""
    place = torch.full((count,), -1, dtype=torch.int64, device="cpu")
    place[some] = torch.arange(len(some), device="cpu")
    others = (place < 0).nonzero().squeeze(1)
    place[others] = torch.arange(len(some), count, device="cpu")
    return others, place


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    device = next((p.device for p in parts if not p.is_cpu), parts[0].device)
    with torch.autocast(device.type, enabled=False):  # which would have cat change dtypes
        return torch.cat([p.to(device) for p in parts])
