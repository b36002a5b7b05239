"""The names that code written for torchmb 0.2 imports from torchmb.batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import Tracer as BatcherTracer

from .base import AbstractBatchModule, merge_batch, register_batch_module, split_batch
from .batch_module import BatchModule
from .check import check
from .layers import BatchBatchNorm2d, BatchConv2d, BatchLinear

__all__ = [
    "AbstractBatchModule",
    "BatchBatchNorm2d",
    "BatchConv2d",
    "BatchLinear",
    "BatchModule",
    "BatcherTracer",
    "merge_batch",
    "register_batch_module",
    "split_batch",
    "test_batch_module",
]


def test_batch_module(
    module: nn.Module, input_shapes: Sequence[Sequence[int]], batch: int = 3, rtol: float = 1e-6, atol: float = 1e-6
) -> None:
    """Compares a batch with separate models on random inputs, as torchmb 0.2 does.

    AssertionError if outputs or buffers differ.
    """
    inputs = [torch.randn(*shape) for shape in input_shapes]
    differences = check(module, *inputs, batch=batch, rtol=rtol, atol=atol)
    if differences := [line for line in differences if not line.startswith("gradient")]:
        raise AssertionError("\n".join(differences))


test_batch_module.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it
