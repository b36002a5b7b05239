"""Arithmetic in place: vmap would edit a view, with the models moved to the front, which autograd undoes by copying."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..lift import Batched, is_batched, lift_all

ARITHMETIC = (
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    *(Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__),
)


def _rule(function: Callable[..., Any], x: Tensor, other: Any, **kwargs: Any) -> Any:
    if not is_batched(x) or not is_batched(other) or x.dim() != other.dim():
        return NotImplemented

    def kernel(own: Batched, given: Batched) -> list[Batched]:
        assert own[1] is not None and given[1] is not None
        function(own[0], given[0].movedim(given[1], own[1]), **kwargs)
        return []

    lift_all(kernel, x, other)
    return x


RULES: dict[Callable[..., Any], Callable[..., Any]] = {f: partial(_rule, f) for f in ARITHMETIC}
