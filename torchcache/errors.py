"""What torchcache raises, besides ValueError and TypeError for wrong arguments."""

from __future__ import annotations

from collections.abc import Sequence


class TorchcacheError(Exception):
    """What all errors of torchcache have in common."""


class MissingRows(TorchcacheError, LookupError):
    """Rows that no tier has.

    Attributes:
        places: the positions of these rows among those that were asked for.
    """

    def __init__(self, message: str, places: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


class MaintenanceError(TorchcacheError):
    """A cache directory cannot be looked at, or not as asked. The message says why."""


class BuildError(TorchcacheError, ImportError):
    """The native library is not there and cannot be compiled. The message says what to install."""
