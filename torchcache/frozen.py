"""Modules that stay in eval mode and whose parameters do not require grad, whatever ``train()`` is called."""

from __future__ import annotations

import functools

from torch import nn

from torchcache._utils.locks import module_lock
from torchcache.options import Options
from torchcache.overrides import FROZEN, override

HANDLE = "_torchcache_handle"  # the attribute of an instance with its caches; of a patched class: None
ORIGINAL = "__torchcache_original__"  # the attribute of a patched function with what it replaced

_lock = module_lock(__name__)


def patch_train(cls: type[nn.Module]) -> None:
    """Makes ``train()`` of a class freeze the instances that are to stay frozen. Others keep their ``train()``."""
    with _lock:
        own = cls.__dict__.get("train")
        if own is not None and hasattr(own, ORIGINAL):
            return
        original = cls.train

        @functools.wraps(original)
        def train(self: nn.Module, mode: bool = True) -> nn.Module:
            if not is_frozen(self):
                return original(self, mode)
            original(self, False)
            for parameter in self.parameters():  # scripted modules and uninitialized parameters refuse requires_grad_
                parameter.requires_grad = False
            return self

        setattr(train, ORIGINAL, own)
        cls.train = train  # type: ignore[assignment, method-assign]


def freeze(module: nn.Module) -> None:
    """Freezes a module for which `is_frozen` holds, now and at each later ``train()``."""
    patch_train(type(module))
    module.train(False)


def is_frozen(module: nn.Module) -> bool:
    """Whether an option or attribute says that a decorated module is to stay frozen."""
    handle = module.__dict__.get(HANDLE)
    if handle is None:
        return False
    options = handle.options or _options_of_class(type(module))
    return options is not None and bool(override(module, handle.inner, FROZEN, options.frozen))


def _options_of_class(cls: type[nn.Module]) -> Options | None:
    """Those of its decorated forward, also where a subclass has another forward that calls it."""
    options = (getattr(c.__dict__.get("forward"), "_torchcache_options", None) for c in cls.__mro__)
    return next(filter(None, options), None)
