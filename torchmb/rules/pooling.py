"""Pooling: models beside the channels or the images, wherever they lie in memory, so that nothing is copied."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, folded, is_batched, lift, split_dim, unfolded

POOLS: dict[Callable[..., Any], int] = {
    getattr(F, f"{kind}{n}d"): n
    for kind in ("max_pool", "avg_pool", "lp_pool", "adaptive_max_pool", "adaptive_avg_pool")
    for n in (1, 2, 3)
    if hasattr(F, f"{kind}{n}d")
}


def each_image(function: Callable[[Tensor], Tensor], x: Tensor, dim: Dim) -> Batched:
    """`function`, which treats images and channels alike, of x with the models at `dim` → the same."""
    if dim is None:
        return function(x), None
    batch = x.shape[dim]
    beside = x.movedim(dim, 1)
    if beside.stride(1) == beside.stride(2) * beside.shape[2]:
        return split_dim(function(beside.flatten(1, 2)), 1, batch), 1
    rows, place = folded(x, dim)
    return unfolded(function(rows), place, batch)


def _rule(function: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if not is_batched(input) or input.dim() != POOLS[function] + 2 or kwargs.get("return_indices"):
        return NotImplemented
    return lift(lambda x: each_image(lambda images: function(images, *args, **kwargs), *x), input)


RULES = {function: partial(_rule, function) for function in POOLS}
