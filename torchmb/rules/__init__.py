"""Rules: fast kernels in place of vmap's own, one module for each family of functions.

A rule has the signature of the function that it replaces, and runs within vmap, on one model's shapes. It returns
NotImplemented where vmap's own kernel shall run.
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
    """Applies the rules to calls within the vmap of this level, unless the model's forward uses a transform."""

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
        """RuntimeError if the forward has edited a copy that stands for a view."""
        self._views.finish()
