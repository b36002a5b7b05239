"""What a cache counts: ``cache_instance.info()``, and whether it is of any use."""

from __future__ import annotations

from typing import NamedTuple

_USELESS_AFTER = 10_000  # rows
_USELESS_BELOW = 0.01  # hits a row


class CacheInfo(NamedTuple):
    """Rows asked for since the cache was made, by where they came from; rows and bytes of each tier."""

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


class Counts:
    """Rows by where they came from."""

    __slots__ = ("disk", "memory", "misses")

    def __init__(self) -> None:
        self.memory = self.disk = self.misses = 0

    @property
    def found(self) -> int:
        return self.memory + self.disk

    @property
    def rows(self) -> int:
        return self.found + self.misses

    @property
    def useless(self) -> bool:
        """Whether hardly a row is ever found."""
        return self.misses >= _USELESS_AFTER and self.found < _USELESS_BELOW * self.rows
