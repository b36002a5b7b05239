"""Normalisation: batch statistics of all models in one call, over (B, M · C)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, batch_size, is_batched, lift, models_first, split_dim
from .autocast import autocast_enabled

Norm = Callable[..., Tensor]  # F.batch_norm or F.instance_norm, which have the same arguments


def _check_batch_size(size: Sequence[int]) -> None:
    if math.prod((size[0], *size[2:])) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")


def _check_spatial_size(size: Sequence[int]) -> None:
    if math.prod(size[2:]) == 1:
        raise ValueError(f"Expected more than 1 spatial element when training, got input size {size}")


def _half(x: Tensor) -> bool:
    return x.dtype in (torch.half, torch.bfloat16)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    function: Norm = F.batch_norm,
) -> Tensor:
    """Normalises x (B, M, C, …) by states (M, C) or None → (B, M, C, …). Running statistics are updated in place.

    Args:
        x: Rows of all models.
        running_mean: (M, C), like all that follow.
        running_var: Its variance.
        weight: The scale.
        bias: The shift.
        training: Whether to use statistics of x.
        momentum: The weight of new statistics.
        eps: Added to the variance.
        function: F.batch_norm or F.instance_norm.

    Raises:
        ValueError: A channel has a single value, with torch's own message.
    """
    if training:
        check = _check_batch_size if function is F.batch_norm else _check_spatial_size
        check(x[:, 0].shape)
    mean, var = (None if t is None else t.view(-1) for t in (running_mean, running_var))
    scale, shift = (None if t is None else t.flatten() for t in (weight, bias))
    channels = x.flatten(1, 2)
    # For precision: see convolution.channels_last. A single image may be stored in that order with an arbitrary stride
    # of dimension 0, for which torch's backward in eval mode is wrong.
    if training or len(channels) == 1:
        channels = channels.contiguous()
    out = function(channels, mean, var, scale, shift, training, momentum, eps)
    return split_dim(out, 1, x.shape[1])


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, place: int) -> Tensor:
    """Scales and shifts x (M, B, …) by (M, *shape), where `shape` begins at dimension `place` of x."""
    for values, apply in ((weight, Tensor.mul), (bias, Tensor.add)):
        if values is not None:
            after = x.dim() - place - (values.dim() - 1)
            x = apply(x, values.view(len(values), *[1] * (place - 1), *values.shape[1:], *[1] * after))
    return x


def _scaled(
    normalise: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor | None, bias: Tensor | None, place: int
) -> Tensor:
    """Computes normalise(x), scaled and shifted. Half precision is rounded once, as in torch's kernels."""
    if not _half(x):
        return _affine(normalise(x), weight, bias, place)
    autocast_to_float = x.is_cuda and autocast_enabled(x)
    out = _affine(normalise(x.float()), weight, bias, place)
    return out if autocast_to_float else out.to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises x (M, B, C, …) by groups, with weight and bias (M, C) or None → the shape of x."""
    _check_batch_size([x.shape[1] * x.shape[2] // groups, groups, *x.shape[3:]])  # of one model

    def normalise(x: Tensor) -> Tensor:
        return split_dim(F.group_norm(x.flatten(0, 1), groups, eps=eps), 0, len(x))

    return _scaled(normalise, x, weight, bias, 2)


def layer_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Normalises x (M, …, *shape), with weight and bias (M, *shape) or None → the shape of x."""
    return _scaled(lambda x: F.layer_norm(x, shape, eps=eps), x, weight, bias, x.dim() - len(shape))


Operand = tuple[Any, Dim]  # a tensor or None, and its dimension of models


def kernel(
    training: bool, momentum: float, eps: float, x: Operand, *states: Operand, function: Norm = F.batch_norm
) -> Batched:
    """A batch or instance norm for operands with the models at any dimension."""
    batch = batch_size(x, *states)
    mean, var, weight, bias = _models_first(batch, *states)
    images = models_first(*x, batch).transpose(0, 1)
    return batch_norm(images, mean, var, weight, bias, training, momentum, eps, function), 1


def _models_first(batch: int, *given: Operand) -> list[Tensor | None]:
    return [None if t is None else models_first(t, dim, batch) for t, dim in given]


def _of_channels(function: Norm, training: bool, momentum: float, eps: float, input: Tensor, *states: Any) -> Any:
    """`states`: running mean and variance, weight and bias."""
    shared = [t for t in states[:2] if t is not None and not is_batched(t)]
    if shared or input.dim() < 2 or not any(map(is_batched, (input, *states))):
        return NotImplemented  # models that update one running mean: vmap must refuse
    return lift(partial(kernel, training, momentum, eps, function=function), input, *states)


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
    return _of_channels(F.batch_norm, training, momentum, eps, input, running_mean, running_var, weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    return _of_channels(F.instance_norm, use_input_stats, momentum, eps, input, running_mean, running_var, weight, bias)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    if input.dim() < 2 or not any(map(is_batched, (input, weight, bias))):
        return NotImplemented

    def kernel(x: Operand, *states: Operand) -> Batched:
        batch = batch_size(x, *states)
        scale, shift = _models_first(batch, *states)
        return group_norm(models_first(*x, batch), num_groups, scale, shift, eps), 0

    return lift(kernel, input, weight, bias)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    shape = tuple(normalized_shape)
    own = input.shape[input.dim() - len(shape) :], *(t.shape for t in (weight, bias) if t is not None)
    if any(s != shape for s in own) or not any(map(is_batched, (input, weight, bias))):
        return NotImplemented

    def kernel(x: Operand, *states: Operand) -> Batched:
        batch = batch_size(x, *states)
        scale, shift = _models_first(batch, *states)
        return layer_norm(models_first(*x, batch), shape, scale, shift, eps), 0

    return lift(kernel, input, weight, bias)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
}
