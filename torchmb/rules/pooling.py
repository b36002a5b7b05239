"""Pooling: models join the channels or the rows, whichever they are next to in memory, so that nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, fold_models, is_batched, lift, split_dim, unfold_models

POOLS: dict[Callable[..., Any], int] = {
    getattr(F, f"{kind}{n}d"): n
    for kind in ("max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for n in (1, 2, 3)
    if hasattr(F, f"{kind}{n}d")
}


def map_images(function: Callable[[Tensor], Tensor], x: Tensor, dim: Dim) -> Batched:
    """Applies `function`, which treats images and channels alike, to x with the models at `dim`."""
    if dim is None:
        return function(x), None
    batch = x.shape[dim]
    adjacent = x.movedim(dim, 1)
    if adjacent.stride(1) == adjacent.stride(2) * adjacent.shape[2]:
        return split_dim(function(adjacent.flatten(1, 2)), 1, batch), 1
    rows, place = fold_models(x, dim)
    return unfold_models(function(rows), place, batch)


def _rule(function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not is_batched(input) or input.dim() != POOLS[function] + 2 or kwargs.get("return_indices"):
        return NotImplemented
    return lift(lambda x: map_images(lambda images: function(images, *args, **kwargs), *x), input)


RULES = {function: partial(_rule, function) for function in POOLS}
