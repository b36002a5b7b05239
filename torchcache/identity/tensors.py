"""The bytes of tensors: digests, and which of them are known already."""

from __future__ import annotations

import struct
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from torchcache._native import ops
from torchcache._utils.torch_private import versions
from torchcache.identity import optimizers
from torchcache.identity.encoding import encode

_MAX_REPLACED = 1024  # tensors that were replaced and may come back


class Unwatchable(Exception):
    """A tensor that a computation uses has no readable bytes: it is on the meta device, of a subclass, or freed."""


class Uninitialized(Unwatchable):
    """A parameter of a lazy module has no bytes before the first call."""


class _Known(NamedTuple):
    """The digest of a tensor as it was at a version and with a probe."""

    tensor: Tensor | weakref.ref[Tensor]
    version: object
    probe: int
    steps: int  # of optimizers
    digest: bytes

    def holds(self, tensor: Tensor, version: object, probe: int) -> bool:
        """Whether this is still the digest of the tensor."""
        if probe == 0 or tensor.is_inference() or (version, probe) != (self.version, self.probe):
            return False
        if self.object is not tensor or (tensor.requires_grad and self.steps == optimizers.UNKNOWN):
            return False
        return not optimizers.have_changed((id(tensor),), self.steps)

    @property
    def object(self) -> Tensor | None:
        return self.tensor() if isinstance(self.tensor, weakref.ref) else self.tensor


class TensorDigests:
    """Remembers digests by identity, version and probe, so that bytes that have not changed are not read again.

    It refers to tensors that are in use, and weakly to those that were replaced: torch cannot swap a tensor that has
    weak references (`torch.utils.swap_tensors`).
    """

    def __init__(self) -> None:
        self._known: dict[int, _Known] = {}

    def of(self, tensors: list[Tensor]) -> list[bytes]:
        """The digest of each tensor, 16 bytes each. These tensors are in use from now on, and no others."""
        steps, present = optimizers.steps(), versions(tensors)
        probes = ops.probes([plain_view(t) for t in tensors]) if tensors else []
        known = [self._known.get(id(t)) for t in tensors]
        marks = list(zip(tensors, present, probes))
        new = [i for i, (k, mark) in enumerate(zip(known, marks)) if k is None or not k.holds(*mark)]
        computed = dict(zip(new, digests([tensors[i] for i in new])))
        found = [computed[i] if k is None or i in computed else k.digest for i, k in enumerate(known)]
        in_use = {id(t): _Known(t, v, probe, steps, d) for (t, v, probe), d in zip(marks, found)}
        self._known = {**self._replaced(in_use), **in_use}
        return found

    def _replaced(self, in_use: dict[int, _Known]) -> dict[int, _Known]:
        others = [(key, known, known.object) for key, known in self._known.items() if key not in in_use]
        others = others[-_MAX_REPLACED:]
        return {key: k._replace(tensor=weakref.ref(tensor)) for key, k, tensor in others if tensor is not None}


def check_has_bytes(name: str, t: Tensor) -> None:
    """Raises Unwatchable or Uninitialized for a tensor without readable bytes."""
    if torch.nn.parameter.is_lazy(t):
        raise Uninitialized(name)
    if t.is_meta:
        raise Unwatchable(f"{name} is on the meta device")
    if type(t).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        raise Unwatchable(f"{name} is a {type(t).__name__}")


def digests(tensors: list[Tensor]) -> list[bytes]:
    """The digest of each tensor's bytes, 16 bytes each."""
    try:
        pairs = ops.digests([_one_row(t) for t in tensors]).tolist() if tensors else []
    except (RuntimeError, ValueError) as error:  # of a dtype that has no bytes, or without a storage
        raise Unwatchable(str(error)) from error
    return [struct.pack(">qq", high, low) for low, high in pairs]


def described(tensor: Tensor, digest: bytes) -> bytes:
    """Encodes dtype, shape, layout and quantisation of a tensor, and the digest of its bytes."""
    parts = (tensor.dtype, tuple(tensor.shape), str(tensor.layout))
    return encode((*parts, _scales(tensor)) if tensor.is_quantized else parts) + digest


def tensor_bytes(tensor: Tensor) -> bytes:
    """A tensor by value: the same for equal tensors."""
    parts = (tensor.dtype, tuple(tensor.shape), digests([tensor])[0])
    return encode((*parts, _scales(tensor)) if tensor.is_quantized else parts)


def plain_view(t: Tensor) -> Tensor:
    """The memory of a tensor for a probe; an empty tensor instead of one without strided memory.

    It is another object than `t`, since torch cannot swap a tensor that native code refers to.
    """
    if t.layout is not torch.strided or t.is_quantized or t.is_meta:
        return torch.empty(0, device="cpu")
    return ops.bits(t.detach())


def _one_row(t: Tensor) -> Tensor:
    t = t.detach()
    if t.layout is not torch.strided or t.is_quantized:
        t = t.to_dense() if not t.is_quantized else t.int_repr()
    return ops.hashable(t)


def _scales(tensor: Tensor) -> tuple[object, ...]:
    """The scales and zero points of a quantised tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    scales = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return tensor.q_per_channel_axis(), *(tuple(item.tolist()) for item in scales)
