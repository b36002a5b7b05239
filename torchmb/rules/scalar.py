"""Python numbers from tensors: one number for all models, where all of them have the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from ..lift import current_level, is_batched, unwrap

NUMBERS = (Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__, Tensor.__index__, Tensor.__bool__)


def _rule(function: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What each separate model would see, if that is the same. So a counter can be read, and a common branch taken."""
    if not is_batched(x):
        return NotImplemented
    plain, dim = unwrap(x, current_level())
    if is_functorch_wrapped_tensor(plain):  # by a transform around the whole batch
        return NotImplemented
    assert dim is not None
    values = [function(one) for one in plain.detach().movedim(dim, 0).cpu()]
    if any(type(v) is not type(values[0]) or v != values[0] for v in values):
        raise RuntimeError(f"the forward asks for a number ({function.__name__}) that differs between the models")
    return values[0]


def _requires_grad(x: Tensor) -> Any:
    """Of the tensor itself: vmap's wrapper says no where autograd records beneath it."""
    return unwrap(x, current_level())[0].requires_grad if is_batched(x) else NotImplemented


RULES: dict[Callable[..., Any], Callable[..., Any]] = {f: partial(_rule, f) for f in NUMBERS}
RULES[Tensor.requires_grad.__get__] = _requires_grad  # type: ignore[attr-defined]
