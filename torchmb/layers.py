"""Torch's layers for M models on merged data (B · M, …), to build networks from that are batched throughout.

Each layer accepts the arguments of its counterpart and `batch` (1 by default), after the last argument that is neither
device nor dtype. Parameters and buffers have the counterpart's names and a leading dimension M. Every model is
initialised independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from inspect import Parameter, Signature, signature
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import AbstractBatchModule, split_batch
from .layer_kernels import run_layer
from .state import plain_attributes, stack_tensors
from .torch_private import buffers_of, parameters_of


def _with_batch(layer: type[nn.Module]) -> Signature:
    own = [p for p in signature(layer).parameters.values() if not p.name.startswith("_")]
    after = [p for p in own if p.name in ("device", "dtype") or p.kind is Parameter.KEYWORD_ONLY]
    before = [p for p in own if p not in after]
    return Signature([*before, Parameter("batch", Parameter.POSITIONAL_OR_KEYWORD, default=1), *after])


class _BatchLayer(AbstractBatchModule):
    """A layer that runs like its counterpart within a BatchModule."""

    __signature__: ClassVar[Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = _with_batch(cls.base_class)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = self.__signature__.bind(*args, **kwargs).arguments
        super().__init__(given.pop("batch", 1))
        self._fill([self.base_class(**given) for _ in range(self.batch)])

    @classmethod
    def from_module(cls, module: nn.Module, batch: int) -> _BatchLayer:
        """Returns a batch of layers like `module`, with its state."""
        self = cls.__new__(cls)
        AbstractBatchModule.__init__(self, batch)
        self._fill([module] * self.batch)
        return self

    def _fill(self, modules: Sequence[nn.Module]) -> None:
        first = modules[0]
        self.__dict__.update(plain_attributes(first))
        stacked = stack_tensors(modules)
        for name, parameter in parameters_of(first).items():
            self.register_parameter(name, None if parameter is None else stacked[id(parameter)])  # type: ignore[arg-type]
        for name, buffer in buffers_of(first).items():
            self.register_buffer(name, None if buffer is None else stacked[id(buffer)])
        self.training = first.training

    def forward(self, input: Tensor) -> Tensor:
        """Runs all models on merged data (B · M, …), index b * M + m → output in the same order.

        Raises:
            ValueError: The layer does not accept tensors of this shape.
        """
        models_second = split_batch(input, self.batch).transpose(0, 1)
        out, dim = run_layer(self, self.base_class, models_second, 1, self.batch)
        return (out if dim is None else out.movedim(dim, 1)).flatten(0, 1)

    def extra_repr(self) -> str:
        """The arguments of one layer, and M."""
        return f"{self.base_class.extra_repr(self)}, batch={self.batch}"


class BatchLinear(_BatchLayer):
    """M layers nn.Linear on merged data.

    Example:
        >>> layer = torchmb.BatchLinear(4, 2, batch=3)
        >>> layer(torch.zeros(6, 4)).shape
        torch.Size([6, 2])
    """

    base_class = nn.Linear


class BatchConv1d(_BatchLayer):
    """M layers nn.Conv1d on merged data.

    Example:
        >>> layer = torchmb.BatchConv1d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8)).shape
        torch.Size([6, 4, 6])
    """

    base_class = nn.Conv1d


class BatchConv2d(_BatchLayer):
    """M layers nn.Conv2d on merged data.

    Example:
        >>> layer = torchmb.BatchConv2d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8, 8)).shape
        torch.Size([6, 4, 6, 6])
    """

    base_class = nn.Conv2d


class BatchConv3d(_BatchLayer):
    """M layers nn.Conv3d on merged data.

    Example:
        >>> layer = torchmb.BatchConv3d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8, 8, 8)).shape
        torch.Size([6, 4, 6, 6, 6])
    """

    base_class = nn.Conv3d


class _WithOutputSize:
    """The additional argument of transposed convolutions."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Runs all models on merged data (B · M, …), index b * M + m → output in the same order.

        Args:
            input: Merged data.
            output_size: The spatial output sizes, as for the counterpart.

        Raises:
            ValueError: The layer does not accept tensors of this shape, or cannot have this output size.
        """
        layer: Any = copy(self)
        if output_size is not None:
            layer.output_padding = _output_padding(layer, input.shape, list(output_size))
        return _BatchLayer.forward(layer, input)


def _output_padding(layer: Any, shape: Sequence[int], output_size: list[int]) -> tuple[int, ...]:
    """Rows to add at one side of each spatial dimension. ValueError if the layer cannot have this output size."""
    spatial = len(layer.kernel_size)
    sizes = output_size[2:] if len(output_size) == spatial + 2 else output_size
    if len(sizes) != spatial:
        raise ValueError(f"output_size must have {spatial} or {spatial + 2} elements, got {len(output_size)}")
    options = zip(shape[2:], layer.stride, layer.padding, layer.dilation, layer.kernel_size)
    smallest = [(size - 1) * s - 2 * p + d * (k - 1) + 1 for size, s, p, d, k in options]
    largest = [size + s - 1 for size, s in zip(smallest, layer.stride)]
    if any(not a <= size <= b for a, size, b in zip(smallest, sizes, largest)):
        raise ValueError(
            f"requested an output size of {sizes}, but valid sizes range from {smallest} to {largest} "
            f"(for an input of {tuple(shape[2:])})"
        )
    return tuple(size - a for size, a in zip(sizes, smallest))


class BatchConvTranspose1d(_WithOutputSize, _BatchLayer):
    """M layers nn.ConvTranspose1d on merged data.

    Example:
        >>> layer = torchmb.BatchConvTranspose1d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8)).shape
        torch.Size([6, 4, 10])
    """

    base_class = nn.ConvTranspose1d


class BatchConvTranspose2d(_WithOutputSize, _BatchLayer):
    """M layers nn.ConvTranspose2d on merged data.

    Example:
        >>> layer = torchmb.BatchConvTranspose2d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8, 8)).shape
        torch.Size([6, 4, 10, 10])
    """

    base_class = nn.ConvTranspose2d


class BatchConvTranspose3d(_WithOutputSize, _BatchLayer):
    """M layers nn.ConvTranspose3d on merged data.

    Example:
        >>> layer = torchmb.BatchConvTranspose3d(1, 4, 3, batch=3)
        >>> layer(torch.zeros(6, 1, 8, 8, 8)).shape
        torch.Size([6, 4, 10, 10, 10])
    """

    base_class = nn.ConvTranspose3d


class BatchBatchNorm1d(_BatchLayer):
    """M layers nn.BatchNorm1d on merged data.

    Example:
        >>> layer = torchmb.BatchBatchNorm1d(4, batch=3)
        >>> layer(torch.zeros(6, 4)).shape
        torch.Size([6, 4])
    """

    base_class = nn.BatchNorm1d


class BatchBatchNorm2d(_BatchLayer):
    """M layers nn.BatchNorm2d on merged data.

    Example:
        >>> layer = torchmb.BatchBatchNorm2d(4, batch=3)
        >>> layer(torch.zeros(6, 4, 8, 8)).shape
        torch.Size([6, 4, 8, 8])
    """

    base_class = nn.BatchNorm2d


class BatchBatchNorm3d(_BatchLayer):
    """M layers nn.BatchNorm3d on merged data.

    Example:
        >>> layer = torchmb.BatchBatchNorm3d(4, batch=3)
        >>> layer(torch.zeros(6, 4, 8, 8, 8)).shape
        torch.Size([6, 4, 8, 8, 8])
    """

    base_class = nn.BatchNorm3d


class BatchGroupNorm(_BatchLayer):
    """M layers nn.GroupNorm on merged data.

    Example:
        >>> layer = torchmb.BatchGroupNorm(2, 4, batch=3)
        >>> layer(torch.zeros(6, 4, 8)).shape
        torch.Size([6, 4, 8])
    """

    base_class = nn.GroupNorm


class BatchLayerNorm(_BatchLayer):
    """M layers nn.LayerNorm on merged data.

    Example:
        >>> layer = torchmb.BatchLayerNorm(4, batch=3)
        >>> layer(torch.zeros(6, 4)).shape
        torch.Size([6, 4])
    """

    base_class = nn.LayerNorm


class BatchEmbedding(_BatchLayer):
    """M layers nn.Embedding on merged data. Gradients are never sparse.

    Example:
        >>> layer = torchmb.BatchEmbedding(10, 4, batch=3)
        >>> layer(torch.arange(6)).shape
        torch.Size([6, 4])
    """

    base_class = nn.Embedding
