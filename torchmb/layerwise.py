"""Trees of torch's own layers on (M, B, …) without vmap, since small models spend most of their time on calls.

Every layer must be of an exact type. A subclass, a hook or a custom forward sends the whole tree to vmap. This is
decided before anything runs, so nothing has to be undone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .functorch import Dim, as_contiguous, models_first
from .hooks import has_hooks
from .layer_kernels import ELEMENTWISE, LAYER_KERNELS, OVERWRITABLE, linear_layer
from .pytree import Placeholder
from .rules.convolution import channels_last
from .run_state import Inputs
from .torch_private import has_any_global_hook, parameters_of


def run_layerwise(template: nn.Module, inputs: Inputs, batch: int) -> Tensor | None:
    """The output (M, B, …) if the template is such a tree and its only argument a tensor, else None."""
    args, kwargs = inputs.rest
    if len(args) != 1 or kwargs or has_any_global_hook():
        return None
    x, dim = (inputs.tensors[0], 0) if isinstance(args[0], Placeholder) else (args[0], None)
    if type(x) is not Tensor:
        return None
    layers: list[nn.Module] = []
    if _plan(template, x.dim() - (dim is not None), layers) is None:
        return None
    with channels_last(layers, x):
        return _run(layers, x, dim, batch)


def _plan(module: nn.Module, dims: int | None, layers: list[nn.Module]) -> int | None:
    """Appends the layers of `module` → dimensions of its output for an input with `dims`; None if it does not fit."""
    if dims is None or has_hooks(module) or "forward" in vars(module):
        return None
    if type(module) is nn.Sequential:
        for child in module:
            dims = _plan(child, dims, layers)
        return dims
    layer = LAYER_KERNELS.get(type(module))
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
        elif kind is nn.ReLU and before in OVERWRITABLE:
            x = torch.relu_(x)
        else:
            x, dim = LAYER_KERNELS[kind].run(layer, x, dim, batch)
        before = kind
    return as_contiguous(models_first(x, dim, batch))


def _feeds_linear(layers: list[nn.Module], index: int) -> bool:
    """Whether only elementwise layers stand between this layer and a linear one, so that the memory order is free."""
    after = (type(layer) for layer in layers[index + 1 :] if type(layer) not in ELEMENTWISE)
    return next(after, None) is nn.Linear
