"""Embedding: one table of M · V rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, Dim, batch_size, is_batched, lift, models_first


def embedding(
    indices: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Looks up indices (M, …) in weight (M, V, D) → (M, …, D). Rows of `padding_idx` get no gradient.

    Rows longer than `max_norm` are shortened in the weight itself, so the table must be a view of it.
    """
    batch, rows, _ = weight.shape
    if indices.numel() and (indices.min() < 0 or indices.max() >= rows):
        raise IndexError(f"index out of range: an embedding of {rows} rows got {indices.min()} to {indices.max()}")
    first = torch.arange(0, batch * rows, rows, device=indices.device).view(-1, *[1] * (indices.dim() - 1))
    table = weight.view(batch * rows, -1) if max_norm is not None else weight.flatten(0, 1)
    out = F.embedding(indices + first, table, None, max_norm, norm_type, scale_grad_by_freq)
    if padding_idx is None:
        return out
    return torch.where((indices == padding_idx % rows).unsqueeze(-1), out.detach(), out)


def _rule(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if not is_batched(weight) or weight.dim() != 2:
        return NotImplemented

    def kernel(indices: tuple[Tensor, Dim], table: tuple[Tensor, Dim]) -> Batched:
        batch = batch_size(table)
        given = models_first(*indices, batch), models_first(*table, batch)
        return embedding(*given, padding_idx, max_norm, norm_type, scale_grad_by_freq), 0

    return lift(kernel, input, weight)


RULES = {F.embedding: _rule}
