"""The tiers of one cache as one tier. Lookups try them in order, the nearest first; writes go to all of them."""

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
    """Memory, and the farther tiers. Rows that are read from a farther tier are written to the nearer ones.

    All operations first wait for rows that are being copied from a GPU (see `staging`). An unpickled chain, in another
    process, has the same directory and a memory tier of its own.

    Attributes:
        memory: the nearest tier.
        farther: the other tiers, the nearest first.
        options: those of the cache.
        directory: the directory of the disk tier; None: rows are in memory only.
    """

    name = "chain"
    is_on_host = False  # `write` copies rows to the host for the tiers that need it

    def __init__(self, memory: MemoryTier, farther: Sequence[Tier], options: Options, directory: Path | None) -> None:
        self.memory = memory
        self.farther = tuple(farther)
        self.options = options
        self.directory = directory

    @classmethod
    def open(cls, options: Options, directory: Path | None, warnings: WarnOnce | None = None) -> Chain:
        """Opens the tiers that the options select.

        Args:
            options: those of the cache.
            directory: the directory of the disk tier; None: rows are in memory only.
            warnings: logs the faults of all tiers, each once.
        """
        memory = MemoryTier(options.memory_cache_device, options.max_memory_cache_size, warnings)
        farther = [] if directory is None else [DiskTier(directory, options, warnings)]
        return cls(memory, farther, options, directory)

    def without_memory(self) -> Chain:
        """The farther tiers, with a memory tier that stores nothing."""
        return Chain(MemoryTier("cpu", 0), self.farther, self.options, self.directory)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.directory is None:
            raise TypeError(
                "these rows are only in the memory of this process and cannot be sent to another: "
                "cache with persistent=True, or give the DataLoader multiprocessing_context='fork'"
            )
        return Chain.open, (self.options, self.directory)

    # ---- the batch of a call

    def hash_and_read(self, rows: list[Tensor], call_digest: Digest, watch: int = 0) -> tuple[Rows | Batch, int]:
        """Computes the keys of a call's rows and reads the rows from memory, by one native operation.

        Args:
            rows: the tensors ``[B, …]`` that make up the rows of the call.
            call_digest: the digest of everything else in the keys.
            watch: a native watch to probe at the same time; 0: none.

        Returns:
            All rows, or else a batch that starts with the rows in memory; and the result of the probe.
        """
        if staging.queue:
            staging.drain()
        result, probe = self.memory.hash_and_read(rows, call_digest, watch)
        return result if isinstance(result, Rows) else Batch(result), probe

    def read_missing(self, batch: Batch, pin: bool = False) -> None:
        """Adds the missing rows of a batch that a farther tier has in the layout of the batch.

        Args:
            batch: the batch to complete.
            pin: read into pinned memory, for rows that are copied to a GPU next.
        """
        for number, tier in enumerate(self.farther):
            if batch.missing.shape[0] == 0:
                return
            keys = batch.missing_keys
            rows = tier.read(keys, batch.layout, pin)
            if rows is not None:
                read = keys if rows.positions is None else keys.index_select(0, rows.positions)
                self._write(read, rows.layout, rows.leaves, self.farther[:number])
                batch.hits[tier.name] = len(rows)
                batch.add(rows)

    def rows(self, batch: Batch) -> Rows:
        """All rows of a batch without missing rows."""
        # Usually all are in memory by now, where one operation reads them.
        rows = batch.unmerged() or self.memory.read_whole(batch.keys) or batch.rows()
        assert rows is not None and rows.positions is None
        return rows

    # ---- rows by key

    def missing(self, keys: Tensor) -> Tensor:
        """Positions in `keys` of the distinct rows that no tier has (int64). The others are read into memory."""
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
        """Reads the rows of these keys.

        Returns:
            Their layout, and their leaves ``[B, …]`` in the dtypes of the output, on the device of the memory tier.

        Raises:
            MissingRows: no tier has some of them.
            ValueError: they have several layouts, so they cannot be one batch.
        """
        staging.drain()
        rows = self.memory.read_whole(keys) or self._read_batch(keys)
        device = self.memory.device
        leaves = [t.to(device=device, dtype=leaf.dtype) for leaf, t in zip(rows.layout.leaves, rows.leaves)]
        return rows.layout, leaves

    def count(self, keys: Tensor) -> dict[str, int]:
        """How many of these rows each tier has that no nearer tier has. No row is read."""
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
            "rows whose outputs differ in shape or type cannot be one batch: read rows of one layout, or one by one"
        )

    # ---- as a tier

    def lookup(self, keys: Tensor) -> Tensor:
        """Which of these rows any tier has: bool ``[B]``."""
        staging.drain()
        present = self.memory.lookup(keys)
        for tier in self.farther:
            absent = (~present).nonzero().squeeze(1)
            if absent.shape[0] == 0:
                break
            present[absent] = tier.lookup(keys.index_select(0, absent))
        return present

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        """See `Tier.read`."""
        staging.drain()
        batch = Batch(self.memory.lookup_batch(keys).restricted(layout))
        batch.layout = batch.layout or layout
        self.read_missing(batch, pin)
        return batch.rows()

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Writes rows to all tiers, to those on the host later if the leaves are on a GPU."""
        self._write(keys, layout, leaves, self.farther)

    def _write(self, keys: Tensor, layout: Layout, leaves: list[Tensor], farther: Sequence[Tier]) -> None:
        tiers: list[Tier] = [self.memory, *farther]
        if staging.is_needed(leaves):
            on_host = [tier for tier in tiers if tier.is_on_host]
            tiers = [tier for tier in tiers if not tier.is_on_host]
            if on_host:
                staging.enqueue(leaves, [functools.partial(tier.write, keys, layout) for tier in on_host])
        for tier in tiers:
            tier.write(keys, layout, leaves)

    @property
    def is_described(self) -> bool:
        """Whether all tiers are described."""
        return all(tier.is_described for tier in self.farther)

    def describe(self, meta: Mapping[str, Any]) -> None:
        """Passes the metadata to all farther tiers."""
        for tier in self.farther:
            tier.describe(meta)

    def stats(self) -> TierStats:
        """The sums of the counters of all tiers."""
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
        """The counters of each tier by its name."""
        staging.drain()
        return {tier.name: tier.stats() for tier in (self.memory, *self.farther)}

    def flush(self) -> None:
        """Waits until every row is in the farther tiers, or was dropped with a warning."""
        staging.drain()
        for tier in self.farther:
            tier.flush()

    def clear(self, persistent: bool = True) -> None:
        """Removes the rows in memory and, with `persistent`, those of the farther tiers.

        Raises:
            OSError: a file cannot be removed.
        """
        staging.drain()
        for tier in (self.memory, *self.farther) if persistent else (self.memory,):
            tier.clear()

    def resize_memory(self, limit: int) -> None:
        """Sets the limit of the rows in memory, in bytes. Rows that are there stay."""
        staging.drain()
        if limit != self.memory.limit:
            self.memory.resize(limit)

    def close(self) -> None:
        """Closes all tiers."""
        staging.drain()
        for tier in (self.memory, *self.farther):
            tier.close()
