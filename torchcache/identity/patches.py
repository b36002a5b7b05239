"""Functions of libraries that somebody has replaced, such as ``F.scaled_dot_product_attention``."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn import functional

from torchcache.identity.origin import of_function, of_module, unwrap

# What was there when torchcache was imported.
_SHIPPED = {module: dict(vars(module)) for module in (functional, torch)}


def is_replaced(module: types.ModuleType, name: str, value: object) -> bool:
    """Whether a library did not ship this value under this name in one of its modules."""
    function = unwrap(value)
    is_foreign = isinstance(function, types.FunctionType) and of_function(function) != of_module(module.__name__)
    if isinstance(function, types.FunctionType) and of_function(function) is None:
        return True
    shipped = _SHIPPED.get(module)
    if shipped is None:
        return is_foreign
    is_new = shipped.get(name, value) is not value and callable(value)
    return is_new and (is_foreign or module is functional)  # torch._dynamo puts functions of torch into torch


def replaced(modules: Iterable[types.ModuleType]) -> dict[str, object]:
    """What somebody put into torch, or into these modules of libraries, in place of a function, by its name there."""
    found = {
        f"{module.__name__}.{name}": value
        for module in (*_SHIPPED, *modules)
        for name, value in sorted(vars(module).items())
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


def _is_users(value: object) -> bool:
    return isinstance(value, types.FunctionType) and of_function(value) is None
