"""The ``torchcache_`` attributes of modules and functions, which override options, and whether somebody has set one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from torchcache.options import ATTRIBUTE_PREFIX

ENABLED = ATTRIBUTE_PREFIX + "enabled"
FROZEN = ATTRIBUTE_PREFIX + "frozen"
_ABSENT = object()

# The attributes of the module inside of one that torch.compile made, which sets its own there; {} for other modules.
Inner = Mapping[str, Any]


class Overrides:
    """The ``torchcache_`` attributes of a module or function at one time.

    Args:
        attributes: the ``__dict__`` of the module or function. It is not kept: it holds what holds this object.
        others: where attributes may be set, too.
    """

    __slots__ = ("_last", "_other_sizes", "_other_values", "_others", "_size", "_values")

    def __init__(self, attributes: dict[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> None:
        self._note_sizes(attributes, others)  # first: what another thread adds meanwhile is noticed
        self._values = _given(attributes)
        self._other_values = [(d, name, value) for d in others for name, value in _given(d).items()]

    def hold(self, attributes: dict[str, Any]) -> bool:
        """Whether the attributes are still the same. Every call asks, so the usual case takes a fraction of a µs."""
        if (
            len(attributes) != self._size
            or next(reversed(attributes), None) is not self._last
            or list(map(len, self._others)) != self._other_sizes
        ):
            if self._has_new(attributes):
                return False
            self._note_sizes(attributes, self._others)
        for name, value in self._values.items():
            if attributes.get(name, _ABSENT) is not value:
                return False
        others = self._other_values
        return not others or all(other.get(name, _ABSENT) is value for other, name, value in others)

    def _has_new(self, attributes: dict[str, Any]) -> bool:
        known = {(id(other), name) for other, name, _ in self._other_values}
        new = any((id(d), name) not in known for d in self._others for name in _given(d))
        return new or not _given(attributes).keys() <= self._values.keys()

    def _note_sizes(self, attributes: dict[str, Any], others: Sequence[Mapping[str, Any]]) -> None:
        """What is added to a dict makes it larger, or is the last in it."""
        self._size, self._last = len(attributes), next(reversed(attributes), None)
        self._others, self._other_sizes = others, list(map(len, others))


def override(module: nn.Module, inner: Inner, name: str, option: bool) -> Any:
    """An attribute of a module or its class, without a look at all the others; `option` if there is none."""
    value = module.__dict__.get(name)
    if value is None:
        value = inner.get(name)
    return getattr(type(module), name, option) if value is None else value


def places(module: nn.Module, inner: Inner) -> list[Mapping[str, Any]]:
    """Where attributes of a module may be set apart from its ``__dict__``, those first that count less."""
    return [*(vars(c) for c in reversed(type(module).__mro__) if c not in (nn.Module, object)), inner]


def _given(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if name.startswith(ATTRIBUTE_PREFIX)}
