"""Activations without a batching rule in vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _rrelu(
    input: Tensor, lower: float = 1.0 / 8, upper: float = 1.0 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if not training:
        return F.leaky_relu(input, (lower + upper) / 2, inplace)
    slopes = lower + (upper - lower) * torch.rand_like(input)
    factors = torch.where(input > 0, 1, slopes)
    return input.mul_(factors) if inplace else input * factors


RULES: dict[Callable[..., Any], Callable[..., Any]] = {F.rrelu: _rrelu}
