"""Autocast: the dtypes that one model would compute in, where vmap or a kernel of ours would choose others."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on where x lies. Of meta tensors torch cannot be asked."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def cast_as_autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """Casts tensors as torch does before a matrix product, here so that the backward sees the dtypes of the forward."""
    if not autocast_enabled(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in (x, *others)
    )


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    return torch.prelu(*cast_as_autocast(input, weight))


def _uncast(function: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Of vectors torch casts no product on the CPU, but vmap makes it one of matrices, which it casts."""
    if not x.is_cpu or not autocast_enabled(x):
        return NotImplemented
    with torch.autocast("cpu", enabled=False):
        return function(x, *args, **kwargs)


RULES: dict[Callable[..., Any], Callable[..., Any]] = {torch.prelu: _prelu}
RULES |= {f: partial(_uncast, f) for f in (torch.mv, torch.dot, torch.vdot, torch.addmv)}
