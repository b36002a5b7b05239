"""Has the tiers keep rows, and says once when one is full."""

from __future__ import annotations

import functools

from torch import Tensor

from torchcache._utils.logs import Once
from torchcache.tiers import staging
from torchcache.tiers.disk import DiskTier
from torchcache.tiers.layout import Layout
from torchcache.tiers.memory import MemoryTier

_FULL = "the %s cache is full: new rows are computed but not kept; raise %s to keep more"


class Keeper:
    """Of one cache. A tier that fails is a warning."""

    def __init__(self, memory: MemoryTier, disk: DiskTier | None, once: Once) -> None:
        self._memory = memory
        self._disk = disk
        self._once = once

    def keep(self, keys: Tensor, layout: Layout, leaves: list[Tensor], on_disk: bool) -> None:
        """Keeps copies of the rows; tiers on the host get those of a GPU later, behind the training step.

        Args:
            keys: int64 ``[M, 2]``.
            leaves: ``[M, …]`` each.
            on_disk: they are on disk already.
        """
        keepers = [self._in_memory]
        if self._disk is not None and not on_disk:
            keepers.append(self._on_disk)
        if staging.is_needed(leaves):
            if self._memory.device.type != "cpu":
                keepers.remove(self._in_memory)
                self._in_memory(keys, layout, leaves)
            if keepers:
                staging.send(leaves, [functools.partial(keep, keys, layout) for keep in keepers])
        else:
            for keep in keepers:
                keep(keys, layout, leaves)

    def _in_memory(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        try:
            self._memory.put(keys, layout, leaves)
        except (RuntimeError, MemoryError) as error:
            self._memory.full = True
            self._once.warn("memory", "rows cannot be kept in memory: %s", error)
        if self._memory.full and self._memory.limit:
            self._once.warn("memory full", _FULL, "memory", "max_memory_cache_size")

    def _on_disk(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        assert self._disk is not None
        self._disk.put(keys, layout, leaves)
        if self._disk.stats().full:
            self._once.warn("disk full", _FULL, "disk", "max_persistent_cache_size")
