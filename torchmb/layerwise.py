"""Trees of torch's own layers on (M, B, …) without vmap: what small models spend their time on is calls.

Only exact types are known here, each with one meaning; a subclass, a hook or an own forward anywhere sends the whole
tree to vmap. Whether the tree fits is decided before anything runs, so that nothing has to be undone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .execution import Inputs
from .functorch import Dim, in_order, models_first
from .hooks import has_hooks
from .layer_kernels import ELEMENTWISE, FRESH, LAYERS, linear_layer
from .pytree import Place
from .rules.convolution import channels_last
from .torch_private import has_any_global_hook, parameters_of


def native(template: nn.Module, inputs: Inputs, batch: int) -> Tensor | None:
    """The output (M, B, …) if the template is such a tree and has one tensor as its argument, else None."""
    args, kwargs = inputs.rest
    if len(args) != 1 or kwargs or has_any_global_hook():
        return None
    x, dim = (inputs.tensors[0], 0) if isinstance(args[0], Place) else (args[0], None)
    if type(x) is not Tensor:
        return None
    layers: list[nn.Module] = []
    if _plan(template, x.dim() - (dim is not None), layers) is None:
        return None
    with channels_last(layers, x):
        return _run(layers, x, dim, batch)


def _plan(module: nn.Module, dims: int | None, layers: list[nn.Module]) -> int | None:
    """Appends what is to run for an input of so many dimensions → those of its output, None if it does not fit."""
    if dims is None or has_hooks(module) or "forward" in vars(module):
        return None
    if type(module) is nn.Sequential:
        for child in module:
            dims = _plan(child, dims, layers)
        return dims
    layer = LAYERS.get(type(module))
    if layer is None or any(type(p) is not nn.Parameter for p in parameters_of(module).values() if p is not None):
        return None
    layers.append(module)
    return layer.fits(module, dims)


def _run(layers: list[nn.Module], x: Tensor, dim: Dim, batch: int) -> Tensor:
    before: type[nn.Module] | None = None
    for i, layer in enumerate(layers):
        kind = type(layer)
        if kind is nn.Linear:
            x, dim = linear_layer(layer, x, dim, batch, columns=_feeds_linear(layers, i))
        elif kind is nn.ReLU and before in FRESH:
            x = torch.relu_(x)
        else:
            x, dim = LAYERS[kind].run(layer, x, dim, batch)
        before = kind
    return in_order(models_first(x, dim, batch))


def _feeds_linear(layers: list[nn.Module], index: int) -> bool:
    """Whether only elementwise layers stand between this layer and a linear one: nobody sees the order in memory."""
    after = (type(layer) for layer in layers[index + 1 :] if type(layer) not in ELEMENTWISE)
    return next(after, None) is nn.Linear
