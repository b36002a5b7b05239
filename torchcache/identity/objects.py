"""What an object holds, as values that can be encoded: tensors by their bytes, others by what pickle would keep."""

from __future__ import annotations

import contextvars
import copyreg
import functools
import logging
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from typing import Any

import torch

from torchcache._utils.torch_private import ConcreteModuleType, Operator, ScriptMethod, operator_definition, operators
from torchcache.identity.encoding import encode
from torchcache.identity.origin import attributes_of, of_function, of_module

_OperatorPacket, _OperatorOverload = type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor)
OPERATORS = (_OperatorOverload, _OperatorPacket)

# Objects that have no influence on what is computed.
_WITHOUT_VALUE = (
    *(type(threading.Lock()), type(threading.RLock()), threading.Thread, Executor),
    *(logging.Logger, logging.LoggerAdapter, logging.Handler, type(os.environ)),
    *(torch.utils.hooks.RemovableHandle, torch.Stream, torch.Event, ConcreteModuleType, ScriptMethod),
)
# What the code of a compiled or traced module was made from, and what called it.
_MACHINERY = ("torch._dynamo", "torch._inductor", "torch._functorch", "torch.fx", "torch.export", "torch._export")


def definition(value: object) -> object:
    """What ``torch.library.custom_op`` gave for an operator; other objects, and operators of C++, as they are."""
    packet = value.overloadpacket if isinstance(value, _OperatorOverload) else value
    if not isinstance(packet, _OperatorPacket):
        return value
    in_python = operator_definition(packet)
    return value if in_python is None else in_python


def users_operators(names: Collection[str]) -> list[Operator]:
    """The user's operators that code with these names may call, however it gets to ``torch.ops``."""
    named = [op for op in operators(names) if op.namespace in names]
    return [op for op in named if of_function(op.function) is None]


def is_without_value(value: object) -> bool:
    """Whether an object, such as a lock or a logger, has no influence on what is computed."""
    streams = (sys.stdin, sys.stdout, sys.stderr, sys.__stdin__, sys.__stdout__, sys.__stderr__)
    if isinstance(value, _WITHOUT_VALUE) or type(value).__module__.startswith(_MACHINERY):
        return not isinstance(value, torch.nn.Module)
    return any(value is stream for stream in streams)


def array_bytes(value: object) -> bytes | None:
    """Encodes a NumPy array or scalar by value; None for other objects, and for arrays of references to objects."""
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    if value.dtype.hasobject:
        return None
    return encode(("array", str(value.dtype), value.shape, value.tobytes()))


def pickled(value: object) -> list[object] | None:
    """What pickle would keep of an object; None if it cannot be pickled."""
    try:
        if isinstance(value, (threading.local, contextvars.ContextVar)):
            return ["of this thread", what_thread_reads(value)()]
        if isinstance(value, types.MappingProxyType):
            return ["mapping", dict(value)]
        if isinstance(value, weakref.ref):
            return ["reference", value()]
        if isinstance(value, OPERATORS):
            return ["operator", str(value)]
        reduced = _reduced(value)
        if isinstance(reduced, str):
            return [type(value), reduced] if _is_global(value, reduced) else None
        parts = list(reduced)
        return [*parts[:3], *(None if part is None else list(part) for part in parts[3:5]), *parts[5:]]
    except Exception:  # a class may raise anything
        return None


def what_thread_reads(value: threading.local | contextvars.ContextVar[Any]) -> Callable[[], Any]:
    """Gives what an object holds for the thread or the context that asks."""
    if isinstance(value, threading.local):
        return functools.partial(vars, value)
    return functools.partial(value.get, None)


def _is_global(value: object, name: str) -> bool:
    """Whether the name that pickle would keep stands for this object."""
    home = sys.modules.get(str(getattr(value, "__module__", None)))
    first, *rest = name.split(".")
    for module in list(sys.modules.values()) if home is None else [home]:
        found = attributes_of(module).get(first)
        for part in rest:
            found = getattr(found, part, None)
        if found is value:
            return True
    return False


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
