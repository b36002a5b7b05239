"""The caches of module instances: what a patched forward does, and the handle in an instance's ``__dict__``."""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from torchcache._utils.locks import module_lock
from torchcache._utils.torch_private import compiled_module, untraced
from torchcache.engine.cache import Cache
from torchcache.frozen import HANDLE, ORIGINAL, freeze, is_frozen, patch_train
from torchcache.options import Options
from torchcache.overrides import ENABLED, Inner, Overrides, override, places

Forward = Callable[..., Any]

ONE_BREAK = (
    "torchcache looks rows up outside of the graph, so a cached module or function is one graph break: compile without "
    "fullgraph=True, or compile only what surrounds it"
)

_lock = module_lock(__name__)


def _no_module() -> None:
    return None


class Handle:
    """The caches of one instance, one for each forward. A copied or unpickled handle starts without rows."""

    def __init__(self, owner: type[nn.Module], options: Options | None, init: bytes) -> None:
        self.owner = owner
        self.options = options  # of the instance; None: those of its class
        self.init = init  # encoded init arguments
        self.caches: dict[Forward, Cache] = {}  # they do not refer to the module: it is freed with its last user
        self.overrides: Overrides | None = None  # as of the first call
        self.module: Callable[[], nn.Module | None] = _no_module  # the first module that uses the handle
        self.inner: Inner = {}

    def for_module(self, module: nn.Module) -> Handle:
        """This handle for its own module and replicas of it; a new handle for a shallow copy of the module."""
        if self.module is _no_module:
            inner = compiled_module(module)
            self.inner = {} if inner is None else inner.__dict__
            self.module = weakref.ref(module)
        if self.module() is module or "_is_replica" in module.__dict__:
            return self
        new = module.__dict__[HANDLE] = Handle(self.owner, self.options, self.init)
        return new.for_module(module)

    def update(self, module: nn.Module) -> None:
        """Puts ``torchcache_`` attributes into force that somebody set after the first call.

        Raises:
            ValueError: an attribute is unknown, wrong, or set too late.
        """
        now = Overrides(module.__dict__, places(module, self.inner))
        for cache in self.caches.values():
            cache.update_options()
        if is_frozen(module):
            freeze(module)
        self.overrides = now

    def __deepcopy__(self, memo: dict[int, Any]) -> Handle:
        return Handle(self.owner, self.options, self.init)

    def __reduce__(self) -> tuple[Any, ...]:
        return restore, (self.owner, self.options, self.init)


def restore(owner: type[nn.Module], options: Options | None, init: bytes) -> Handle:
    """Makes the handle of an unpickled instance, whose class nobody may have patched in this process."""
    if options is not None and not issubclass(owner, torch.jit.ScriptModule):
        patch_forward(owner, None)
    if options is None or options.frozen:
        patch_train(owner)
    return Handle(owner, options, init)


# ---- forwards


def patch_forward(cls: type[nn.Module], options: Options | None) -> None:
    """Makes the forward of a class dispatch. Without options it caches only instances that have a handle."""
    if isinstance(inspect.getattr_static(cls, "forward", None), (staticmethod, classmethod)):
        raise TypeError(
            f"the forward of {cls.__qualname__} must be a method of its instances: it is a static or class method"
        )
    with _lock:
        forward = cls.__dict__.get("forward")
        if forward is None or not hasattr(forward, ORIGINAL):
            forward = _dispatching(getattr(cls.forward, ORIGINAL, cls.forward))
            cls.forward = forward
        if options is not None:
            forward._torchcache_options = options
        if HANDLE not in cls.__dict__:
            setattr(cls, HANDLE, None)  # of instances that have none
        add_cache_instance(cls)


def add_cache_instance(cls: type[nn.Module]) -> None:
    """Gives a class the property that instances with a cache have."""
    if "cache_instance" not in cls.__dict__:
        cls.cache_instance = property(_cache_instance)  # type: ignore[attr-defined]
        unused = getattr(cls, "__jit_unused_properties__", [])  # or TorchScript would compile it
        cls.__jit_unused_properties__ = [*unused, "cache_instance"]  # type: ignore[attr-defined]


def _dispatching(original: Forward) -> Any:
    call, handle = _call, HANDLE

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # An attribute, not an item of the __dict__, for which torch.compile would make no guard.
        if getattr(self, handle) is not None or forward._torchcache_options is not None:  # type: ignore[attr-defined]
            return call(self, forward, original, args, kwargs)
        return original(self, *args, **kwargs)

    # TorchScript compiles the source of the original with the globals of its replacement.
    scope = getattr(original, "__globals__", globals())
    forward = types.FunctionType(forward.__code__, scope, closure=forward.__closure__)
    functools.update_wrapper(forward, original)
    forward._torchcache_options = None  # type: ignore[attr-defined]
    setattr(forward, ORIGINAL, original)
    return forward


@functools.partial(untraced, reason=ONE_BREAK)
def _call(module: nn.Module, forward: Forward, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the forward of a patched class."""
    cache = _checked_cache_of(module, forward)
    if cache is None:
        return original(module, *args, **kwargs)
    return cache.run(functools.partial(original, module), args, kwargs)


class InstanceForward:
    """Replaces the custom forward of an instance, such as a compiled or a patched module."""

    def __init__(self, module: nn.Module, original: Forward, options: Options | None = None) -> None:
        self.module: Callable[[], nn.Module | None] = weakref.ref(module)
        self.original = original
        self._torchcache_options = options
        setattr(self, ORIGINAL, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the original, row by row from the cache where it has them."""
        return self._call(args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]
        self.__dict__.update(state, module=_no_module if module is None else weakref.ref(module))

    @functools.partial(untraced, reason=ONE_BREAK)
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module()
        cache = None if module is None else _checked_cache_of(module, self)
        return self.original(*args, **kwargs) if cache is None else cache.run(self.original, args, kwargs)


def _checked_cache_of(module: nn.Module, forward: Any) -> Cache | None:
    """The same as `_cache_of`, after ``torchcache_`` attributes that somebody has set were put into force."""
    handle: Handle | None = module.__dict__.get(HANDLE)
    if handle is not None and handle.overrides is not None and not handle.overrides.hold(module.__dict__):
        handle.update(module)
    return _cache_of(module, forward)


def _cache_of(module: nn.Module, forward: Any) -> Cache | None:
    """The cache of this forward of the instance; None if it has none or is disabled."""
    attributes = module.__dict__
    handle: Handle | None = attributes.get(HANDLE)
    options = forward._torchcache_options
    if handle is None:
        if options is None:
            return None
        handle = attributes.setdefault(HANDLE, Handle(type(module), None, b""))
    if handle.module() is not module:
        handle = handle.for_module(module)
    options = handle.options or options
    if options is None:
        return None
    if not override(module, handle.inner, ENABLED, options.enabled):
        return None
    cache = handle.caches.get(forward)
    return _make_cache(module, forward, handle, options) if cache is None else cache


def _make_cache(module: nn.Module, forward: Any, handle: Handle, options: Options) -> Cache:
    with _lock:
        original = getattr(forward, ORIGINAL)
        takes_self = not isinstance(forward, InstanceForward)
        current = functools.partial(_options_of_live, weakref.ref(module), options)
        if handle.overrides is None:
            handle.overrides = Overrides(module.__dict__, places(module, handle.inner))
        return handle.caches.setdefault(forward, Cache(module, original, takes_self, handle.init, current))


def _options_of_live(module: Callable[[], nn.Module | None], options: Options) -> Options:
    target = module()
    return options if target is None else options_of(target, target.__dict__[HANDLE], options)


def options_of(module: nn.Module, handle: Handle, options: Options) -> Options:
    """The options that the attributes of a module and its classes give at present.

    Raises:
        ValueError: an attribute does not name an option, or its value is out of its range.
    """
    holders = (*places(module, handle.inner), module.__dict__)
    return options.with_attributes({k: v for holder in holders for k, v in holder.items()})


def _cache_instance(module: nn.Module) -> Cache:
    forwards = [module.__dict__.get("forward"), *(c.__dict__.get("forward") for c in type(module).__mro__)]
    forward = next((f for f in forwards if hasattr(f, ORIGINAL)), None)
    cache = None if forward is None else _cache_of(module, forward)
    if cache is None:
        raise AttributeError(f"{type(module).__name__} has no cache_instance: torchcache is disabled for it")
    return cache.held_with(module.__dict__[HANDLE].module())
