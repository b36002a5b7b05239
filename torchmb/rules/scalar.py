"""Numbers read from tensors, if they are the same for all models, and properties that autograd records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from ..functorch import is_batched, is_transformed, lift, unwrap
from ..torch_private import current_level

NUMBERS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__)


def _rule(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """The number that each separate model would get, if they are equal: a counter, or the condition of a branch."""
    if not is_batched(x):
        return NotImplemented
    plain, dim = unwrap(x, current_level())
    if is_transformed(plain):  # by a transform around the whole batch
        return NotImplemented
    assert dim is not None
    values = [function(one) for one in plain.detach().movedim(dim, 0).cpu()]
    if any(type(v) is not type(values[0]) or v != values[0] for v in values):
        raise RuntimeError(f"the forward reads a number ({function.__name__}) that differs between the models")
    return values[0]


def _of_the_tensor(attribute: str, x: Tensor) -> Any:
    """A property of the tensor itself: autograd records beneath vmap's wrapper."""
    return getattr(unwrap(x, current_level())[0], attribute) if is_batched(x) else NotImplemented


def _grad(x: Tensor) -> Any:
    """The gradient of the tensor itself, each model's own."""
    if not is_batched(x):
        return NotImplemented
    plain, dim = unwrap(x, current_level())
    return None if plain.grad is None else lift(lambda _: (plain.grad, dim), x)


def _getter(attribute: str) -> Callable[..., Any]:
    """The function that a mode sees when x.attribute is read."""
    getter: Callable[..., Any] = getattr(Tensor, attribute).__get__
    return getter


RULES: dict[Callable[..., Any], Callable[..., Any]] = {f: partial(_rule, f) for f in NUMBERS}
RULES |= {_getter(name): partial(_of_the_tensor, name) for name in ("requires_grad", "is_leaf", "grad_fn")}
RULES[_getter("grad")] = _grad
