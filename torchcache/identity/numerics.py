"""The settings of the process that change numbers: autocast, dtypes, precision of matrix products, determinism."""

from __future__ import annotations

import functools
from typing import Any

import torch

from torchcache._utils.torch_private import (
    fp32_precision,
    is_deterministic,
    reduced_precision_in_cuda,
    reduced_precision_on_cpu,
)
from torchcache.identity.encoding import encode

_default_dtype = torch.get_default_dtype
_autocast_enabled = torch.is_autocast_enabled

_FLOAT = torch.float32
# The smallest float that is not denormal: half of it is 0 where denormal numbers are flushed.
_SMALLEST = 2.0**-1022
_OPERATORS = ("matmul", "conv", "rnn")
_SAME = {"ieee": "none"}  # torch.set_float32_matmul_precision("highest") says so of what was "none" before
# Type of devices → its backend, and the settings that torch starts with.
_BACKENDS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "cpu": ("mkldnn", ("none", "none", "none", False, False, False)),
    "cuda": ("cuda", ("none", "tf32", "tf32", False, False, ((True, True), (True, True), False))),
}


def autocast(device_type: str) -> bytes:
    """Autocast of a type of devices: off, or its dtype; and the default dtype, unless that is float32.

    On every device the same dtypes give the same bytes.
    """
    default = _default_dtype()
    enabled = _autocast_enabled(device_type)
    if not enabled and default is _FLOAT:
        return b""
    dtype = torch.get_autocast_dtype(device_type) if enabled else None
    return encode(dtype) if default is _FLOAT else encode((dtype, default))


def precision(device_type: str) -> bytes:
    """The settings that change the precision of operators on a type of devices; empty where all have their defaults."""
    backend, normal = _BACKENDS.get(device_type) or _BACKENDS["cuda"]
    settings = (
        *[_SAME.get(name, name) for name in [fp32_precision(backend, operator) for operator in _OPERATORS]],
        is_deterministic(),
        _SMALLEST / 2 == 0.0,
        reduced_precision_in_cuda() if backend == "cuda" else reduced_precision_on_cpu(),
    )
    return b"" if settings == normal else _encoded(settings, device_type)


@functools.lru_cache(maxsize=256)
def _encoded(settings: tuple[Any, ...], device_type: str) -> bytes:
    return encode((device_type, settings))
