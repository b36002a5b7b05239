"""The decorator: patches a class, an existing instance or a function; nothing else.

It patches a class in place, so its name, pickling, ``super()`` and ``isinstance`` work as before. The caches of an
instance are in one handle in its ``__dict__``.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from torchcache._utils.locks import module_lock
from torchcache._utils.torch_private import compiled_module, untraced
from torchcache.engine.cache import Cache
from torchcache.engine.dimensions import warn_of_sequence_first
from torchcache.identity.identity import init_arguments
from torchcache.options import ATTRIBUTE_PREFIX, Options
from torchcache.overrides import Overrides

T = TypeVar("T")
Forward = Callable[..., Any]

_HANDLE = "_torchcache_handle"
_ORIGINAL = "__torchcache_original__"
_ENABLED = ATTRIBUTE_PREFIX + "enabled"
_FROZEN = ATTRIBUTE_PREFIX + "frozen"
_ONE_BREAK = (
    "torchcache looks rows up outside of the graph, so a cached module or function is one graph break: compile without "
    "fullgraph=True, or compile only what surrounds it"
)

_lock = module_lock(__name__)


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


def _no_module() -> None:
    return None


class _Handle:
    """The caches of one instance, one for each forward. A copied or unpickled handle starts without rows."""

    def __init__(self, owner: type[nn.Module], options: Options | None, init: bytes) -> None:
        self.owner = owner
        self.options = options  # of the instance; None: those of its class
        self.init = init  # encoded init arguments
        self.caches: dict[Forward, Cache] = {}  # they do not refer to the module: it is freed with its last user
        self.overrides: Overrides | None = None  # as of the first call
        self.module: Callable[[], nn.Module | None] = _no_module  # the first module that uses the handle
        self.inner: Mapping[str, Any] = {}  # the attributes of a module inside of a compiled one, which sets them there

    def for_module(self, module: nn.Module) -> _Handle:
        """This handle for its own module and replicas of it; a new handle for a shallow copy of the module."""
        if self.module is _no_module:
            inner = compiled_module(module)
            self.inner = {} if inner is None else inner.__dict__
            self.module = weakref.ref(module)
        if self.module() is module or "_is_replica" in module.__dict__:
            return self
        new = module.__dict__[_HANDLE] = _Handle(self.owner, self.options, self.init)
        return new.for_module(module)

    def update(self, module: nn.Module) -> None:
        """Puts ``torchcache_`` attributes into force that somebody set after the first call.

        Raises:
            ValueError: an attribute is unknown, wrong, or set too late.
        """
        for cache in self.caches.values():
            cache.update_options()
        if _is_frozen(module):
            _freeze(module)
        self.overrides = Overrides(module.__dict__, _places(module, self))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handle:
        return _Handle(self.owner, self.options, self.init)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.owner, self.options, self.init)


def _restore(owner: type[nn.Module], options: Options | None, init: bytes) -> _Handle:
    if options is not None and not issubclass(owner, torch.jit.ScriptModule):
        _patch_forward(owner, None)
    if options is None or options.frozen:
        _patch_train(owner)
    return _Handle(owner, options, init)


# ---- classes and instances


def _patch_class(cls: type[nn.Module], options: Options) -> None:
    _patch_forward(cls, options)
    _patch_train(cls)
    original = cls.__init__
    if hasattr(original, _ORIGINAL) and "__init__" in cls.__dict__:
        return

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        is_outermost = _HANDLE not in self.__dict__
        if is_outermost:  # before __init__ can change the arguments, and before nn.Module's own __init__
            init = init_arguments(type(self).__qualname__, args, kwargs)
            self.__dict__[_HANDLE] = _Handle(type(self), None, init)
        original(self, *args, **kwargs)
        if is_outermost:
            _options_of(self, self.__dict__[_HANDLE], options)  # wrong torchcache_ attributes raise now, not at a call
            if _is_frozen(self):
                _freeze(self)
            warn_of_sequence_first(self, type(self))
            forward = self.__dict__.get("forward")
            if forward is not None and not hasattr(forward, _ORIGINAL):
                self.__dict__["forward"] = _InstanceForward(self, forward, options)

    setattr(__init__, _ORIGINAL, original)
    cls.__init__ = __init__  # type: ignore[method-assign]


def _patch_instance(module: T, options: Options) -> T:
    assert isinstance(module, nn.Module)
    handle = _Handle(type(module), options, b"").for_module(module)
    _options_of(module, handle, options)
    custom = module.__dict__.get("forward")
    if isinstance(module, torch.jit.ScriptModule):
        custom = module.forward  # compiled for this instance; its class has none
        _add_cache_instance(type(module))
    else:
        _patch_forward(type(module), None)
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.cls_to_become is not None:
        _patch_forward(module.cls_to_become, None)  # its class from the first call on
    module.__dict__[_HANDLE] = handle
    warn_of_sequence_first(module, object())
    if custom is not None:
        module.__dict__["forward"] = _InstanceForward(module, custom)
    if _is_frozen(module):
        _freeze(module)
    return module


def _patch_forward(cls: type[nn.Module], options: Options | None) -> None:
    """Makes the forward of a class dispatch. Without options it caches only instances that have a handle."""
    if isinstance(inspect.getattr_static(cls, "forward", None), (staticmethod, classmethod)):
        raise TypeError(
            f"the forward of {cls.__qualname__} must be a method of its instances: it is a static or class method"
        )
    with _lock:
        forward = cls.__dict__.get("forward")
        if forward is None or not hasattr(forward, _ORIGINAL):
            forward = _dispatching(getattr(cls.forward, _ORIGINAL, cls.forward))
            cls.forward = forward
        if options is not None:
            forward._torchcache_options = options
        if _HANDLE not in cls.__dict__:
            setattr(cls, _HANDLE, None)  # of instances that have none
        _add_cache_instance(cls)


def _add_cache_instance(cls: type[nn.Module]) -> None:
    if "cache_instance" not in cls.__dict__:
        cls.cache_instance = property(_cache_instance)  # type: ignore[attr-defined]
        unused = getattr(cls, "__jit_unused_properties__", [])  # or TorchScript would compile it
        cls.__jit_unused_properties__ = [*unused, "cache_instance"]  # type: ignore[attr-defined]


def _dispatching(original: Forward) -> Any:
    call, handle = _call, _HANDLE

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
    setattr(forward, _ORIGINAL, original)
    return forward


@functools.partial(untraced, reason=_ONE_BREAK)
def _call(module: nn.Module, forward: Forward, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the forward of a patched class."""
    cache = _checked_cache_of(module, forward)
    if cache is None:
        return original(module, *args, **kwargs)
    return cache.run(functools.partial(original, module), args, kwargs)


class _InstanceForward:
    """Replaces the custom forward of an instance, such as a compiled or a patched module."""

    def __init__(self, module: nn.Module, original: Forward, options: Options | None = None) -> None:
        self.module: Callable[[], nn.Module | None] = weakref.ref(module)
        self.original = original
        self._torchcache_options = options
        setattr(self, _ORIGINAL, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": self.module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        module = state["module"]
        self.__dict__.update(state, module=_no_module if module is None else weakref.ref(module))

    @functools.partial(untraced, reason=_ONE_BREAK)
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.module()
        cache = None if module is None else _checked_cache_of(module, self)
        return self.original(*args, **kwargs) if cache is None else cache.run(self.original, args, kwargs)


def _checked_cache_of(module: nn.Module, forward: Any) -> Cache | None:
    """The same as `_cache_of`, after ``torchcache_`` attributes that somebody has set were put into force."""
    handle: _Handle | None = module.__dict__.get(_HANDLE)
    if handle is not None and handle.overrides is not None and not handle.overrides.hold(module.__dict__):
        handle.update(module)
    return _cache_of(module, forward)


def _cache_of(module: nn.Module, forward: Any) -> Cache | None:
    """The cache of this forward of the instance; None if it has none or is disabled."""
    attributes = module.__dict__
    handle: _Handle | None = attributes.get(_HANDLE)
    options = forward._torchcache_options
    if handle is None:
        if options is None:
            return None
        handle = attributes.setdefault(_HANDLE, _Handle(type(module), None, b""))
    if handle.module() is not module:
        handle = handle.for_module(module)
    options = handle.options or options
    if options is None:
        return None
    if not _override(module, handle, _ENABLED, options.enabled):
        return None
    cache = handle.caches.get(forward)
    return _make_cache(module, forward, handle, options) if cache is None else cache


def _override(module: nn.Module, handle: _Handle, name: str, option: bool) -> Any:
    """The attribute of a module or its class that is live, without a look at all the others."""
    value = module.__dict__.get(name)
    if value is None:
        value = handle.inner.get(name)
    return getattr(type(module), name, option) if value is None else value


def _places(module: nn.Module, handle: _Handle) -> list[Mapping[str, Any]]:
    """Where attributes of a module may be set apart from its ``__dict__``, those first that count less."""
    classes = [vars(c) for c in reversed(type(module).__mro__) if c not in (nn.Module, object)]
    return [*classes, handle.inner]


def _make_cache(module: nn.Module, forward: Any, handle: _Handle, options: Options) -> Cache:
    with _lock:
        original = getattr(forward, _ORIGINAL)
        takes_self = not isinstance(forward, _InstanceForward)
        current = functools.partial(_options_of_live, weakref.ref(module), options)
        if handle.overrides is None:
            handle.overrides = Overrides(module.__dict__, _places(module, handle))
        return handle.caches.setdefault(forward, Cache(module, original, takes_self, handle.init, current))


def _options_of_live(module: Callable[[], nn.Module | None], options: Options) -> Options:
    target = module()
    return options if target is None else _options_of(target, target.__dict__[_HANDLE], options)


def _options_of_class(cls: type[nn.Module]) -> Options | None:
    """Those of its decorated forward, also where a subclass has another forward that calls it."""
    options = (getattr(c.__dict__.get("forward"), "_torchcache_options", None) for c in cls.__mro__)
    return next(filter(None, options), None)


def _options_of(module: nn.Module, handle: _Handle, options: Options) -> Options:
    places = (*_places(module, handle), module.__dict__)
    return options.with_attributes({k: v for place in places for k, v in place.items()})


def _cache_instance(module: nn.Module) -> Cache:
    forwards = [module.__dict__.get("forward"), *(c.__dict__.get("forward") for c in type(module).__mro__)]
    forward = next((f for f in forwards if hasattr(f, _ORIGINAL)), None)
    cache = None if forward is None else _cache_of(module, forward)
    if cache is None:
        raise AttributeError(f"{type(module).__name__} has no cache_instance: torchcache is disabled for it")
    return cache.held_with(module.__dict__[_HANDLE].module())


# ---- frozen modules


def _patch_train(cls: type[nn.Module]) -> None:
    """Makes ``train()`` of a class freeze the instances that are to stay frozen. Others keep their ``train()``."""
    with _lock:
        own = cls.__dict__.get("train")
        if own is not None and hasattr(own, _ORIGINAL):
            return
        original = cls.train

        @functools.wraps(original)
        def train(self: nn.Module, mode: bool = True) -> nn.Module:
            if not _is_frozen(self):
                return original(self, mode)
            original(self, False)
            for parameter in self.parameters():  # scripted modules and uninitialized parameters refuse requires_grad_
                parameter.requires_grad = False
            return self

        setattr(train, _ORIGINAL, own)
        cls.train = train  # type: ignore[assignment, method-assign]


def _freeze(module: nn.Module) -> None:
    _patch_train(type(module))
    module.train(False)


def _is_frozen(module: nn.Module) -> bool:
    handle: _Handle | None = module.__dict__.get(_HANDLE)
    options = None if handle is None else handle.options or _options_of_class(type(module))
    return handle is not None and options is not None and bool(_override(module, handle, _FROZEN, options.frozen))


# ---- functions


def _wrap_function(function: types.FunctionType, options: Options) -> Forward:
    attributes: dict[str, Any] = {}  # of the wrapper, to which neither itself nor its cache refers

    @functools.wraps(function)
    def cached(*args: Any, **kwargs: Any) -> Any:
        if not overrides.hold(attributes):
            cache.update_options()
            overrides.accept(attributes)
        if not attributes.get(_ENABLED, options.enabled):
            return function(*args, **kwargs)
        return cache.run(function, args, kwargs)

    attributes.update(cached.__dict__)
    cached.__dict__ = attributes
    setattr(cached, _ORIGINAL, function)
    untraced(cached, _ONE_BREAK)
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
