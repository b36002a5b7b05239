"""Autocast: the dtypes in which one model computes, where vmap or a kernel of torchmb would choose others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on for the device of x; never for meta tensors, about which torch cannot be asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast_as_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Casts tensors as torch does before a matrix product, so that the backward uses the dtypes of the forward."""
    if not autocast_enabled(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    return torch.prelu(*cast_as_autocast(input, weight))


def _uncast(function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Turns autocast off: on the CPU it does not cast products of vectors, but vmap's products of matrices."""
    if not x.is_cpu or not autocast_enabled(x):
        return NotImplemented
    with torch.autocast("cpu", enabled=False):
        return function(x, *args, **kwargs)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {torch.prelu: _prelu}
RULES |= {f: partial(_uncast, f) for f in (torch.mv, torch.dot, torch.vdot, torch.addmv)}
