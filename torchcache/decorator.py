"""The decorator: patches a class, an existing instance or a function; nothing else.

It patches a class in place, so its name, pickling, ``super()`` and ``isinstance`` work as before.
"""

from __future__ import annotations

import functools
import os
import types
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from torchcache._utils.torch_private import untraced
from torchcache.engine.cache import Cache
from torchcache.engine.dimensions import warn_of_sequence_first
from torchcache.frozen import HANDLE, ORIGINAL, freeze, is_frozen, patch_train
from torchcache.identity.identity import init_arguments
from torchcache.instances import (
    ONE_BREAK,
    Handle,
    InstanceForward,
    add_cache_instance,
    options_of,
    patch_forward,
    restore,
)
from torchcache.options import Options
from torchcache.overrides import ENABLED, Overrides

T = TypeVar("T")
Forward = Callable[..., Any]

_restore, _InstanceForward = restore, InstanceForward  # what modules that version 1.0 pickled look for here


def torchcache(
    *,
    enabled: bool = True,
    memory_cache_device: str | torch.device = "cpu",
    subsample_count: int = 10000,
    persistent: bool = False,
    persistent_cache_dir: str | os.PathLike[str] | None = None,
    persistent_module_hash: str | None = None,
    max_persistent_cache_size: float = int(10e9),
    max_memory_cache_size: float = int(1e9),
    zstd_compression: bool = False,
    zstd_compression_level: int = 3,
    zstd_compression_threads: int = 1,
    cache_dtype: torch.dtype | None = None,
    use_mmap_on_load: bool = False,
    subsample: bool = False,
    frozen: bool = False,
    verify: float | str = 0.01,
) -> Callable[[T], T]:
    """Caches the outputs of a module class, a module instance or a function, row by row.

    All tensor arguments, and all tensors of the output, must have the same batch size B in dimension 0. Each distinct
    row is computed once. Outputs are detached. ::

        >>> @torchcache.torchcache()
        ... class Backbone(nn.Module):
        ...     def forward(self, x):
        ...         return x * 2
        >>> backbone = Backbone()
        >>> backbone(torch.ones(2, 3))
        tensor([[2., 2., 2.],
                [2., 2., 2.]])
        >>> info = backbone.cache_instance.info()
        >>> info.misses, info.memory_hits
        (1, 1)

    The second row is equal to the first, so it is a hit.

    Args:
        enabled: whether to cache. The attribute ``torchcache_enabled`` of an instance overrides it at any time.
        memory_cache_device: the device of the rows in memory.
        subsample_count: how many elements of a row are hashed with ``subsample=True``.
        persistent: store rows on disk, too, for other processes and later runs.
        persistent_cache_dir: the directory. None: a temporary one, which is deleted at a normal exit.
        persistent_module_hash: the name of the subdirectory, instead of the module hash. Rows then stay valid,
            whatever changes in the code, the arguments and the weights.
        max_persistent_cache_size: the limit for the files that this process writes, in bytes.
        max_memory_cache_size: the limit for rows in memory, in bytes.
        zstd_compression: compress rows on disk with zstd (needs ``persistent=True``).
        zstd_compression_level: -131072 (fastest) to 22 (smallest).
        zstd_compression_threads: 1 to 256.
        cache_dtype: the floating-point dtype of stored rows. Outputs have the original dtype.
        use_mmap_on_load: read files through a memory map.
        subsample: hash only about ``subsample_count`` elements of a row. Rows that differ only in other elements
            count as equal, so use it only for inputs where this cannot happen.
        frozen: freeze the module: its parameters do not require grad, and it stays in eval mode, whatever ``train()``
            is called on it or on a module that contains it. Not for functions.

        verify: the share of the time, 0 to 1, in which rows are computed again and compared with the cached ones, once
            1,000 rows were asked for. If one is wrong, a warning says why, and such calls are not cached any more.
            0: no checks; 1: one in every call; ``"strict"``: 0.01, and a wrong row raises
            `torchcache.errors.WrongRow`. The environment variable ``TORCHCACHE_VERIFY`` overrides it.

    Returns:
        A decorator. It patches a class or an instance in place and returns it; it wraps a function.

    Raises:
        ValueError: an option is out of its range, or is not for what is decorated.
        TypeError: the decorated object is not an nn.Module subclass, an instance of one, or a function.
    """
    options = Options.checked(**locals())

    def decorate(target: T) -> T:
        if isinstance(target, type):
            if not issubclass(target, nn.Module):
                raise _wrong_target(target.__name__)
            _patch_class(target, options)
            return target
        if isinstance(target, nn.Module):
            return _patch_instance(target, options)
        if isinstance(target, types.FunctionType):
            return _wrap_function(target, options)  # type: ignore[return-value]
        raise _wrong_target(repr(target))

    return decorate


def _wrong_target(name: str) -> TypeError:
    return TypeError(
        "torchcache can only decorate nn.Module subclasses, instances of them, and functions defined in Python; "
        f"got {name}"
    )


# ---- classes and instances


def _patch_class(cls: type[nn.Module], options: Options) -> None:
    patch_forward(cls, options)
    patch_train(cls)
    original = cls.__init__
    if hasattr(original, ORIGINAL) and "__init__" in cls.__dict__:
        return

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        is_outermost = HANDLE not in self.__dict__
        if is_outermost:  # before __init__ can change the arguments, and before nn.Module's own __init__
            init = init_arguments(type(self).__qualname__, args, kwargs)
            self.__dict__[HANDLE] = Handle(type(self), None, init)
        original(self, *args, **kwargs)
        if is_outermost:
            options_of(self, self.__dict__[HANDLE], options)  # wrong torchcache_ attributes raise now, not at a call
            if is_frozen(self):
                freeze(self)
            warn_of_sequence_first(self, type(self))
            forward = self.__dict__.get("forward")
            if forward is not None and not hasattr(forward, ORIGINAL):
                self.__dict__["forward"] = InstanceForward(self, forward, options)

    setattr(__init__, ORIGINAL, original)
    cls.__init__ = __init__  # type: ignore[method-assign]


def _patch_instance(module: T, options: Options) -> T:
    assert isinstance(module, nn.Module)
    handle = Handle(type(module), options, b"").for_module(module)
    options_of(module, handle, options)
    custom = module.__dict__.get("forward")
    if isinstance(module, torch.jit.ScriptModule):
        custom = module.forward  # compiled for this instance; its class has none
        add_cache_instance(type(module))
    else:
        patch_forward(type(module), None)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.cls_to_become is not None:
        patch_forward(module.cls_to_become, None)  # its class from the first call on
    module.__dict__[HANDLE] = handle
    warn_of_sequence_first(module, object())
    if custom is not None:
        module.__dict__["forward"] = InstanceForward(module, custom)
    if is_frozen(module):
        freeze(module)
    return module


# ---- functions


def _wrap_function(function: types.FunctionType, options: Options) -> Forward:
    attributes: dict[str, Any] = {}  # of the wrapper, to which neither itself nor its cache refers
    overrides = Overrides(attributes)

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        nonlocal overrides
        if not overrides.hold(attributes):
            now = Overrides(attributes)
            cache.update_options()
            overrides = now
        if not attributes.get(ENABLED, options.enabled):
            return function(*args, **kwargs)
        return cache.run(function, args, kwargs)

    attributes.update(cached.__dict__)
    cached.__dict__ = attributes
    setattr(cached, ORIGINAL, function)
    untraced(cached, ONE_BREAK)
    current = functools.partial(_options_of_function, weakref.ref(cached), options)
    current()  # wrong ones raise now
    cache = Cache(function, function, False, b"", current)
    if options.enabled:
        cached.cache_instance = cache  # type: ignore[attr-defined]
    overrides = Overrides(attributes)
    return cached


def _options_of_function(wrapper: Callable[[], Forward | None], options: Options) -> Options:
    cached = wrapper()
    now = options if cached is None else options.with_attributes(cached.__dict__)
    if now.frozen:
        raise ValueError(
            "frozen=True is for modules: a function has no train or eval mode; decorate the module that it calls, or "
            "call eval() and requires_grad_(False) on it"
        )
    return now
