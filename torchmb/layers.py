"""torch's layers for M models on merged data (B · M, …), to build networks from that are batched throughout.

Each takes the arguments of its counterpart and, after them, `batch`; parameters and buffers have the counterpart's
names and a leading dimension M. Every model is initialised on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .base import AbstractBatchModule, split_batch
from .exact import run_layer
from .state import plain_attributes, stack_tensors

Sizes = int | tuple[int, ...]
Device = torch.device | str | None
Dtype = torch.dtype | None


class _BatchLayer(AbstractBatchModule):
    """A layer that runs as its counterpart does within a BatchModule."""

    def __init__(self, batch: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(batch)
        self._take([self.base_class(*args, **kwargs) for _ in range(self.batch)])

    @classmethod
    def from_module(cls, module: nn.Module, batch: int) -> _BatchLayer:
        self = cls.__new__(cls)
        AbstractBatchModule.__init__(self, batch)
        self._take([module] * self.batch)
        return self

    def _take(self, modules: Sequence[nn.Module]) -> None:
        first = modules[0]
        self.__dict__.update(plain_attributes(first))
        stacked = stack_tensors(modules, lambda _: False)
        for name, parameter in first._parameters.items():
            self.register_parameter(name, None if parameter is None else stacked[id(parameter)])  # type: ignore[arg-type]
        for name, buffer in first._buffers.items():
            self.register_buffer(name, None if buffer is None else stacked[id(buffer)])
        self.training = first.training

    def forward(self, x: Tensor) -> Tensor:
        """(B · M, …), index b * M + m → the same order."""
        models_second = split_batch(x, self.batch).transpose(0, 1)
        out, dim = run_layer(self, self.base_class, models_second, 1, self.batch)
        return (out if dim is None else out.movedim(dim, 1)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.base_class.extra_repr(self)}, batch={self.batch}"


class BatchLinear(_BatchLayer):
    base_class = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(batch, in_features, out_features, bias, device=device, dtype=dtype)


class _BatchConv(_BatchLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, dilation, groups
        super().__init__(batch, *shape, bias, padding_mode, device=device, dtype=dtype)


class BatchConv1d(_BatchConv):
    base_class = nn.Conv1d


class BatchConv2d(_BatchConv):
    base_class = nn.Conv2d


class BatchConv3d(_BatchConv):
    base_class = nn.Conv3d


class _BatchConvTranspose(_BatchLayer):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        stride: Sizes = 1,
        padding: Sizes = 0,
        output_padding: Sizes = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Sizes = 1,
        padding_mode: str = "zeros",
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        shape = in_channels, out_channels, kernel_size, stride, padding, output_padding, groups
        super().__init__(batch, *shape, bias, dilation, padding_mode, device=device, dtype=dtype)


class BatchConvTranspose1d(_BatchConvTranspose):
    base_class = nn.ConvTranspose1d


class BatchConvTranspose2d(_BatchConvTranspose):
    base_class = nn.ConvTranspose2d


class BatchConvTranspose3d(_BatchConvTranspose):
    base_class = nn.ConvTranspose3d


class _BatchBatchNorm(_BatchLayer):
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
        **keywords: Any,  # of newer versions of torch, such as bias
    ) -> None:
        super().__init__(
            batch, num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype, **keywords
        )


class BatchBatchNorm1d(_BatchBatchNorm):
    base_class = nn.BatchNorm1d


class BatchBatchNorm2d(_BatchBatchNorm):
    base_class = nn.BatchNorm2d


class BatchBatchNorm3d(_BatchBatchNorm):
    base_class = nn.BatchNorm3d


class BatchGroupNorm(_BatchLayer):
    base_class = nn.GroupNorm

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
        **keywords: Any,  # of newer versions of torch, such as bias
    ) -> None:
        super().__init__(batch, num_groups, num_channels, eps, affine, device=device, dtype=dtype, **keywords)


class BatchLayerNorm(_BatchLayer):
    base_class = nn.LayerNorm

    def __init__(
        self,
        normalized_shape: Sizes | list[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__(batch, normalized_shape, eps, elementwise_affine, bias, device=device, dtype=dtype)


class BatchEmbedding(_BatchLayer):
    """`max_norm` is not supported, and gradients are never sparse."""

    base_class = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        batch: int = 1,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        options = padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
        super().__init__(batch, num_embeddings, embedding_dim, *options, device=device, dtype=dtype)
