"""What TorchScript code computes: the graph of a scripted or traced module or function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol, cast

import torch

# Counts what was scripted before in the process.
_MANGLED = re.compile(r"___torch_mangle_\d+\.")


class _Node(Protocol):
    def hasAttribute(self, name: str) -> bool: ...
    def kindOf(self, name: str) -> str: ...
    def s(self, name: str) -> str: ...
    def t(self, name: str) -> torch.Tensor: ...
    def f(self, name: str) -> float: ...


class _Graph(Protocol):
    def findAllNodes(self, kind: str) -> list[_Node]: ...
    def str(self, print_source_ranges: bool) -> str: ...


def _graph(code: object) -> _Graph | None:
    # A module without a forward has none.
    return cast("_Graph | None", getattr(code, "inlined_graph", None))


def program(code: object, tensors: Callable[[torch.Tensor], bytes]) -> object:
    """The graph's text, and the constants that the text rounds or cuts short."""
    graph = _graph(code)
    if graph is None:
        return None
    constants: list[bytes | float] = []
    for node in graph.findAllNodes("prim::Constant"):
        kind = node.kindOf("value") if node.hasAttribute("value") else None
        if kind == "t":
            constants.append(tensors(node.t("value")))
        elif kind == "f":
            constants.append(node.f("value"))
    return _MANGLED.sub("", graph.str(False)), constants


def attributes_read(module: torch.jit.ScriptModule) -> list[tuple[str, object]]:
    """The attributes that the module's graph reads, save for its mode."""
    graph = _graph(module)
    names = {node.s("name") for node in graph.findAllNodes("prim::GetAttr")} if graph else set()
    return [(name, getattr(module, name, None)) for name in sorted(names - {"training"})]
