"""Normalisation: batch statistics of all models in one call, over (B, M · C)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..lift import Batched, Dim, batch_size, is_batched, lift, models_first, split_dim


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """x (B, M, C, …), all others (M, C) or None → (B, M, C, …). Running statistics are updated in place."""
    mean, var = (None if t is None else t.view(-1) for t in (running_mean, running_var))
    scale, shift = (None if t is None else t.flatten() for t in (weight, bias))
    channels = x.flatten(1, 2)
    # For its precision: see convolution.channels_last. One image may lie in that order with a stride of its own for
    # dimension 0, for which torch's backward in eval mode is wrong.
    if training or len(channels) == 1:
        channels = channels.contiguous()
    out = F.batch_norm(channels, mean, var, scale, shift, training, momentum, eps)
    return split_dim(out, 1, x.shape[1])


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, place: int) -> Tensor:
    """x (M, B, …), scaled and shifted by (M, *shape), where `shape` begins at dimension `place` of x."""
    for values, apply in ((weight, Tensor.mul), (bias, Tensor.add)):
        if values is not None:
            after = x.dim() - place - (values.dim() - 1)
            x = apply(x, values.view(len(values), *[1] * (place - 1), *values.shape[1:], *[1] * after))
    return x


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x (M, B, C, …), weight and bias (M, C) or None → the same shape as x."""
    images = F.group_norm(x.flatten(0, 1), groups, eps=eps)
    return affine(split_dim(images, 0, len(x)), weight, bias, 2)


def kernel(training: bool, momentum: float, eps: float, x: tuple[Tensor, Dim], *states: tuple[Tensor, Dim]) -> Batched:
    batch = batch_size(x, *states)
    mean, var, weight, bias = (None if t is None else models_first(t, dim, batch) for t, dim in states)
    return batch_norm(models_first(*x, batch).transpose(0, 1), mean, var, weight, bias, training, momentum, eps), 1


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    states = (running_mean, running_var, weight, bias)
    shared = [t for t in states[:2] if t is not None and not is_batched(t)]
    if shared or input.dim() < 2 or not (is_batched(input) or any(is_batched(t) for t in states)):
        return NotImplemented  # models that update one running mean: vmap refuses, and has to
    return lift(partial(kernel, training, momentum, eps), input, *states)


def _group_norm_kernel(groups: int, eps: float, x: tuple[Tensor, Dim], *states: tuple[Any, Dim]) -> Batched:
    batch = batch_size(x, *states)
    weight, bias = (None if t is None else models_first(t, dim, batch) for t, dim in states)
    return group_norm(models_first(*x, batch), groups, weight, bias, eps), 0


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    if input.dim() < 2 or not any(map(is_batched, (input, weight, bias))):
        return NotImplemented
    return lift(partial(_group_norm_kernel, num_groups, eps), input, weight, bias)


RULES = {F.batch_norm: _batch_norm, F.group_norm: _group_norm}
