"""One call: its arguments, its batch, and what it has in common with other calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from torchcache._utils.torch_private import versions
from torchcache.tiers.layout import select


class CallTemplate:
    """What calls have in common that differ in nothing but the elements of their tensors."""

    __slots__ = ("batch", "description", "names", "order", "parts", "positions")

    def __init__(self, batch: int, names: list[str], parts: list[bytes], positions: Tensor | None) -> None:
        self.batch = batch
        self.names = names  # of what the parts describe
        self.parts = parts
        self.description = b"".join(parts)  # of everything but the rows; see docs/format.md
        self.positions = positions  # int64 [B, N], to be hashed with the rows; None: nothing
        self.order: list[int] | None = None  # signature order of the tensors as they are passed; None: the same


class Call:
    """The bound arguments of one call."""

    __slots__ = ("args", "batch", "kwargs", "template", "tensors")

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor], template: CallTemplate
    ) -> None:
        self.args = args
        self.kwargs = kwargs
        self.tensors = tensors  # [B, …] each, in signature order
        self.template = template
        self.batch = template.batch

    @property
    def device(self) -> torch.device:
        """The device of the first tensor, to which outputs go."""
        return self.tensors[0].device

    @property
    def device_type(self) -> str:
        """The same without the index of the device."""
        first = self.tensors[0]
        return "cpu" if first.is_cpu else first.device.type  # naming a device takes longer than asking for one

    def select(self, rows: Tensor, copy: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with only these rows (int64, ascending, on the CPU) of every tensor.

        Args:
            rows: positions in the batch.
            copy: the function may edit its inputs: they must not be those of the caller.

        Raises:
            Indivisible: an argument holds tensors and cannot be copied with others in their place.
        """
        on_device: dict[torch.device, Tensor] = {}
        first, last = int(rows[0]), int(rows[-1])
        is_range = last - first + 1 == len(rows)  # then no copy is needed

        def pick(t: Tensor) -> Tensor:
            if is_range:
                part = t.narrow(0, first, len(rows))
                return part.clone() if copy else part
            if t.device not in on_device:
                on_device[t.device] = rows.to(t.device)
            return select(t, on_device[t.device])

        args = tuple(map_tensors(a, pick) for a in self.args)
        return args, {name: map_tensors(a, pick) for name, a in self.kwargs.items()}

    def versions(self) -> list[object] | None:
        """What changes when the tensors are edited; None where torch does not count edits."""
        return None if any(t.is_inference() for t in self.tensors) else versions(self.tensors)


class Indivisible(Exception):
    """An argument of which no copy with fewer rows can be made."""


def holds_tensor(value: Mapping[Any, Any] | Sequence[Any]) -> bool:
    """Whether a container holds a tensor, at any depth."""
    items = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(v, Tensor) or (isinstance(v, (Mapping, tuple, list)) and holds_tensor(v)) for v in items)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The argument with every tensor in it replaced, containers copied, their types kept."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping) and holds_tensor(value):
        return _map_mapping(value, function)
    if isinstance(value, (tuple, list)) and holds_tensor(value):
        items = [map_tensors(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _map_mapping(value: Mapping[Any, Any], function: Callable[[Tensor], Tensor]) -> Any:
    mapped = {key: map_tensors(item, function) for key, item in value.items()}
    if type(value) is dict:
        return mapped
    if not isinstance(value, MutableMapping):
        raise Indivisible
    result = copy(value)
    before = dict(value)
    for key, item in mapped.items():
        result[key] = item
    if any(value[key] is not item for key, item in before.items()):  # a copy that shares what it holds
        for key, item in before.items():
            result[key] = item
        raise Indivisible
    return result
