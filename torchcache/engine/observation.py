"""Watches one forward closely: what hooks inside it return, and whether it draws random numbers itself."""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from torchcache._utils.torch_private import version
from torchcache.engine.bypass import Bypassed
from torchcache.identity.attributes import FORWARD_HOOKS
from torchcache.identity.draws import ThreadDraws
from torchcache.identity.origin import of_function, of_module

Hooks = dict[types.CodeType, str]  # code of a hook → what to call it

_COLLECTS = (
    "a forward hook inside the cached module returns nothing, so it is there to put something aside, and would not run "
    "for rows that are found; return what you need from the forward, or remove the hook"
)


def hooks_of_users(modules: Iterable[nn.Module]) -> Hooks:
    """The forward hooks of these modules, without those by which torch or the library of a module computes."""
    found = [
        (hook, m)
        for m in modules
        for name in FORWARD_HOOKS
        if (registered := m.__dict__.get(name))
        for hook in registered.values()
    ]
    hooks: Hooks = {}
    for hook, m in found:
        function = _function(hook)
        origin = of_module(type(hook).__module__) if function is None else of_function(function)
        if origin is None or (origin[0] != "torch" and origin != of_module(type(m).__module__)):
            code = _NO_CODE if function is None else function.__code__
            hooks[code] = f"{getattr(hook, '__qualname__', type(hook).__qualname__)} of {type(m).__qualname__}"
    return hooks


def _function(hook: Any) -> types.FunctionType | None:
    """The Python function that a hook is, calls or wraps; None: it is compiled."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    if not isinstance(hook, (types.FunctionType, types.MethodType)):
        hook = getattr(type(hook), "__call__", None)  # noqa: B004
    hook = inspect.unwrap(getattr(hook, "__func__", hook))
    return hook if isinstance(hook, types.FunctionType) else None


_NO_CODE = (lambda: None).__code__  # stands for hooks that nobody can watch


class Observation:
    """What happens in this thread during one forward.

    Args:
        hooks: those to watch.
        draws: whether to watch for random numbers.

    Attributes:
        hooks: those to watch.
        is_blind: whether nothing could be seen, since somebody else's profiler runs.
    """

    def __init__(self, hooks: Hooks, draws: bool) -> None:
        self.hooks = hooks
        self.is_blind = False
        self._draws = ThreadDraws() if draws else None
        self._given: dict[types.FrameType, list[tuple[Any, object]]] = {}  # to hooks that run, with versions
        self._collecting: dict[types.CodeType, bool] = {}
        if _NO_CODE in hooks:
            self._collecting[_NO_CODE] = True

    @property
    def has_drawn(self) -> bool:
        """Whether this thread drew numbers from global generators."""
        return self._draws is not None and self._draws.have_happened

    @property
    def sees_draws(self) -> bool:
        """Whether it would have noticed."""
        return self._draws is not None and not self.is_blind

    @property
    def collector(self) -> Bypassed | None:
        """Why the forward must not be cached: a hook changes nothing in what is computed."""
        names = [self.hooks[code] for code, collects in self._collecting.items() if collects]
        return Bypassed(_COLLECTS, details=", ".join(names)) if names else None

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The output of the forward, which is watched."""
        if sys.getprofile() is not None:  # two cannot run at once
            self.is_blind = True
            return forward(*args, **kwargs)
        sys.setprofile(self._note)
        try:
            if self._draws is None:
                return forward(*args, **kwargs)
            with self._draws.of_torch():
                return forward(*args, **kwargs)
        finally:
            sys.setprofile(None)
            self._given.clear()

    def _note(self, frame: types.FrameType, event: str, value: Any) -> None:
        if frame.f_code in self.hooks:
            self._note_hook(frame, event, value)
        if self._draws is not None:
            self._draws.note(frame, event, value)

    def _note_hook(self, frame: types.FrameType, event: str, value: Any) -> None:
        """A hook computes if it returns something new or edits a tensor; once is enough."""
        if event == "call":
            parameters = map(frame.f_locals.get, frame.f_code.co_varnames[: _parameters(frame.f_code)])
            self._given[frame] = [(given, _version(given)) for given in parameters]
        elif event == "return":
            given = self._given.pop(frame, [])
            edits = any(_version(item) != before for item, before in given)
            computes = edits or not (value is None or any(value is item for item, _ in given))
            self._collecting[frame.f_code] = self._collecting.get(frame.f_code, True) and not computes


def _parameters(code: types.CodeType) -> int:
    variable = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + variable


def _version(value: Any) -> object:
    if isinstance(value, (tuple, list)):
        return [_version(item) for item in value]
    return version(value) if isinstance(value, Tensor) else None
