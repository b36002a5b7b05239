"""What TorchScript code computes: the graph of a scripted or traced module or function."""

from __future__ import annotations

import os
import re
from typing import Protocol, cast

import torch

from torchcache._utils.torch_private import UNKNOWN, compiled_forward, script_type_name
from torchcache.identity.encoding import Unencodable, encode
from torchcache.identity.tensors import tensor_bytes

# The number of what the process scripted before, and the addresses of objects.
_ACCIDENTAL = re.compile(r"___torch_mangle_\d+\.|\b0x[0-9a-f]+")


class _Value(Protocol):
    def type(self) -> object: ...


class _Node(Protocol):
    def hasAttribute(self, name: str) -> bool: ...
    def kindOf(self, name: str) -> str: ...
    def s(self, name: str) -> str: ...
    def t(self, name: str) -> torch.Tensor: ...
    def f(self, name: str) -> float: ...
    def ival(self, name: str) -> object: ...
    def output(self) -> _Value: ...


class _Graph(Protocol):
    def findAllNodes(self, kind: str) -> list[_Node]: ...
    def str(self, print_source_ranges: bool) -> str: ...


def _graph(code: object) -> _Graph | None:
    compiled = compiled_forward(code) if isinstance(code, torch.jit.ScriptModule) else code
    return cast("_Graph | None", getattr(compiled, "inlined_graph", None))


def program(code: object) -> object:
    """Describes the graph by its text, and by the constants that the text rounds, shortens or leaves out."""
    graph = _graph(code)
    if graph is None:
        return UNKNOWN if isinstance(code, torch.jit.ScriptModule) and compiled_forward(code) is UNKNOWN else None
    constants: list[bytes] = []
    for node in graph.findAllNodes("prim::Constant"):
        kind = node.kindOf("value") if node.hasAttribute("value") else None
        if kind == "t":  # by value: each call gives a new tensor
            constants.append(tensor_bytes(node.t("value")))
        elif kind == "f":
            constants.append(encode(node.f("value")))
        elif kind == "ival":
            constants.append(_by_value(node.ival("value")))
    return _ACCIDENTAL.sub("", graph.str(False)), constants, _objects(code, graph)


def _objects(code: object, graph: _Graph) -> list[bytes]:
    """Describes the C++ objects of the module and its submodules, such as packed weights, that the graph reads."""
    read = graph.findAllNodes("prim::GetAttr")
    names = sorted({node.s("name") for node in read if "torch.classes" in str(node.output().type())})
    modules = code.modules() if names and isinstance(code, torch.jit.ScriptModule) else ()
    values = (getattr(module, name, None) for module in modules for name in names)
    return [_by_value(value) for value in values if isinstance(value, torch.ScriptObject)]


def _by_value(value: object) -> bytes:
    """Encodes lists, tuples and objects of TorchScript; as random bytes where one has no encoding."""
    try:
        return encode(value, _part)
    except Unencodable:
        return os.urandom(16)


def _part(value: object) -> bytes | None:
    if isinstance(value, torch.Tensor):
        return tensor_bytes(value)
    return script_object(value) if isinstance(value, torch.ScriptObject) else None


def script_object(value: torch.ScriptObject) -> bytes | None:
    """Encodes a C++ object, such as packed weights, as it is saved; None if it cannot be saved."""
    try:
        return encode((script_type_name(value), value.__getstate__()), _part)
    except Exception:  # C++ may raise anything
        return None


def attributes_read(module: torch.jit.ScriptModule) -> list[tuple[str, object]]:
    """The attributes that the module's graph reads, except for its mode."""
    graph = _graph(module)
    names = {node.s("name") for node in graph.findAllNodes("prim::GetAttr")} if graph else set()
    return [(name, getattr(module, name, None)) for name in sorted(names - {"training"})]
