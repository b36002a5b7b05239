"""The tiers of one cache, nearest first: looked up in that order, written all, and a tier again to those who use it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchcache._native.ops import Digest
from torchcache._utils.logs import WarnOnce
from torchcache.errors import MissingRows
from torchcache.options import Options
from torchcache.tiers import staging
from torchcache.tiers.batch import Batch
from torchcache.tiers.disk import DiskTier
from torchcache.tiers.layout import Layout
from torchcache.tiers.memory import MemoryTier, RowView
from torchcache.tiers.tier import Rows, Tier, TierStats


class Chain:
    """Memory, and the tiers behind it. What a farther tier has is kept in the nearer ones when it is read.

    Rows on their way from a GPU (see `staging`) arrive before anything here is looked at. A copy of a chain in another
    process (by pickle) has the same directory, and a memory tier of its own.
    """

    name = "chain"
    is_on_host = False  # it sees to that itself

    def __init__(self, memory: MemoryTier, farther: Sequence[Tier], options: Options, directory: Path | None) -> None:
        self.memory = memory
        self.farther = tuple(farther)
        self.options = options
        self.directory = directory  # of the rows that outlive the process; None: there are none

    @classmethod
    def open(cls, options: Options, directory: Path | None, warnings: WarnOnce | None = None) -> Chain:
        """The tiers that the options name.

        Args:
            options: those of the cache.
            directory: of the disk tier; None: rows are in memory alone.
            warnings: says what goes wrong with a tier, each thing once.
        """
        memory = MemoryTier(options.memory_cache_device, options.max_memory_cache_size, warnings)
        farther = [] if directory is None else [DiskTier(directory, options, warnings)]
        return cls(memory, farther, options, directory)

    def without_memory(self) -> Chain:
        """The farther tiers alone, behind a memory tier that keeps nothing."""
        return Chain(MemoryTier("cpu", 0), self.farther, self.options, self.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.directory is None:
            raise TypeError(
                "these rows are in the memory of this process alone and cannot be passed on to another: "
                "cache with persistent=True, or give the DataLoader multiprocessing_context='fork'"
            )
        return Chain.open, (self.options, self.directory)

    # ---- the batch of a call

    def hash_and_read(self, rows: list[Tensor], call_digest: Digest, watch: int = 0) -> tuple[Rows | Batch, int]:
        """All rows of a call from memory, or else a batch that begins with those that memory has.

        And the probe of a native watch, if that is not 0: see `Keys.hash_request` and `State.watch`.
        """
        if staging.queue:
            staging.drain()
        found, probe = self.memory.hash_and_read(rows, call_digest, watch)
        return found if isinstance(found, Rows) else Batch(found), probe

    def read_missing(self, batch: Batch, pin: bool = False) -> None:
        """Adds to a batch those of its missing rows that a farther tier has, if they have the layout of the others."""
        for number, tier in enumerate(self.farther):
            if batch.missing.shape[0] == 0:
                return
            keys = batch.missing_keys
            rows = tier.read(keys, batch.layout, pin)
            if rows is not None:
                found = keys if rows.positions is None else keys.index_select(0, rows.positions)
                self._write(found, rows.layout, rows.leaves, self.farther[:number])
                batch.hits[tier.name] = len(rows)
                batch.add(rows)

    def rows(self, batch: Batch) -> Rows:
        """All rows of a batch from which none is missing."""
        # Most often all are in memory by now, from where they come in one step.
        rows = batch.untouched() or self.memory.read_whole(batch.keys) or batch.rows()
        assert rows is not None and rows.positions is None
        return rows

    # ---- rows by key

    def missing(self, keys: Tensor) -> Tensor:
        """Positions in `keys` of the distinct rows that no tier has (int64). Others are read into memory."""
        staging.drain()
        batch = Batch(self.memory.lookup_batch(keys))
        while batch.missing.shape[0]:  # once for each layout
            before = batch.missing.shape[0]
            batch.layout = None
            self.read_missing(batch)
            if batch.missing.shape[0] == before:
                break
        return batch.missing

    def fetch(self, keys: Tensor) -> tuple[Layout, list[Tensor]]:
        """Layout and leaves ``[B, …]`` of these rows, in the forward's dtypes, on the memory tier's device.

        Raises:
            MissingRows: no tier has all of them.
            ValueError: they have several layouts, so they cannot be one batch.
        """
        staging.drain()
        rows = self.memory.read_whole(keys) or self._read_batch(keys)
        device = self.memory.device
        leaves = [t.to(device=device, dtype=leaf.dtype) for leaf, t in zip(rows.layout.leaves, rows.leaves)]
        return rows.layout, leaves

    def count(self, keys: Tensor) -> dict[str, int]:
        """How many of these rows each tier has that no nearer one has. Nothing is read."""
        staging.drain()
        counts = {}
        for tier in (self.memory, *self.farther):
            present = tier.lookup(keys)
            counts[tier.name] = int(present.sum())
            keys = keys[~present]
        return counts

    def view(self) -> RowView:
        """The rows in memory as a mapping."""
        staging.drain()
        return RowView(self.memory)

    def _read_batch(self, keys: Tensor) -> Rows:
        batch = Batch(self.memory.lookup_batch(keys))
        if not batch.is_mixed:
            self.read_missing(batch)
            if batch.missing.shape[0] == 0 and batch.layout is not None:
                return self.rows(batch)
        missing = self.missing(keys).tolist()
        if missing:
            raise MissingRows(f"{len(missing)} of {len(keys)} rows are in no tier", missing)
        raise ValueError(
            "rows whose outputs differ in shape or type cannot be one batch: take rows of one kind, or batches of 1"
        )

    # ---- as a tier

    def lookup(self, keys: Tensor) -> Tensor:
        staging.drain()
        present = self.memory.lookup(keys)
        for tier in self.farther:
            absent = (~present).nonzero().squeeze(1)
            if absent.shape[0] == 0:
                break
            present[absent] = tier.lookup(keys.index_select(0, absent))
        return present

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        staging.drain()
        batch = Batch(self.memory.lookup_batch(keys).restricted(layout))
        batch.layout = batch.layout or layout
        self.read_missing(batch, pin)
        return batch.rows()

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        self._write(keys, layout, leaves, self.farther)

    def _write(self, keys: Tensor, layout: Layout, leaves: list[Tensor], farther: Sequence[Tier]) -> None:
        tiers: list[Tier] = [self.memory, *farther]
        if staging.is_needed(leaves):
            waiting = [tier for tier in tiers if tier.is_on_host]
            tiers = [tier for tier in tiers if not tier.is_on_host]
            if waiting:
                staging.enqueue(leaves, [functools.partial(tier.write, keys, layout) for tier in waiting])
        for tier in tiers:
            tier.write(keys, layout, leaves)

    @property
    def is_described(self) -> bool:
        return all(tier.is_described for tier in self.farther)

    def describe(self, meta: Mapping[str, Any]) -> None:
        for tier in self.farther:
            tier.describe(meta)

    def stats(self) -> TierStats:
        """The sum of all tiers."""
        stats = self.stats_by_tier().values()
        return TierStats(
            rows=sum(s.rows for s in stats),
            bytes=sum(s.bytes for s in stats),
            queued_rows=sum(s.queued_rows for s in stats),
            damaged_rows=sum(s.damaged_rows for s in stats),
            dropped_rows=sum(s.dropped_rows for s in stats),
            full=any(s.full for s in stats),
        )

    def stats_by_tier(self) -> dict[str, TierStats]:
        staging.drain()
        return {tier.name: tier.stats() for tier in (self.memory, *self.farther)}

    def flush(self) -> None:
        staging.drain()
        for tier in self.farther:
            tier.flush()

    def clear(self, persistent: bool = True) -> None:
        """Removes the rows in memory; with `persistent` also those of the farther tiers.

        Raises:
            OSError: files of the directory cannot be removed.
        """
        staging.drain()
        for tier in (self.memory, *self.farther) if persistent else (self.memory,):
            tier.clear()

    def close(self) -> None:
        staging.drain()
        for tier in (self.memory, *self.farther):
            tier.close()
