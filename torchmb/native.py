"""Trees of torch's own layers on (M, B, …) without vmap: what small models spend their time on is calls.

Only exact types are known here, each with one meaning; a subclass, a hook or an own forward anywhere sends the whole tree
to vmap. Whether the tree fits is decided before anything runs, so that nothing has to be undone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .hooks import has_hooks
from .lift import Batched, Dim, models_first
from .rules import convolution, linear, lookup, normalisation, pooling
from .run import Inputs

Run = Callable[[nn.Module, Tensor, Dim, int], Batched]
Fits = Callable[[nn.Module, int], int | None]  # dimensions of one model's input → of its output; None: not here


class _Layer(NamedTuple):
    fits: Fits
    run: Run


def native(template: nn.Module, inputs: Inputs, batch: int) -> Tensor | None:
    """The output (M, B, …) if the template is such a tree and has one tensor as its argument, else None."""
    args, kwargs = inputs.rest
    if len(args) != 1 or kwargs or _has_any_global_hook():
        return None
    x = inputs.tensors[0] if inputs.tensors else args[0]
    dim: Dim = 0 if inputs.tensors else None
    if type(x) is not Tensor:
        return None
    steps: list[tuple[Run, nn.Module]] = []
    if _plan(template, x.dim() - len(inputs.tensors), steps) is None:
        return None
    for run, module in steps:
        x, dim = run(module, x, dim, batch)
    return models_first(x, dim, batch)


def run_layer(module: nn.Module, kind: type[nn.Module], x: Tensor, dim: int, batch: int) -> Batched:
    """Runs `module`, which has the attributes of a layer of this kind, on x with the models at `dim`.

    ValueError if x has not the dimensions that the layer takes.
    """
    layer = _LAYERS[kind]
    if layer.fits(module, x.dim() - 1) is None:
        shape = (x.shape[0] * x.shape[1], *x.shape[2:])
        raise ValueError(f"{type(module).__name__} with these options does not take tensors of shape {shape}")
    return layer.run(module, x, dim, batch)


def _plan(module: nn.Module, dims: int | None, steps: list[tuple[Run, nn.Module]]) -> int | None:
    """Appends what is to run for an input of so many dimensions → those of the output, None if anything does not fit."""
    if dims is None or has_hooks(module) or "forward" in vars(module):
        return None
    if type(module) is nn.Sequential:
        for child in module:
            dims = _plan(child, dims, steps)
        return dims
    layer = _LAYERS.get(type(module))
    if layer is None or any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
        return None
    steps.append((layer.run, module))
    return layer.fits(module, dims)


def _any(module: nn.Module, dims: int) -> int | None:
    return dims


def _elementwise(module: nn.Module, x: Tensor, dim: Dim, batch: int) -> Batched:
    return module.forward(x), dim


def _dropout(module: nn.Dropout, x: Tensor, dim: Dim, batch: int) -> Batched:
    if dim is None and module.training:
        x, dim = x.expand(batch, *x.shape).clone(), 0  # a mask of its own for each model
    return module.forward(x), dim


def _linear(module: nn.Linear, x: Tensor, dim: Dim, batch: int) -> Batched:
    return linear.kernel((x, dim), (module.weight, 0), (module.bias, 0))


def _convolution(module: nn.Conv2d, x: Tensor, dim: Dim, batch: int) -> Batched:
    options = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    padding = module.padding
    if module.padding_mode != "zeros":
        pads, mode = module._reversed_padding_repeated_twice, module.padding_mode
        x, dim = pooling.each_image(lambda images: F.pad(images, pads, mode=mode), x, dim)
        padding = 0  # type: ignore[assignment]
    function = convolution.CONVOLUTIONS[len(module.kernel_size)]
    return convolution.kernel(function, {**options, "padding": padding}, (x, dim), (module.weight, 0), (module.bias, 0))


def _transposed_convolution(module: nn.ConvTranspose2d, x: Tensor, dim: Dim, batch: int) -> Batched:
    options = {
        "stride": module.stride,
        "padding": module.padding,
        "output_padding": module.output_padding,
        "groups": module.groups,
        "dilation": module.dilation,
    }
    function = convolution.TRANSPOSED[len(module.kernel_size)]
    return convolution.kernel(function, options, (x, dim), (module.weight, 0), (module.bias, 0))


def _dimensions(*allowed: int) -> Fits:
    return lambda module, dims: dims if dims in allowed else None


def _batch_norm(module: nn.BatchNorm2d, x: Tensor, dim: Dim, batch: int) -> Batched:
    tracks = module.training and module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    training = module.training or module.running_mean is None
    own = [module.running_mean, module.running_var] if tracks or not module.training else [None, None]
    averages = tracks and module.momentum is None and own[0] is not None
    stats = [torch.zeros_like(s) for s in own] if averages else own
    momentum = module.momentum if module.momentum is not None else 1.0 if averages else 0.0
    output = normalisation.kernel(
        training, momentum, module.eps, (x, dim), *((s, 0) for s in (*stats, module.weight, module.bias))
    )
    if averages:  # each model's own number of batches counts
        share = module.num_batches_tracked.to(stats[0].dtype).reciprocal().unsqueeze(1)
        for running, new in zip(own, stats, strict=True):
            running.lerp_(new, share)
    return output


def _layer_norm(module: nn.LayerNorm, x: Tensor, dim: Dim, batch: int) -> Batched:
    x = F.layer_norm(models_first(x, dim, batch), module.normalized_shape, eps=module.eps)
    return normalisation.affine(x, module.weight, module.bias, x.dim() - len(module.normalized_shape)), 0


def _group_norm(module: nn.GroupNorm, x: Tensor, dim: Dim, batch: int) -> Batched:
    return normalisation.group_norm(
        models_first(x, dim, batch), module.num_groups, module.weight, module.bias, module.eps
    ), 0


def _pool(module: nn.Module, x: Tensor, dim: Dim, batch: int) -> Batched:
    return pooling.each_image(module.forward, x, dim)


def _pool_fits(spatial: int) -> Fits:
    def fits(module: nn.Module, dims: int) -> int | None:
        return dims if dims == spatial + 2 and not getattr(module, "return_indices", False) else None

    return fits


def _flatten_fits(module: nn.Module, dims: int) -> int | None:
    start, end = (d + dims if d < 0 else d for d in (module.start_dim, module.end_dim))
    return dims - (end - start) if 0 <= start <= end < dims else None


def _flatten(module: nn.Flatten, x: Tensor, dim: Dim, batch: int) -> Batched:
    if dim is None:
        return module.forward(x), None
    start, end = (d if d < 0 else d + 1 for d in (module.start_dim, module.end_dim))
    return models_first(x, dim, batch).flatten(start, end), 0


def _softmax_fits(module: nn.Module, dims: int) -> int | None:
    return None if module.dim is None or not -dims <= module.dim < dims else dims


def _softmax(module: nn.Softmax, x: Tensor, dim: Dim, batch: int) -> Batched:
    function = F.log_softmax if type(module) is nn.LogSoftmax else F.softmax
    assert module.dim is not None
    return function(models_first(x, dim, batch), module.dim if module.dim < 0 else module.dim + 1), 0


def _embedding_fits(module: nn.Module, dims: int) -> int | None:
    return None if module.max_norm is not None or module.sparse else dims + 1


def _embedding(module: nn.Embedding, x: Tensor, dim: Dim, batch: int) -> Batched:
    indices = models_first(x, dim, batch)
    return lookup.embedding(indices, module.weight, module.padding_idx, module.scale_grad_by_freq), 0


_ELEMENTWISE = (
    *(nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold),
)
_LAYERS: dict[type[nn.Module], _Layer] = {kind: _Layer(_any, _elementwise) for kind in _ELEMENTWISE}
_LAYERS |= {
    nn.Dropout: _Layer(_any, _dropout),
    nn.Linear: _Layer(lambda module, dims: dims or None, _linear),
    nn.Conv1d: _Layer(_dimensions(3), _convolution),
    nn.Conv2d: _Layer(_dimensions(4), _convolution),
    nn.Conv3d: _Layer(_dimensions(5), _convolution),
    nn.ConvTranspose1d: _Layer(_dimensions(3), _transposed_convolution),
    nn.ConvTranspose2d: _Layer(_dimensions(4), _transposed_convolution),
    nn.ConvTranspose3d: _Layer(_dimensions(5), _transposed_convolution),
    nn.BatchNorm1d: _Layer(_dimensions(2, 3), _batch_norm),
    nn.BatchNorm2d: _Layer(_dimensions(4), _batch_norm),
    nn.BatchNorm3d: _Layer(_dimensions(5), _batch_norm),
    nn.LayerNorm: _Layer(_any, _layer_norm),
    nn.GroupNorm: _Layer(lambda module, dims: dims if dims >= 2 else None, _group_norm),
    nn.Flatten: _Layer(_flatten_fits, _flatten),
    nn.Softmax: _Layer(_softmax_fits, _softmax),
    nn.LogSoftmax: _Layer(_softmax_fits, _softmax),
    nn.Embedding: _Layer(_embedding_fits, _embedding),
}
_POOLS = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}
_LAYERS |= {kind: _Layer(_pool_fits(spatial), _pool) for spatial, kinds in _POOLS.items() for kind in kinds}
