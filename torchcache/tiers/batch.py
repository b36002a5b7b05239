"""Merges the rows of one batch from several sources: memory, farther tiers, and the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcache.tiers.layout import Layout, select
from torchcache.tiers.memory import MemoryLookup
from torchcache.tiers.tier import Rows

_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


class Batch:
    """Starts with the rows in memory; `add` adds rows that were read or computed, until none is missing.

    Attributes:
        keys: int64 ``[B, 2]``.
        missing: int64 ``[M]``: the first position in the batch of each distinct row that is still missing.
        layout: the layout of all rows so far, which the missing ones must have, too; None: there are no rows yet.
        count: B.
        hits: the number of rows by the name of the tier that had them. Repetitions of a row in the batch count as hits
            in memory.
    """

    def __init__(self, lookup: MemoryLookup) -> None:
        self.keys = lookup.keys
        self.missing = lookup.missing
        self.layout = lookup.layout
        self.count = lookup.keys.shape[0]
        self._memory = lookup
        self._distinct = self.missing.shape[0]  # number of distinct rows that memory lacks
        self.hits = {"memory": self.count - self._distinct}
        # Those are numbered; None means all of them.
        self._absent: Tensor | None = None  # int64 [M], the numbers of the missing rows
        self._parts: list[tuple[Tensor | None, list[Tensor]]] = []  # numbers of added rows, and their leaves

    @property
    def is_mixed(self) -> bool:
        """Whether memory has rows of several layouts, which cannot be one output."""
        return self._memory.is_mixed

    @property
    def missing_keys(self) -> Tensor:
        """The keys of the missing rows: int64 ``[M, 2]``."""
        return self.keys if self.missing.shape[0] == self.count else self.keys.index_select(0, self.missing)

    def add(self, rows: Rows) -> None:
        """Adds rows. Their positions are those in `missing_keys`."""
        self.layout = rows.layout
        if rows.positions is None:
            self._parts.append((self._absent, rows.leaves))
            self.missing = _NONE
            return
        rest = _others(rows.positions, self.missing.shape[0])
        self._parts.append((_select(self._absent, rows.positions), rows.leaves))
        self._absent = _select(self._absent, rest)
        self.missing = self.missing.index_select(0, rest)

    def unmerged(self) -> Rows | None:
        """All rows, if they need no merging: they are distinct and come from one source. Else None."""
        if len(self._parts) != 1 or self._distinct != self.count:
            return None
        ((numbers, leaves),) = self._parts
        return Rows(None, self._layout(), leaves) if numbers is None and self.missing.shape[0] == 0 else None

    def rows(self) -> Rows | None:
        """All rows so far, merged in the order of the batch; None if there are none."""
        slots = self._memory.slots
        in_memory = (slots >= 0).nonzero().squeeze(1)
        parts = [leaves for _, leaves in self._parts]
        if in_memory.shape[0]:
            parts.append(self._memory.gather(slots.index_select(0, in_memory)))
        if not parts:
            return None
        order = self._numbers().index_select(0, (-1 - slots).clamp(min=0)) if self._distinct else slots.clone()
        order[in_memory] = torch.arange(in_memory.shape[0], device="cpu") + sum(
            leaves[0].shape[0] for _, leaves in self._parts
        )
        positions = (order >= 0).nonzero().squeeze(1) if self.missing.shape[0] else None
        if positions is not None:
            order = order.index_select(0, positions)
        pools = [_concatenate(pool) for pool in zip(*parts)]
        return Rows(positions, self._layout(), [select(pool, order.to(pool.device)) for pool in pools])

    def _numbers(self) -> Tensor:
        """The index of each distinct row that memory lacks in the concatenated parts: int64 ``[distinct]``.

        -1 for rows that are missing.
        """
        numbers = torch.full((self._distinct,), -1, dtype=torch.int64, device="cpu")
        first = 0
        for which, leaves in self._parts:
            end = first + leaves[0].shape[0]
            numbers[slice(None) if which is None else which] = torch.arange(first, end, device="cpu")
            first = end
        return numbers

    def _layout(self) -> Layout:
        assert self.layout is not None
        return self.layout


def _select(numbers: Tensor | None, positions: Tensor) -> Tensor:
    return positions if numbers is None else numbers.index_select(0, positions)


def _others(some: Tensor, count: int) -> Tensor:
    """The numbers 0 … count - 1 that are not in `some`: int64, ascending."""
    absent = torch.ones(count, dtype=torch.bool, device="cpu")
    absent[some] = False
    return absent.nonzero().squeeze(1)


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    device = next((p.device for p in parts if not p.is_cpu), parts[0].device)
    with torch.autocast(device.type, enabled=False):  # under autocast, cat changes dtypes
        return torch.cat([p.to(device) for p in parts])
