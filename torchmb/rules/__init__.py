"""Fast kernels for what models call: a mode that puts them in the place of vmap's own, one file a family.

A rule has the signature of the function for which it stands and runs inside vmap, on one model's shapes. It returns
NotImplemented where it has nothing better than vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.overrides import TorchFunctionMode

from ..torch_private import current_level
from . import (
    activation,
    attention,
    autocast,
    convolution,
    inplace,
    linear,
    lookup,
    normalisation,
    pooling,
    recurrent,
    scalar,
)
from .views import VIEWING, Views, edits

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
for family in (
    activation,
    attention,
    autocast,
    convolution,
    inplace,
    linear,
    lookup,
    normalisation,
    pooling,
    recurrent,
    scalar,
):
    RULES.update(family.RULES)


class Rules(TorchFunctionMode):
    """The rules, for calls directly within the vmap of this level; transforms of the model's own are left to torch."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level
        self._views = Views()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in attention.OPENED:
            with self:
                return attention.OPENED[func](*args, **kwargs)
        output: Any = NotImplemented
        if current_level() == self._level:
            if func in VIEWING:
                output = self._views.call(func, *args, **kwargs)
            elif func in RULES:
                output = RULES[func](*args, **kwargs)
        if output is NotImplemented:
            output = func(*args, **kwargs)
        if edits(func, kwargs):
            self._views.after_edit()
        return output

    def finish(self) -> None:
        """RuntimeError if a copy in the place of a view made a difference that nobody saw."""
        self._views.finish()
