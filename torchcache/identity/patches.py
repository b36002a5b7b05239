"""Functions of libraries that somebody has replaced, such as ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from torchcache.identity.origin import of_function, of_module, unwrap


def _is_users(value: object) -> bool:
    function = unwrap(value)
    return isinstance(function, types.FunctionType) and of_function(function) is None


# What torch itself had put there when torchcache was imported.
_SHIPPED = {
    module: {name: value for name, value in vars(module).items() if not _is_users(value)}
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
    found = {
        f"{module.__name__}.{name}": value
        for module in (*_SHIPPED, *modules)
        for name, value in sorted(vars(module).items())
        if _SHIPPED.get(module, {}).get(name) is not value
        if not isinstance(value, (type, types.ModuleType)) and is_replaced(module, name, value)
    }
    methods = {f"Tensor.{name}": value for name, value in vars(torch.Tensor).items() if _is_users(value)}
    return {**found, **methods}


def homes(modules: Iterable[nn.Module]) -> list[types.ModuleType]:
    """The modules of libraries, other than torch, that define the classes of these modules."""
    names = dict.fromkeys(type(m).__module__ for m in modules)
    return [module for name in names if not name.startswith("torch.") and (module := of_library(name)) is not None]


def of_library(name: str) -> types.ModuleType | None:
    """An imported module, if it belongs to a library."""
    module = sys.modules.get(name)
    return None if module is None or of_module(name) is None else module
