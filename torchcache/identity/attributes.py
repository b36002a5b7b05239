"""Which attributes count: the only list of those that have no influence on what a module or function computes."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchcache.options import ATTRIBUTE_PREFIX

# Of the attributes of every module, parameters, buffers, submodules, forward hooks and the mode count, but not as
# attributes; the others concern only training and loading.
TENSORS_AND_MODULES = ("_parameters", "_buffers", "_modules")
FORWARD_HOOKS = ("_forward_pre_hooks", "_forward_hooks")

_CACHE = "cache_instance"
_OF_EVERY_MODULE = frozenset((*vars(nn.Module()), _CACHE))
# Those of torchcache, and those in which torch.compile counts compilations.
_PREFIXES = ("_torchcache", ATTRIBUTE_PREFIX, "_torchdynamo_")


def counts(name: str) -> bool:
    """Whether the attribute of this name counts in a class or function."""
    return not name.startswith(_PREFIXES) and name != _CACHE


def counts_in_module(name: str) -> bool:
    """Whether the attribute of this name counts in the ``__dict__`` of a module."""
    return name not in _OF_EVERY_MODULE and not name.startswith(_PREFIXES)


def counted(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that count, without those of its class."""
    # One loop without calls: every miss runs it.
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _OF_EVERY_MODULE and not name.startswith(_PREFIXES)
    }
