"""Linear layers: one batched matrix product, whose backward makes no transposed views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, batch_size, is_batched, lift, models_first, split_dim
from ..torch_private import current_level, unsafe_view, weight_norm
from .autocast import cast_as_autocast


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _product_by_columns(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same (M, N, O), stored as (M, O, N): without transposed operands, 10 % faster."""
    models, rows, _ = x.shape
    outputs = weight.shape[1]
    # Not a view, since the next layer may edit it in place.
    out = x.new_empty_strided((models, rows, outputs), (rows * outputs, 1, rows))
    if bias is None:
        torch.bmm(weight, x.mT, out=out.mT)
    else:
        torch.baddbmm(bias.unsqueeze(2), weight, x.mT, out=out.mT)
    return out


class _Linear(torch.autograd.Function):
    """x (M, N, I), weight (M, O, I), bias (M, O) or None → (M, N, O), stored as (M, O, N) if `columns`.

    Autograd's own backward of this product returns the gradient of the weight as a transposed view, which is copied
    before it is accumulated, and the gradient of x in another memory order than x, which slows down earlier layers.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (_product_by_columns if columns else _product)(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.bmm(weight.mT, grad.mT).mT if x.mT.is_contiguous() else torch.bmm(grad, weight)
        grad_weight = torch.bmm(grad.mT, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad.sum(1) if ctx.needs_input_grad[2] else None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, columns: bool = False) -> Tensor:
    """Maps x (M, …, I) by weight (M, O, I) and bias (M, O) or None → (M, …, O); `columns`: stored features first."""
    x, weight, bias = cast_as_autocast(x, weight, bias)
    rows = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
    # Within a transform of the caller's, such as torch.func.grad, only torch's own backward can be transformed. It also
    # conjugates complex gradients.
    if current_level() or rows.is_complex():
        out = _product(rows, weight, bias)
    else:
        out = _Linear.apply(rows, weight, bias, columns and x.dim() == 3)  # type: ignore[no-untyped-call]
    return out if x.dim() == 3 else unsafe_view(out, (*x.shape[:-1], out.shape[-1]))


def linear_of_shared(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Maps x (…, I) that all models share, in one matrix product → (…, M, O)."""
    out = F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())
    return split_dim(out, out.dim() - 1, len(weight))


def kernel(
    x: tuple[Tensor, Dim], weight: tuple[Tensor, Dim], bias: tuple[Tensor | None, Dim], columns: bool = False
) -> Batched:
    """Chooses the product for operands with the models at any dimension."""
    batch = batch_size(weight)
    w = models_first(*weight, batch)
    b = None if bias[0] is None else models_first(bias[0], bias[1], batch)
    if x[1] is None:
        return linear_of_shared(x[0], w, b), x[0].dim() - 1
    return linear(models_first(*x, batch), w, b, columns), 0


def _rule(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not is_batched(weight) or weight.dim() != 2:
        return NotImplemented
    return lift(kernel, input, weight, bias)


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.einsum("...i,oij,...j->...o", input1, weight, input2)
    return out if bias is None else out + bias


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


# vmap would compute the last two model by model; in parts it can batch them.
RULES: dict[Callable[..., Any], Callable[..., Any]] = {F.linear: _rule, F.bilinear: _bilinear}
if weight_norm is not None:
    RULES[weight_norm] = _weight_norm
