"""Whether modules have the same architecture, and so differ only in the values of parameters and buffers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import type_before_parametrizations

from .pytree import equal
from .state import Absent, named_tensors, plain_attributes

_ATOMS = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def check_same_architecture(modules: Sequence[nn.Module]) -> None:
    """Compares types of submodules, properties of tensors, and attributes that are numbers, strings or tuples of them.

    Other attributes and the mode may differ.

    Raises:
        ValueError: Two modules differ. The message names the first difference.
    """
    first = _describe(modules[0])
    for i, module in enumerate(modules):
        other = _describe(module)
        for name in first | other:
            a, b = first.get(name, Absent), other.get(name, Absent)
            if not equal(a, b) and (_is_compared(a) or _is_compared(b)):
                raise ValueError(_difference(name, a, b, i))


class _Kind:
    """Stands for the value of an attribute that is not compared."""

    def __init__(self, value: Any) -> None:
        self.type = type(value)


def _describe(root: nn.Module) -> dict[str, Any]:
    """Name of each property to compare → its value; the type of the root has the name ""."""
    modules = dict(root.named_modules(remove_duplicate=False))
    found: dict[str, Any] = {name: type_before_parametrizations(module) for name, module in modules.items()}
    names: dict[int, str] = {}
    for name, tensor in named_tensors(root).items():
        found[name] = "lazy" if is_lazy(tensor) else tuple(tensor.shape)
        found |= {f"{name}.{key}": getattr(tensor, key) for key in ("dtype", "device", "requires_grad")}
        found[f"the tensor that {name} is tied to"] = names.get(id(tensor))
        names.setdefault(id(tensor), name)
    for path, module in modules.items():
        for name, value in plain_attributes(module).items():
            found[f"{path}.{name}" if path else name] = value if _is_plain(value) else _Kind(value)
    return found


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, tuple) else isinstance(value, _ATOMS)


def _is_compared(value: Any) -> bool:
    return value is not Absent and not isinstance(value, _Kind)


def _difference(name: str, first: Any, other: Any, i: int) -> str:
    a, b = _show(first), _show(other)
    if a == b and isinstance(first, type) and isinstance(other, type):
        a, b = (f"a {cls.__module__}.{cls.__qualname__}" for cls in (first, other))
        a = f"{a} of an earlier definition" if a == b else a
    if not name:
        return f"module {i} is {b}, module 0 {a}"
    if first is Absent or other is Absent:
        without, present, value = (0, i, b) if first is Absent else (i, 0, a)
        return f"module {without} has no {name}, which is {value} in module {present}"
    return f"{name} is {a} in module 0, {b} in module {i}"


def _show(value: Any) -> str:
    if isinstance(value, _Kind):
        return f"a {value.type.__name__}"
    return f"a {value.__name__}" if isinstance(value, type) else repr(value)
