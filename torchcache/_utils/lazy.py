"""Properties that are computed when they are first read.

Before Python 3.12 functools.cached_property has a lock, which stays locked in a child that is forked meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")


class remembered(Generic[T]):
    """A cheap property: two threads that read it first at the same time may both compute it."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type[Any], name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type[Any]) -> remembered[T]: ...
    @overload
    def __get__(self, instance: object, owner: type[Any]) -> T: ...
    def __get__(self, instance: object | None, owner: type[Any]) -> remembered[T] | T:
        return self if instance is None else self._value(instance)

    def _value(self, instance: Any) -> T:
        value = self._compute(instance)
        instance.__dict__[self._name] = value
        return value


class lazy(remembered[T]):
    """A property that only one thread computes, under the object's ``_lock``."""

    def _value(self, instance: Any) -> T:
        with instance._lock:
            if self._name in instance.__dict__:
                value: T = instance.__dict__[self._name]
                return value
            return super()._value(instance)
