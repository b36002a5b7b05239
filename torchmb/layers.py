"""torch's layers for M models on merged data (B · M, …), to build networks from that are batched throughout.

Each takes the arguments of its counterpart and, after the last that is neither device nor dtype, `batch`, 1 if it is
not given; parameters and buffers have the counterpart's names and a leading dimension M. Every model is initialised on
its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from .base import AbstractBatchModule, split_batch
from .layer_kernels import run_layer
from .state import plain_attributes, stack_tensors


def _with_batch(layer: type[nn.Module]) -> Signature:
    own = [p for p in signature(layer).parameters.values() if not p.name.startswith("_")]
    after = [p for p in own if p.name in ("device", "dtype") or p.kind is Parameter.KEYWORD_ONLY]
    before = [p for p in own if p not in after]
    return Signature([*before, Parameter("batch", Parameter.POSITIONAL_OR_KEYWORD, default=1), *after])


class _BatchLayer(AbstractBatchModule):
    """A layer that runs as its counterpart does within a BatchModule."""

    __signature__: ClassVar[Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _with_batch(cls.base_class)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.__signature__.bind(*args, **kwargs).arguments
        super().__init__(given.pop("batch", 1))
        self._take([self.base_class(**given) for _ in range(self.batch)])

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

    def forward(self, input: Tensor) -> Tensor:
        """(B · M, …), index b * M + m → the same order."""
        models_second = split_batch(input, self.batch).transpose(0, 1)
        out, dim = run_layer(self, self.base_class, models_second, 1, self.batch)
        return (out if dim is None else out.movedim(dim, 1)).flatten(0, 1)

    def extra_repr(self) -> str:
        return f"{self.base_class.extra_repr(self)}, batch={self.batch}"


class BatchLinear(_BatchLayer):
    base_class = nn.Linear


class BatchConv1d(_BatchLayer):
    base_class = nn.Conv1d


class BatchConv2d(_BatchLayer):
    base_class = nn.Conv2d


class BatchConv3d(_BatchLayer):
    base_class = nn.Conv3d


class _BatchConvTranspose(_BatchLayer):
    base_class: type[nn.Module] = _ConvTransposeNd

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B · M, …), index b * M + m → the same order. `output_size`: as the counterpart takes it."""
        layer: Any = copy(self)
        if output_size is not None:
            options = layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation
            layer.output_padding = tuple(_ConvTransposeNd._output_padding(layer, input, output_size, *options))
        return _BatchLayer.forward(layer, input)


class BatchConvTranspose1d(_BatchConvTranspose):
    base_class = nn.ConvTranspose1d


class BatchConvTranspose2d(_BatchConvTranspose):
    base_class = nn.ConvTranspose2d


class BatchConvTranspose3d(_BatchConvTranspose):
    base_class = nn.ConvTranspose3d


class BatchBatchNorm1d(_BatchLayer):
    base_class = nn.BatchNorm1d


class BatchBatchNorm2d(_BatchLayer):
    base_class = nn.BatchNorm2d


class BatchBatchNorm3d(_BatchLayer):
    base_class = nn.BatchNorm3d


class BatchGroupNorm(_BatchLayer):
    base_class = nn.GroupNorm


class BatchLayerNorm(_BatchLayer):
    base_class = nn.LayerNorm


class BatchEmbedding(_BatchLayer):
    """Gradients are never sparse."""

    base_class = nn.Embedding
