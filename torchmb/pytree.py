"""Tensors in tuples, lists, dicts, dataclasses and whatever else is a pytree: take them out, put others in."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .torch_private import map_children


class Place(NamedTuple):
    """Where a tensor was."""

    number: int


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with each leaf replaced. Leaves are what pytrees and dataclasses are made of in the end."""
    kind = type(value)
    if kind in _PLAIN:  # by far the most frequent, and ten times faster than as a pytree
        return function(value)
    if kind is tuple:
        return tuple([map_leaves(function, x) for x in value])
    if kind is list:
        return [map_leaves(function, x) for x in value]
    if kind is dict:
        return {key: map_leaves(function, x) for key, x in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return _map_fields(function, value)
    mapped = map_children(lambda child: map_leaves(function, child), value)
    return function(value) if mapped is NotImplemented else mapped


_PLAIN = {Tensor, nn.Parameter, Place, int, float, bool, str, type(None)}


def _map_fields(function: Callable[[Any], Any], value: Any) -> Any:
    new = copy.copy(value)
    for field in fields(value):
        if hasattr(value, field.name):
            object.__setattr__(new, field.name, map_leaves(function, getattr(value, field.name)))
    return new


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    return map_leaves(lambda x: function(x) if isinstance(x, Tensor) else x, value)


def take(value: Any) -> tuple[list[Tensor], Any]:
    """The tensors of `value`, and what remains, for `put`."""
    tensors: list[Tensor] = []

    def out(x: Tensor) -> Place:
        tensors.append(x)
        return Place(len(tensors) - 1)

    return tensors, map_tensors(out, value)


def put(rest: Any, tensors: Sequence[Any]) -> Any:
    """The inverse of `take`, with other tensors."""
    return map_leaves(lambda x: tensors[x.number] if isinstance(x, Place) else x, rest)


def stack(values: Sequence[Any]) -> tuple[Any, bool]:
    """One value for each model → one whose tensors have a leading dimension of models, and True.

    If tensors of different shapes, or other leaves that differ, forbid that: the list of all values, and False.
    """
    taken = [take(v) for v in values]
    first, rest = taken[0]
    for tensors, other in taken[1:]:
        if (
            len(tensors) != len(first)
            or not same(other, rest)
            or any(_kind(a) != _kind(b) for a, b in zip(tensors, first))
        ):
            return list(values), False
    return put(rest, [torch.stack(column) for column in zip(*(tensors for tensors, _ in taken))]), True


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def same(a: Any, b: Any) -> bool:
    """Whether two values without tensors are equal; not if they cannot say."""
    try:
        return a is b or bool(a == b)
    except Exception:  # whatever a foreign __eq__ raises
        return False
