"""Attention: models and rows as one batch of torch's fused kernel; multi-head attention in its parts."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..functorch import Batched, batch_size, is_batched, lift, models_first, split_dim


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    operands = (query, key, value, attn_mask)
    if query.dim() < 3 or not any(is_batched(x) for x in operands):
        return NotImplemented

    def kernel(*given: Batched) -> Batched:
        batch = batch_size(*given)
        q, k, v = (models_first(x, dim, batch) for x, dim in given[:3])
        mask, dim = given[3]
        if mask is not None:
            mask = models_first(mask, dim, batch)
            mask = mask.view(batch, *[1] * (q.dim() - mask.dim()), *mask.shape[1:]).expand(*q.shape[:-1], k.shape[-2])
            mask = mask.flatten(0, 1)
        given_all = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, *args)
        return split_dim(F.scaled_dot_product_attention(*given_all, **kwargs), 0, batch), 0

    return lift(kernel, *operands)


RULES = {F.scaled_dot_product_attention: _attention}

# A mode sees this Python function of torch as one call, in which no rule applies. A copy that does not look for
# overrides runs as if the model had called its parts.
_ATTENTION = F.multi_head_attention_forward
OPENED = {
    _ATTENTION: FunctionType(
        _ATTENTION.__code__,
        {**vars(F), "has_torch_function": lambda _: False},
        _ATTENTION.__name__,
        _ATTENTION.__defaults__,
    )
}
