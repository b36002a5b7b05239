"""What an object holds, as values that can be encoded: tensors by their bytes, others by what pickle would keep."""

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

# Objects that have no influence on what is computed.
_WITHOUT_VALUE = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Thread, threading.local, Executor),
    *(logging.Logger, logging.LoggerAdapter, logging.Handler, type(os.environ)),
    torch.utils.hooks.RemovableHandle,
)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor by value: the same for equal tensors."""
    parts = (tensor.dtype, tuple(tensor.shape), digests([tensor])[0])
    return encode((*parts, scales(tensor)) if tensor.is_quantized else parts)


def configuration(value: object) -> dict[str, object] | None:
    """What ``to_dict()`` of a configuration object returns; None for objects without such a method that works."""
    if isinstance(value, (type, torch.Tensor, torch.nn.Module)):
        return None
    try:
        values = value.to_dict()  # type: ignore[attr-defined]
        return {str(name): values[name] for name in sorted(values, key=str)} if isinstance(values, dict) else None
    except Exception:  # attributes of the user's classes may raise anything
        return None


def definition(value: object) -> object:
    """What ``torch.library.custom_op`` gave for an operator; other objects, and operators of C++, as they are."""
    packet = value.overloadpacket if isinstance(value, _OperatorOverload) else value
    if not isinstance(packet, _OperatorPacket):
        return value
    in_python = operator_definition(packet)
    return value if in_python is None else in_python


def users_operators(names: set[str]) -> list[Operator]:
    """The user's operators that code with these names may call, however it gets to ``torch.ops``."""
    named = [op for op in operators() if op.name in names and op.namespace in names]
    return [op for op in named if of_function(op.function) is None]


def is_without_value(value: object) -> bool:
    """Whether an object, such as a lock or a logger, has no influence on what is computed."""
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
    return isinstance(value, _WITHOUT_VALUE) or any(value is stream for stream in streams)


def array_bytes(value: object) -> bytes | None:
    """Encodes a NumPy array or scalar by value; None for other objects, and for arrays of references to objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    if value.dtype.hasobject:
        return None
    return encode(("array", str(value.dtype), value.shape, value.tobytes()))


def pickled(value: object) -> object | None:
    """What pickle would keep of an object; None if it cannot be pickled."""
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
    except Exception:  # a class may raise anything
        return None


def _reduced(value: object) -> Any:
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        return value.__reduce_ex__(2) if reduce is None else reduce(value)
    except Exception:
        if of_module(type(value).__module__) is not None or not attributes_of(value):
            raise
        return type(value), (), dict(attributes_of(value))  # a class of the user's that forbids pickling


def bound_object(function: object) -> object | None:
    """The object that a C function is bound to; None for a function of a module or class."""
    if not isinstance(function, types.BuiltinFunctionType):
        return None
    bound = function.__self__
    return None if isinstance(bound, (types.ModuleType, type)) else bound
