"""A cached property for objects with a lock."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

T = TypeVar("T")


class lazy(functools.cached_property[T]):
    """A cached property that is computed once, whichever thread comes first; the object's ``_lock`` sees to that."""

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> T:  # type: ignore[override]
        with instance._lock:
            value: T = super().__get__(instance, owner)
            return value
