"""What a tier is: a place that keeps rows by key. Memory, disk and a chain of tiers all do this and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchcache.tiers.layout import Layout


class Rows(NamedTuple):
    """Rows of one layout, some or all of those that were asked for.

    `positions` (int64 ``[F]``, ascending, on the CPU) says to which of the keys they belong; None: to all, in order.
    """

    positions: Tensor | None
    layout: Layout
    leaves: list[Tensor]  # [F, …] each, as stored

    def __len__(self) -> int:
        return self.leaves[0].shape[0]


class TierStats(NamedTuple):
    """Counters of one tier; `bytes` are those of rows in memory, or of the files that this process has written."""

    rows: int = 0
    bytes: int = 0
    queued_rows: int = 0
    damaged_rows: int = 0
    dropped_rows: int = 0
    full: bool = False


class Tier(Protocol):
    """Keys are int64 ``[B, 2]`` on the CPU. Thread-safe.

    A fault of a disk, a server or a device is a miss and a warning, never an exception.

    Attributes:
        name: the word for it in messages and counters.
        is_on_host: whether rows are written from the memory of the host; those of a GPU are then copied there first.
        is_described: whether `describe` has nothing to do.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_on_host(self) -> bool: ...
    @property
    def is_described(self) -> bool: ...

    def lookup(self, keys: Tensor) -> Tensor:
        """Which of these rows the tier has, whatever their layout: bool ``[B]``. Rows are not read for that."""
        ...

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        """Those of these rows that the tier has and that share one layout; None if there are none.

        Args:
            keys: int64 ``[B, 2]``.
            layout: the layout that they must have; None: that of the first row that is there.
            pin: read into pinned memory, for rows that go on to a GPU.
        """
        ...

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Keeps copies of the rows, as far as they fit; rows that the tier has already stay as they are."""
        ...

    def describe(self, meta: Mapping[str, Any]) -> None:
        """What people and ``explain()`` want to know of the rows, to be kept next to them; called before `write`."""
        ...

    def stats(self) -> TierStats: ...

    def flush(self) -> None:
        """Returns when every row that was written is where it survives the process, or was given up with a warning."""
        ...

    def clear(self) -> None:
        """Removes all rows, also those of other processes. Raises OSError where the system does not let it."""
        ...

    def close(self) -> None:
        """Flushes, and frees what no reader needs any more. Nothing is written afterwards."""
        ...
