"""Views: a copy where the models lie between the dimensions that a view would join."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..lift import Batched, is_batched, lift, models_first


class Views:
    """Tensor.view for one run.

    What is one piece of memory for one model may lie in pieces between those of others. The copy that is taken then is
    not told from a view as long as neither is edited in place.
    """

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, int]] = []

    def view(self, x: Tensor, *shape: Any, **kwargs: Any) -> Any:
        if kwargs or not shape or isinstance(shape[0], torch.dtype) or not is_batched(x):
            return NotImplemented
        sizes = shape[0] if isinstance(shape[0], (tuple, list)) else shape

        def kernel(given: Batched) -> Batched:
            tensor, dim = given
            assert dim is not None
            first = models_first(tensor, dim, tensor.shape[dim])
            try:
                return first.view(len(first), *sizes), 0
            except RuntimeError:
                copy = first.reshape(len(first), *sizes)
                self._copies += [(t, t._version) for t in (tensor, copy) if not t.is_inference()]
                return copy, 0

        return lift(kernel, x)

    def check(self) -> None:
        if any(tensor._version != version for tensor, version in self._copies):
            raise RuntimeError("a view is edited in place")
