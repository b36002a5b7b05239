"""What an object holds, as values that can be encoded: tensors by their bytes, others by what pickling would keep."""

from __future__ import annotations

import copyreg
import logging
import os
import sys
import threading
import types
import weakref
from concurrent.futures import Executor
from typing import Any

import torch

from torchcache._utils.torch_private import Operator, operator_definition, operators
from torchcache.identity.encoding import encode
from torchcache.identity.origin import attributes_of, of_function, of_module
from torchcache.identity.state import digests, scales

_OperatorPacket, _OperatorOverload = type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor)
OPERATORS = (_OperatorOverload, _OperatorPacket)

# They say nothing about what is computed.
_WITHOUT_VALUE = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.local, Executor),
    *(logging.Logger, logging.LoggerAdapter, logging.Handler, type(os.environ)),
    torch.utils.hooks.RemovableHandle,
)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor by value: the same for equal tensors."""
    parts = (tensor.dtype, tuple(tensor.shape), digests([tensor])[0])
    return encode((*parts, scales(tensor)) if tensor.is_quantized else parts)


def settings(value: object) -> dict[str, object] | None:
    """What ``to_dict()`` of a configuration says, by name, if it has such a method that works."""
    if isinstance(value, (type, torch.Tensor, torch.nn.Module)):
        return None
    try:
        found = value.to_dict()  # type: ignore[attr-defined]
        return {str(name): found[name] for name in sorted(found, key=str)} if isinstance(found, dict) else None
    except Exception:  # attributes of the users' classes may raise what they like
        return None


def definition(value: object) -> object:
    """What defined an operator, if that was Python code (``torch.library.custom_op``); other objects as they are."""
    packet = value.overloadpacket if isinstance(value, _OperatorOverload) else value
    if not isinstance(packet, _OperatorPacket):
        return value
    found = operator_definition(packet)
    return value if found is None else found


def users_operators(names: set[str]) -> list[Operator]:
    """The user's operators that code with these names may call, in whatever way it comes to ``torch.ops``."""
    named = [op for op in operators() if op.name in names and op.namespace in names]
    return [op for op in named if of_function(op.function) is None]


def is_without_value(value: object) -> bool:
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
    return isinstance(value, _WITHOUT_VALUE) or any(value is stream for stream in streams)


def array(value: object) -> bytes | None:
    """A NumPy array or scalar, unless it holds references to objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    if value.dtype.hasobject:
        return None
    return encode(("array", str(value.dtype), value.shape, value.tobytes()))


def held(value: object) -> object | None:
    """What pickling would keep of an object, None if it cannot be pickled."""
    try:
        if isinstance(value, types.MappingProxyType):
            return ["mapping", dict(value)]
        if isinstance(value, weakref.ref):
            return ["reference", value()]
        if isinstance(value, OPERATORS):
            return ["operator", str(value)]
        reduced = _reduced(value)
        if isinstance(reduced, str):  # the name of a global
            return [type(value), reduced]
        parts = list(reduced)
        return [*parts[:3], *(None if part is None else list(part) for part in parts[3:5]), *parts[5:]]
    except Exception:  # a class may raise what it likes
        return None


def _reduced(value: object) -> Any:
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        return value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:
        if of_module(type(value).__module__) is not None or not attributes_of(value):
            raise
        return type(value), (), dict(attributes_of(value))  # a class of the user's that forbids pickling


def owner(function: object) -> object | None:
    """The object that a C function is bound to; modules and classes only hold it."""
    if not isinstance(function, types.BuiltinFunctionType):
        return None
    found = function.__self__
    return None if isinstance(found, (types.ModuleType, type)) else found
