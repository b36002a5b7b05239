"""Linear layers: one batched matrix product with a backward that leaves nothing to transpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..lift import Batched, Dim, batch_size, is_batched, lift, models_first


class _Linear(torch.autograd.Function):
    """x (M, N, I), weight (M, O, I), bias (M, O) or None → (M, N, O).

    Autograd's own backward of the same product gives the gradient of the weight as a transposed view, which is then
    copied before it can be accumulated.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        return (
            torch.bmm(grad, weight) if ctx.needs_input_grad[0] else None,
            torch.bmm(grad.mT, x) if ctx.needs_input_grad[1] else None,
            grad.sum(1) if ctx.needs_input_grad[2] else None,
        )


def as_autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Casts as torch does before a matrix product, here so that the backward sees the dtypes of the forward."""
    device = next(t.device.type for t in tensors if t is not None)
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, …, I), weight (M, O, I), bias (M, O) or None → (M, …, O)."""
    x, weight, bias = as_autocast(x, weight, bias)  # type: ignore[assignment]
    rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    out: Tensor = _Linear.apply(rows, weight, bias)  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], out.shape[-1])


def linear_of_shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, I) that all models see, weight (M, O, I), bias (M, O) or None → (…, M, O), one matrix product."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return out.unflatten(-1, weight.shape[:2])


def kernel(x: tuple[Tensor, Dim], weight: tuple[Tensor, Dim], bias: tuple[Tensor | None, Dim]) -> Batched:
    batch = batch_size(weight)
    w = models_first(*weight, batch)
    b = None if bias[0] is None else models_first(bias[0], bias[1], batch)
    if x[1] is None:
        return linear_of_shared(x[0], w, b), x[0].dim() - 1
    return linear(models_first(*x, batch), w, b), 0


def _rule(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not is_batched(weight) or weight.dim() != 2:
        return NotImplemented
    return lift(kernel, input, weight, bias)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# The last two only spell out in parts what vmap would otherwise compute model by model.
RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _rule,
    F.bilinear: _bilinear,
    torch._weight_norm: _weight_norm,
}
