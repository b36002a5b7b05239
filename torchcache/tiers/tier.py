"""The interface of a tier, which stores rows by key: memory, disk, and a chain of tiers implement it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchcache.tiers.layout import Layout


class Rows(NamedTuple):
    """Rows of one layout: the answer to a request for some keys.

    Attributes:
        positions: int64 ``[F]``, ascending, on the CPU: the positions of their keys in the request. None: the rows of
            all keys, in order.
        layout: the layout of all rows.
        leaves: tensors ``[F, …]`` in the stored dtypes.
    """

    positions: Tensor | None
    layout: Layout
    leaves: list[Tensor]

    def __len__(self) -> int:
        return self.leaves[0].shape[0]


class TierStats(NamedTuple):
    """Counters of one tier.

    Attributes:
        rows: rows that the tier has, as far as this process has read.
        bytes: the size of the rows in memory, or of the files that this process has written.
        queued_rows: rows that wait to be written.
        damaged_rows: rows that failed their checksum.
        dropped_rows: rows that could not be written.
        full: whether a row was not stored for lack of space.
    """

    rows: int = 0
    bytes: int = 0
    queued_rows: int = 0
    damaged_rows: int = 0
    dropped_rows: int = 0
    full: bool = False


class Tier(Protocol):
    """Stores rows by keys: int64 ``[B, 2]`` on the CPU. Thread-safe.

    A fault of a disk, a server or a device is a miss and a warning, never an exception.
    """

    @property
    def name(self) -> str:
        """The name of the tier in messages and counters."""
        ...

    @property
    def is_on_host(self) -> bool:
        """Whether `write` needs leaves in host memory, so that rows of a GPU must be copied there first."""
        ...

    @property
    def is_described(self) -> bool:
        """Whether `describe` was called or is not needed."""
        ...

    def lookup(self, keys: Tensor) -> Tensor:
        """Which of these rows the tier has, in any layout, without reading them: bool ``[B]``."""
        ...

    def read(self, keys: Tensor, layout: Layout | None = None, pin: bool = False) -> Rows | None:
        """The rows of these keys that the tier has and that share one layout; None if there are none.

        Args:
            keys: int64 ``[B, 2]``.
            layout: the layout that they must have. None: that of the first row that the tier has.
            pin: read into pinned memory, for rows that are copied to a GPU next.
        """
        ...

    def write(self, keys: Tensor, layout: Layout, leaves: list[Tensor]) -> None:
        """Stores copies of the rows, as far as they fit. Rows that the tier already has stay as they are.

        Args:
            keys: int64 ``[B, 2]``.
            layout: the layout of all rows.
            leaves: tensors ``[B, …]`` in the stored dtypes.
        """
        ...

    def describe(self, meta: Mapping[str, Any]) -> None:
        """Stores metadata of the rows for people and ``explain()`` next to them. It is called before `write`."""
        ...

    def stats(self) -> TierStats:
        """The counters of the tier."""
        ...

    def flush(self) -> None:
        """Waits until every row is stored where it survives the process, or was dropped with a warning."""
        ...

    def clear(self) -> None:
        """Removes all rows, also those of other processes.

        Raises:
            OSError: the system does not permit it.
        """
        ...

    def close(self) -> None:
        """Flushes, and frees everything that no reader uses any more. Nothing is written afterwards."""
        ...
