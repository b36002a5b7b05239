"""Edits of tensors in place for which vmap is slow or has no batching rule."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, is_batched, lift_all

ARITHMETIC = (
    *(Tensor.add_, Tensor.sub_, Tensor.mul_, Tensor.div_),
    *(Tensor.__iadd__, Tensor.__isub__, Tensor.__imul__, Tensor.__itruediv__),
)


def _arithmetic(function: Callable[..., Any], x: Tensor, other: Any, **kwargs: Any) -> Any:
    """Edits the tensor itself: vmap would edit a view with the models first, for which autograd copies it."""
    if not is_batched(x) or not is_batched(other) or x.dim() != other.dim():
        return NotImplemented

    def kernel(own: Batched, given: Batched) -> list[Batched]:
        assert own[1] is not None and given[1] is not None
        function(own[0], given[0].movedim(given[1], own[1]), **kwargs)
        return []

    lift_all(kernel, x, other)
    return x


def _assign(x: Tensor, index: Any, value: Any) -> Any:
    """Computes x[mask] = value without counting the mask, where the value is the same for every true entry."""
    if not (isinstance(index, Tensor) and index.dtype is torch.bool and index.shape == x.shape[: index.dim()]):
        return NotImplemented
    rest = x.dim() - index.dim()
    if not isinstance(value, Tensor) or not value.dim():
        value = torch.as_tensor(value).to(x)
    if value.dim() > rest or value.dtype != x.dtype:
        return NotImplemented
    x.copy_(torch.where(index.view(*index.shape, *[1] * rest), value, x))
    return None


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None) -> Any:
    """Supports `out`, which spectral_norm uses for its buffers and vmap does not support."""
    return NotImplemented if out is None else out.copy_(F.normalize(input, p, dim, eps))


RULES: dict[Callable[..., Any], Callable[..., Any]] = {f: partial(_arithmetic, f) for f in ARITHMETIC}
RULES |= {Tensor.__setitem__: _assign, F.normalize: _normalize}
