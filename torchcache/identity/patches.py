"""Functions of libraries that somebody has replaced, such as ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from torchcache.identity.origin import is_users, of_function, of_module, unwrap

# What torch itself had put there when torchcache was imported.
_SHIPPED = {
    module: {name: value for name, value in vars(module).items() if not is_users(value)}
    for module in (functional, torch)
}


def is_replaced(module: types.ModuleType, name: str, value: object) -> bool:
    """Whether a library did not ship this value under this name in one of its modules."""
    shipped = _SHIPPED.get(module)
    if shipped is not None and shipped.get(name) is value:
        return False
    function = unwrap(value)
    is_function = isinstance(function, types.FunctionType)
    is_foreign = is_function and of_function(function) != of_module(module.__name__)  # type: ignore[arg-type]
    return is_foreign or (module is functional and callable(value))  # torch puts functions of torch into torch


def replaced(modules: Iterable[types.ModuleType]) -> dict[str, object]:
    """What somebody put into torch, or into these modules of libraries, in place of a function, by its name there."""
    found = {}
    for module in (*_SHIPPED, *modules):
        shipped = _SHIPPED.get(module, {})
        for name, value in [item for item in vars(module).items() if shipped.get(item[0]) is not item[1]]:
            if not isinstance(value, (type, types.ModuleType)) and is_replaced(module, name, value):
                found[f"{module.__name__}.{name}"] = value
    methods = {f"Tensor.{name}": value for name, value in vars(torch.Tensor).items() if is_users(value)}
    return dict(sorted({**found, **methods}.items()))


def homes(modules: Iterable[nn.Module]) -> list[types.ModuleType]:
    """The modules of libraries, other than torch, that define the classes of these modules."""
    names = dict.fromkeys(type(m).__module__ for m in modules)
    return [module for name in names if not name.startswith("torch.") and (module := of_library(name)) is not None]


def of_library(name: str) -> types.ModuleType | None:
    """An imported module, if it belongs to a library."""
    module = sys.modules.get(name)
    return None if module is None or of_module(name) is None else module
