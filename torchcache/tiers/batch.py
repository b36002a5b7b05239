"""The rows of one batch, gathered from several places: memory, farther tiers, and the forward."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcache.tiers.layout import Layout, select
from torchcache.tiers.memory import MemoryLookup
from torchcache.tiers.tier import Rows

_NONE = torch.empty(0, dtype=torch.int64, device="cpu")


class Batch:
    """Starts with what memory has; `add` takes rows that were read or computed, until none is missing.

    Attributes:
        keys: int64 ``[B, 2]``.
        missing: int64 ``[M]``, for each distinct row that nobody has so far the first position in the batch.
        layout: that of the rows found so far, which all others must have; None: none is found.
        count: B.
        hits: rows by the name of the tier that had them. Repetitions of a row in the batch count as hits in memory.
    """

    def __init__(self, lookup: MemoryLookup) -> None:
        self.keys = lookup.keys
        self.missing = lookup.missing
        self.layout = lookup.layout
        self.count = lookup.keys.shape[0]
        self._memory = lookup
        self._distinct = self.missing.shape[0]  # rows that memory lacks
        self.hits = {"memory": self.count - self._distinct}
        self._absent: Tensor | None = None  # int64 [M], which of those the missing ones are; None: all
        self._parts: list[tuple[Tensor | None, list[Tensor]]] = []  # which of those, and their leaves

    @property
    def is_mixed(self) -> bool:
        """Whether memory has rows of several layouts: they cannot be one output."""
        return self._memory.is_mixed

    @property
    def missing_keys(self) -> Tensor:
        """int64 ``[M, 2]``."""
        return self.keys if self.missing.shape[0] == self.count else self.keys.index_select(0, self.missing)

    def add(self, rows: Rows) -> None:
        """Takes rows whose positions are numbers of missing ones."""
        self.layout = rows.layout
        if rows.positions is None:
            self._parts.append((self._absent, rows.leaves))
            self.missing = _NONE
            return
        rest = _others(rows.positions, self.missing.shape[0])
        self._parts.append((_select(self._absent, rows.positions), rows.leaves))
        self._absent = _select(self._absent, rest)
        self.missing = self.missing.index_select(0, rest)

    def untouched(self) -> Rows | None:
        """All rows, if they need not be put together: they are distinct, and came from one place."""
        if len(self._parts) != 1 or self._distinct != self.count:
            return None
        ((numbers, leaves),) = self._parts
        return Rows(None, self._layout(), leaves) if numbers is None and self.missing.shape[0] == 0 else None

    def rows(self) -> Rows | None:
        """All rows found so far, put together; None if there are none."""
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
        """For each distinct row that memory lacks its place in the parts, one behind the other: int64 ``[distinct]``.

        -1 for those that are missing.
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


def _select(numbers: Tensor | None, where: Tensor) -> Tensor:
    return where if numbers is None else numbers.index_select(0, where)


def _others(some: Tensor, count: int) -> Tensor:
    """Of the numbers 0 … count - 1 those that are not among `some`, int64, ascending."""
    absent = torch.ones(count, dtype=torch.bool, device="cpu")
    absent[some] = False
    return absent.nonzero().squeeze(1)


def _concatenate(parts: tuple[Tensor, ...]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    device = next((p.device for p in parts if not p.is_cpu), parts[0].device)
    with torch.autocast(device.type, enabled=False):  # which would have cat change dtypes
        return torch.cat([p.to(device) for p in parts])
