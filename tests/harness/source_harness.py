"""Descriptions of code and values, by the values of their tensors."""

from __future__ import annotations

import torch

from torchcache.identity.code import describe, describe_value


def tensors(tensor: torch.Tensor) -> bytes:
    return repr((tensor.dtype, tensor.tolist())).encode()


def of(obj: object) -> bytes:
    return describe(obj, tensors=tensors)


def value_of(value: object) -> bytes:
    return describe_value(value, tensors=tensors)
