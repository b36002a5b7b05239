"""Torch's own layers, by exact type: the inputs that each accepts, and its kernel for all models at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functorch import Batched, Dim, models_first
from .rules import convolution, linear, lookup, normalisation, pooling
from .torch_private import reversed_padding

Layer = Any  # a module with the attributes of the layer in question, and with weights (M, …)
Run = Callable[[Layer, Tensor, Dim, int], Batched]
Fits = Callable[[Layer, int], int | None]  # dimensions of one model's input → of its output; None: not accepted


class LayerKernel(NamedTuple):
    """The inputs that a type of layer accepts, and how it runs."""

    fits: Fits
    run: Run


def run_layer(layer: Layer, kind: type[nn.Module], x: Tensor, dim: int, batch: int) -> Batched:
    """Runs `layer`, which has the attributes of a `kind`, on x with the models at `dim`.

    ValueError if the layer does not accept x.
    """
    exact = LAYER_KERNELS[kind]
    if exact.fits(layer, x.dim() - 1) is None:
        shape = (x.shape[0] * x.shape[1], *x.shape[2:])
        raise ValueError(f"{type(layer).__name__} with these options does not accept tensors of shape {shape}")
    return exact.run(layer, x, dim, batch)


def _any(layer: Layer, dims: int) -> int | None:
    return dims


def _dimensions(*allowed: int) -> Fits:
    return lambda layer, dims: dims if dims in allowed else None


def _elementwise(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    return layer.forward(x), dim


def _random(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    if dim is None and layer.training:
        x, dim = x.expand(batch, *x.shape).clone(), 0  # each model draws different numbers
    return layer.forward(x), dim


def linear_layer(layer: Layer, x: Tensor, dim: Dim, batch: int, columns: bool = False) -> Batched:
    """A linear layer; with `columns`, features come before rows in memory."""
    return linear.kernel((x, dim), (layer.weight, 0), (layer.bias, 0), columns)


def _convolution(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    function = convolution.CONVOLUTIONS[len(layer.kernel_size)]
    if layer.padding_mode == "zeros":
        return _convolve(function, layer, x, dim)
    pads, mode = reversed_padding(layer), layer.padding_mode
    x, dim = pooling.map_images(lambda images: F.pad(images, pads, mode=mode), x, dim)
    return _convolve(function, layer, x, dim, padding=0)


def _transposed_convolution(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    return _convolve(convolution.TRANSPOSED[len(layer.kernel_size)], layer, x, dim)


def _convolve(function: convolution.Convolution, layer: Layer, x: Tensor, dim: Dim, **other: Any) -> Batched:
    options = {name: getattr(layer, name) for name in convolution.DEFAULTS[function]} | other
    return convolution.kernel(function, options, (x, dim), (layer.weight, 0), (layer.bias, 0))


def _batch_norm(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    tracks = layer.training and layer.track_running_stats and layer.running_mean is not None
    if layer.training and layer.track_running_stats and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    own: list[Any] = [layer.running_mean, layer.running_var] if tracks or not layer.training else [None, None]
    averages = tracks and layer.momentum is None and x.numel() > 0  # without rows nothing changes
    stats = [torch.zeros_like(s) for s in own] if averages else own
    output = normalisation.kernel(
        layer.training or layer.running_mean is None,
        1.0 if averages else layer.momentum or 0.0,
        layer.eps,
        (x, dim),
        *((s, 0) for s in (*stats, layer.weight, layer.bias)),
    )
    if averages:  # over the number of batches of each model
        share = layer.num_batches_tracked.to(stats[0].dtype).reciprocal().unsqueeze(1)
        for running, new in zip(own, stats, strict=True):
            running.lerp_(new, share)
    return output


def _layer_norm(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    rows = models_first(x, dim, batch)
    return normalisation.layer_norm(rows, layer.normalized_shape, layer.weight, layer.bias, layer.eps), 0


def _group_norm(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    images = models_first(x, dim, batch)
    return normalisation.group_norm(images, layer.num_groups, layer.weight, layer.bias, layer.eps), 0


def _pool(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    return pooling.map_images(layer.forward, x, dim)


def _pool_fits(spatial: int) -> Fits:
    return lambda layer, dims: dims if dims == spatial + 2 and not getattr(layer, "return_indices", False) else None


def _flatten_fits(layer: Layer, dims: int) -> int | None:
    start, end = (d + dims if d < 0 else d for d in (layer.start_dim, layer.end_dim))
    return dims - (end - start) if 0 <= start <= end < dims else None


def _flatten(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    if dim is None:
        return layer.forward(x), None
    start, end = (d if d < 0 else d + 1 for d in (layer.start_dim, layer.end_dim))
    return models_first(x, dim, batch).flatten(start, end), 0


def _softmax_fits(layer: Layer, dims: int) -> int | None:
    return None if layer.dim is None or not -dims <= layer.dim < dims else dims


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Run:
    def run(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
        return function(models_first(x, dim, batch), layer.dim if layer.dim < 0 else layer.dim + 1), 0

    return run


def _embedding(layer: Layer, x: Tensor, dim: Dim, batch: int) -> Batched:
    indices = models_first(x, dim, batch)
    options = layer.padding_idx, layer.max_norm, layer.norm_type, layer.scale_grad_by_freq
    return lookup.embedding(indices, layer.weight, *options), 0


ELEMENTWISE = frozenset(
    {
        *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
        *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink),
        *(nn.Hardshrink, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold, nn.Dropout, nn.RReLU),
    }
)
LAYER_KERNELS: dict[type[nn.Module], LayerKernel] = {kind: LayerKernel(_any, _elementwise) for kind in ELEMENTWISE}
LAYER_KERNELS |= {
    nn.Dropout: LayerKernel(_any, _random),
    nn.RReLU: LayerKernel(_any, _random),
    nn.Linear: LayerKernel(lambda layer, dims: dims or None, linear_layer),
    nn.Conv1d: LayerKernel(_dimensions(3), _convolution),
    nn.Conv2d: LayerKernel(_dimensions(4), _convolution),
    nn.Conv3d: LayerKernel(_dimensions(5), _convolution),
    nn.ConvTranspose1d: LayerKernel(_dimensions(3), _transposed_convolution),
    nn.ConvTranspose2d: LayerKernel(_dimensions(4), _transposed_convolution),
    nn.ConvTranspose3d: LayerKernel(_dimensions(5), _transposed_convolution),
    nn.BatchNorm1d: LayerKernel(_dimensions(2, 3), _batch_norm),
    nn.BatchNorm2d: LayerKernel(_dimensions(4), _batch_norm),
    nn.BatchNorm3d: LayerKernel(_dimensions(5), _batch_norm),
    nn.LayerNorm: LayerKernel(lambda layer, dims: dims if dims >= len(layer.normalized_shape) else None, _layer_norm),
    nn.GroupNorm: LayerKernel(lambda layer, dims: dims if dims >= 2 else None, _group_norm),
    nn.Flatten: LayerKernel(_flatten_fits, _flatten),
    nn.Softmax: LayerKernel(_softmax_fits, _softmax(torch.softmax)),
    nn.LogSoftmax: LayerKernel(_softmax_fits, _softmax(torch.log_softmax)),
    nn.Embedding: LayerKernel(lambda layer, dims: dims + 1, _embedding),
}
_POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
LAYER_KERNELS |= {kind: LayerKernel(_pool_fits(spatial), _pool) for spatial, kinds in _POOLS.items() for kind in kinds}
# Layers whose output is new memory that their backward does not read: the next layer may edit it in place.
OVERWRITABLE = frozenset(
    {
        nn.Linear,
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    }
)
