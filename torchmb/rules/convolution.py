"""Convolutions: the models become groups of one convolution, their channels next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functorch import Batched, Dim, batch_size, is_batched, lift, models_first, split_dim

Convolution = Callable[..., Tensor]

CONVOLUTIONS: dict[int, Convolution] = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}
TRANSPOSED: dict[int, Convolution] = {1: torch.conv_transpose1d, 2: torch.conv_transpose2d, 3: torch.conv_transpose3d}
# Arguments after the bias, in order.
DEFAULTS: dict[Convolution, dict[str, Any]] = {
    **{f: {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} for f in CONVOLUTIONS.values()},
    **{f: {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1} for f in TRANSPOSED.values()},
}

_channels_last = ContextVar("channels_last", default=False)


@contextmanager
def channels_last(modules: Iterable[nn.Module], x: Tensor | None) -> Iterator[None]:
    """Lets convolutions store channels last, on the CPU and unless a module uses batch statistics.

    In this order oneDNN's grouped convolutions of few channels, and max pooling, are 1.1 to 5 times faster; later
    layers preserve it. But sums over rows lose two digits (torch 2.13: a gradient of batch_norm over 7,168 rows has an
    error of 6.5e-4 relative to the largest, instead of 1.2e-5).
    """
    statistics = any(map(_takes_statistics, modules))
    token = _channels_last.set(x is not None and x.device.type == "cpu" and not statistics)
    try:
        yield
    finally:
        _channels_last.reset(token)


def _takes_statistics(module: nn.Module) -> bool:
    """Whether the module is one of torch's batch or instance norms and computes statistics of its input."""
    is_norm = hasattr(module, "track_running_stats")
    return is_norm and (module.training or getattr(module, "running_mean", None) is None)


def convolve(
    function: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int = 1, **options: Any
) -> Tensor:
    """Convolves x (B, M, C, …) with weight (M, *one model's) and bias (M, O) or None → (B, M, O, …)."""
    batch = len(weight)
    channels = x.flatten(1, 2)
    # Not for one image: torch tells the order by the stride of its dimension of size 1, which is arbitrary.
    if channels.dim() == 4 and len(channels) > 1 and _channels_last.get():
        channels = channels.contiguous(memory_format=torch.channels_last)
    out = function(
        channels,
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        groups=groups * batch,
        **options,
    )
    return split_dim(out, 1, batch)


def convolve_shared(function: Convolution, x: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    """The same for x (B, C, …) that all models share, and one group: a dense convolution."""
    channels = 1 if function in TRANSPOSED.values() else 0
    stacked = weight.movedim(0, channels).flatten(channels, channels + 1)
    out = function(x, stacked, None if bias is None else bias.flatten(), **options)
    return split_dim(out, 1, len(weight))


def kernel(
    function: Convolution,
    options: dict[str, Any],
    x: tuple[Tensor, Dim],
    weight: tuple[Tensor, Dim],
    bias: tuple[Tensor | None, Dim],
) -> Batched:
    """Chooses the convolution for operands with the models at any dimension."""
    batch = batch_size(weight)
    w = models_first(*weight, batch)
    b = None if bias[0] is None else models_first(bias[0], bias[1], batch)
    if x[1] is None and options["groups"] == 1:
        return convolve_shared(function, x[0], w, b, **options), 1
    return convolve(function, models_first(*x, batch).transpose(0, 1), w, b, **options), 1


def _rule(
    function: Convolution, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    if not is_batched(weight) or input.dim() != weight.dim():
        return NotImplemented
    options = DEFAULTS[function] | dict(zip(DEFAULTS[function], args)) | kwargs
    return lift(partial(kernel, function, options), input, weight, bias)


RULES = {function: partial(_rule, function) for function in DEFAULTS}
