"""The mark of an argument that all models share."""

from __future__ import annotations

from typing import Any


class Shared:
    """See `shared`."""

    def __init__(self, value: Any) -> None:
        self.value = value


def shared(value: Any) -> Any:
    """An argument that all models see: a tensor as one model takes it, (B, …), or a nest of them.

    It is not copied M times; a linear layer on it is one matrix product for all models.
    """
    return Shared(value)
