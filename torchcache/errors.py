"""The exceptions of torchcache. For wrong arguments it raises ValueError and TypeError."""

from __future__ import annotations

from collections.abc import Sequence


class TorchcacheError(Exception):
    """The base class of all exceptions of torchcache."""


class MissingRows(TorchcacheError, LookupError):
    """Rows are in no tier.

    Attributes:
        positions: the positions of these rows in the request, such as in the indices of ``CachedRows.__getitems__``.
    """

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)


class WrongRow(TorchcacheError):
    """With ``verify="strict"``: a row differs from what the forward computes. The message says how much, and why."""


class MaintenanceError(TorchcacheError):
    """An operation on a cache directory is impossible. The message says why."""


class BuildError(TorchcacheError, ImportError):
    """The native library is missing and cannot be compiled. The message says what to install."""
