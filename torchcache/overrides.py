"""Notices on every call, for a fraction of a microsecond, that somebody set a ``torchcache_`` attribute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchcache.options import ATTRIBUTE_PREFIX

_ABSENT = object()


class Overrides:
    """The ``torchcache_`` attributes of a module and its classes, or of a function, when they were last accepted.

    Args:
        attributes: the ``__dict__`` of the module or function. It is not kept: it holds what holds this object.
        others: where attributes may be set, too.
    """

    __slots__ = ("_is_set", "_last", "_other_sizes", "_other_values", "_others", "_size", "_values")

    def __init__(self, attributes: dict[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> None:
        self._others = others
        self.accept(attributes)

    def accept(self, attributes: dict[str, Any]) -> None:
        """Takes the present attributes for the accepted ones."""
        self._other_values = [(d, _given(d)) for d in self._others]
        self._values = _given(attributes)
        self._is_set = bool(self._values) or any(values for _, values in self._other_values)
        self._note_sizes(attributes)

    def hold(self, attributes: dict[str, Any]) -> bool:
        """Whether the attributes are still those that were accepted."""
        if (
            len(attributes) == self._size
            and next(reversed(attributes), None) is self._last
            and list(map(len, self._others)) == self._other_sizes
        ):
            return not self._is_set or self._values_hold(attributes)
        places = [(attributes, self._values), *self._other_values]
        if any(_given(d).keys() != values.keys() for d, values in places):
            return False
        self._note_sizes(attributes)
        return self._values_hold(attributes)

    def _note_sizes(self, attributes: dict[str, Any]) -> None:
        """An attribute that is added to a dict makes it larger, or is the last one in it."""
        self._size, self._last = len(attributes), next(reversed(attributes), None)
        self._other_sizes = list(map(len, self._others))

    def _values_hold(self, attributes: dict[str, Any]) -> bool:
        places = [(attributes, self._values), *self._other_values]
        return all(d.get(name, _ABSENT) is value for d, values in places for name, value in values.items())


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name.startswith(ATTRIBUTE_PREFIX)}
