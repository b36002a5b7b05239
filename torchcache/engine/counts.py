"""What a cache counts: ``cache_instance.info()``, and whether the cache is of any use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torchcache.tiers.tier import TierStats

_USELESS_AFTER = 10_000  # rows
_USELESS_BELOW = 0.01  # hits a row


class CacheInfo(NamedTuple):
    """Rows asked for since the cache was made, by where they came from; rows and bytes of each tier.

    Attributes:
        memory_hits: rows that were in memory, or twice in one batch.
        disk_hits: rows that were read from the directory.
        misses: rows that were computed, and kept where there was room.
        memory_rows: rows in memory now.
        memory_bytes: their size.
        disk_rows: rows of the directory that this process knows.
        disk_bytes: size of the files that this process has written, with the rows that wait to be written.
        damaged_rows: rows on disk that failed their checksum; they were computed again.
        dropped_rows: rows that could not be written.
        queued_rows: rows that wait to be written.
        bypassed_calls: calls that were computed without the cache; ``explain`` says why.
        hits: rows by the name of the tier that had them.
        tiers: the same counters for each tier by its name.
        checks: rows that were computed again and compared.
        largest_error: the largest difference that these had, relative to the norm of the row.
        wrong_rows: how many of them differed by more than noise.

    Example:
        >>> import torch
        >>> from torchcache import torchcache
        >>> module = torchcache()(torch.nn.Linear(4, 2).requires_grad_(False))
        >>> _ = module(torch.eye(4)), module(torch.eye(4))
        >>> info = module.cache_instance.info()
        >>> info.misses, info.memory_hits, info.memory_rows, info.memory_bytes
        (4, 4, 4, 32)
    """

    memory_hits: int
    disk_hits: int
    misses: int
    memory_rows: int
    memory_bytes: int
    disk_rows: int
    disk_bytes: int
    damaged_rows: int
    dropped_rows: int
    queued_rows: int
    bypassed_calls: int
    hits: dict[str, int]
    tiers: dict[str, TierStats]
    checks: int = 0
    largest_error: float = 0.0
    wrong_rows: int = 0


class Counts:
    """Rows by where they came from, and calls without the cache."""

    __slots__ = ("bypassed_calls", "checks", "hits", "largest_error", "misses", "wrong_rows")

    def __init__(self) -> None:
        self.hits = {"memory": 0, "disk": 0}
        self.misses = self.bypassed_calls = self.checks = self.wrong_rows = 0
        self.largest_error = 0.0

    def add_hits(self, hits: Mapping[str, int]) -> None:
        """Adds rows by the name of the tier that had them."""
        for tier, rows in hits.items():
            self.hits[tier] = self.hits.get(tier, 0) + rows

    def add_check(self, rows: int, error: float, is_wrong: bool) -> None:
        """Adds rows that were computed again, and the largest error among them."""
        self.checks += rows
        self.wrong_rows += is_wrong
        self.largest_error = max(self.largest_error, error)

    @property
    def found(self) -> int:
        """Rows that some tier had."""
        return sum(self.hits.values())

    @property
    def rows(self) -> int:
        """All rows asked for in calls that were cached."""
        return self.found + self.misses

    @property
    def is_useless(self) -> bool:
        """Whether hardly a row is ever found."""
        return self.misses >= _USELESS_AFTER and self.found < _USELESS_BELOW * self.rows

    def info(self, tiers: Mapping[str, TierStats]) -> CacheInfo:
        """These counters and those of the tiers, by their names."""
        none = TierStats()
        memory, disk = tiers.get("memory", none), tiers.get("disk", none)
        return CacheInfo(
            memory_hits=self.hits["memory"],
            disk_hits=self.hits["disk"],
            misses=self.misses,
            memory_rows=memory.rows,
            memory_bytes=memory.bytes,
            disk_rows=disk.rows,
            disk_bytes=disk.bytes,
            damaged_rows=sum(stats.damaged_rows for stats in tiers.values()),
            dropped_rows=sum(stats.dropped_rows for stats in tiers.values()),
            queued_rows=sum(stats.queued_rows for stats in tiers.values()),
            bypassed_calls=self.bypassed_calls,
            hits=dict(self.hits),
            tiers=dict(tiers),
            checks=self.checks,
            largest_error=self.largest_error,
            wrong_rows=self.wrong_rows,
        )
