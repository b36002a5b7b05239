"""The layout of an output: everything but the values of its rows, that is nesting, dtypes and shapes of a row.

A leaf is one tensor of an output, batched in dimension 0. Rows of equal layouts share arenas and blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchcache._utils.lazy import remembered

# The nesting: "*" for a leaf, None for None, else (kind, …): see `_tree_to_json`.
Tree = Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of an output.

    Attributes:
        dtype: the dtype of the output.
        stored: the dtype of stored rows, which ``cache_dtype`` changes.
        shape: the shape of one row.
        device: the device of the output; None: that of the input.
    """

    dtype: torch.dtype
    stored: torch.dtype
    shape: tuple[int, ...]
    device: str | None

    @remembered
    def row_bytes(self) -> int:
        """The size of a stored row."""
        return self.stored.itemsize * functools.reduce(int.__mul__, self.shape, 1)

    def restore(self, rows: Tensor, input_device: torch.device) -> Tensor:
        """Stored rows ``[B, …]`` with the dtype and device of the output."""
        device = input_device if self.device is None else torch.device(self.device)
        return rows.to(device, non_blocking=device.type == "cuda" and rows.is_pinned()).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The nesting of an output, and its leaves. `of` makes all of them, so equal ones share JSON and hash."""

    tree: Tree
    leaves: tuple[Leaf, ...]

    @staticmethod
    def of(tree: Tree, leaves: tuple[tuple[torch.dtype, torch.dtype, tuple[int, ...], str | None], ...]) -> Layout:
        """The one layout of this tree, with leaves of these fields."""
        return _layout(tree, leaves)

    def __hash__(self) -> int:
        return self._hash

    @remembered
    def _hash(self) -> int:
        return hash((self.tree, self.leaves))

    @remembered
    def row_bytes(self) -> int:
        """The size of a stored row, with all leaves."""
        return sum(leaf.row_bytes for leaf in self.leaves)

    @remembered
    def verbatim(self) -> bool:
        """Whether outputs have the stored dtypes and the device of the input."""
        return all(leaf.stored is leaf.dtype and leaf.device is None for leaf in self.leaves)

    @remembered
    def no_rows(self) -> list[Tensor]:
        """Leaves ``[0, …]`` in the stored dtypes, on the CPU."""
        with torch.inference_mode(False):
            return [torch.empty((0, *leaf.shape), dtype=leaf.stored, device="cpu") for leaf in self.leaves]

    @remembered
    def json(self) -> str:
        """The canonical JSON that blocks hold: see docs/format.md."""
        leaves = []
        for leaf in self.leaves:
            entry: dict[str, Any] = {
                "dtype": _dtype_name(leaf.dtype),
                "stored": _dtype_name(leaf.stored),
                "shape": list(leaf.shape),
            }
            if leaf.device is not None:
                entry["device"] = leaf.device
            leaves.append(entry)
        return json.dumps(
            {"tree": _tree_to_json(self.tree), "leaves": leaves},
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Layout | None:
        """The layout of this JSON; None if it is invalid, or of a class that this process has not imported."""
        try:
            data = json.loads(text)
            leaves = tuple(
                (
                    _dtype_from_name(leaf["dtype"]),
                    _dtype_from_name(leaf["stored"]),
                    tuple(_size(n) for n in leaf["shape"]),
                    str(torch.device(leaf["device"])) if "device" in leaf else None,
                )
                for leaf in data["leaves"]
            )
            tree = _tree_from_json(data["tree"], depth=0)
            return cls.of(tree, leaves) if _count_leaves(tree) == len(leaves) else None
        except (ValueError, TypeError, AttributeError, LookupError, RuntimeError):
            return None

    def restore(self, leaves: list[Tensor], input_device: torch.device) -> list[Tensor]:
        """Stored leaves ``[B, …]`` with the dtypes and devices of the output."""
        return [leaf.restore(rows, input_device) for leaf, rows in zip(self.leaves, leaves)]

    def join(self, tensors: list[Tensor]) -> Any:
        """The output that has these leaves ``[B, …]``."""
        if self.tree == "*":
            return tensors[0]
        return _build(self.tree, iter(tensors))


@functools.lru_cache(maxsize=1024)
def _layout(tree: Tree, leaves: tuple[tuple[Any, ...], ...]) -> Layout:
    return Layout(tree, tuple(Leaf(*fields) for fields in leaves))


# torch cannot gather or copy rows of these dtypes, but of dtypes of the same size.
_MOVED_AS = {
    **{getattr(torch, f"uint{n}"): getattr(torch, f"int{n}") for n in (16, 32, 64)},
    **{getattr(torch, name): torch.uint8 for name in dir(torch) if name.startswith(("float8_", "float4_"))},
}


def movable(t: Tensor) -> Tensor:
    """The same bits in a dtype whose rows torch can gather."""
    dtype = _MOVED_AS.get(t.dtype)
    return t if dtype is None else t.view(dtype)


def select(t: Tensor, rows: Tensor) -> Tensor:
    """``t.index_select(0, rows)`` for every dtype."""
    return movable(t).index_select(0, rows).view(t.dtype) if t.dtype in _MOVED_AS else t.index_select(0, rows)


def is_node(kind: Any) -> bool:
    """Whether outputs may be instances of this class. No other class is instantiated for a stored layout."""
    if not isinstance(kind, type):
        return False
    named_tuple = issubclass(kind, tuple) and (hasattr(kind, "_fields") or is_return_type(kind))
    return named_tuple or dataclasses.is_dataclass(kind) or kind.__mro__[:2] == _ORDERED_DICT


def is_return_type(kind: type) -> bool:
    """Whether the class is a named tuple that functions of torch return, whose constructor needs one sequence."""
    return kind.__module__ == "torch.return_types"


_ORDERED_DICT = OrderedDict.__mro__[:2]


def _build(tree: Tree, tensors: Iterator[Tensor]) -> Any:
    if tree == "*":
        return next(tensors)
    if tree is None:
        return None
    kind, *rest = tree
    if kind == "tuple":
        return tuple(_build(t, tensors) for t in rest)
    if kind == "list":
        return [_build(t, tensors) for t in rest]
    if kind == "dict":
        return {key: _build(t, tensors) for key, t in rest}
    constructor, *fields = rest
    values = {name: _build(t, tensors) for name, t in fields}
    if is_return_type(constructor):
        return constructor(values.values())
    return (
        constructor(values)
        if issubclass(constructor, dict) and not dataclasses.is_dataclass(constructor)
        else constructor(**values)
    )


def _tree_to_json(tree: Tree) -> Any:
    if tree == "*" or tree is None:
        return tree
    kind, *rest = tree
    if kind in ("tuple", "list"):
        return [kind, *(_tree_to_json(t) for t in rest)]
    head: list[Any] = [kind]
    if kind == "class":
        constructor, *rest = rest
        head.append(f"{constructor.__module__}:{constructor.__qualname__}")
    return [*head, *([key, _tree_to_json(t)] for key, t in rest)]


_MAX_DEPTH = 100


def _tree_from_json(data: Any, depth: int) -> Tree:
    if data == "*" or data is None:
        return data
    if depth > _MAX_DEPTH or not isinstance(data, list):
        raise ValueError("not a tree")
    kind, *rest = data
    if kind in ("tuple", "list"):
        return (kind, *(_tree_from_json(t, depth + 1) for t in rest))
    if kind == "dict":
        return ("dict", *((_plain_key(k), _tree_from_json(t, depth + 1)) for k, t in rest))
    if kind == "class":
        return (
            "class",
            _find_class(rest[0]),
            *((str(k), _tree_from_json(t, depth + 1)) for k, t in rest[1:]),
        )
    raise ValueError("not a tree")


def _plain_key(key: Any) -> str | int:
    if type(key) not in (str, int, bool):
        raise ValueError("not a key")
    return key  # type: ignore[no-any-return]


def _find_class(name: str) -> type:
    """A class of a module that is already imported. A stored layout never causes an import."""
    module, _, path = name.partition(":")
    cls: Any = sys.modules[module]
    for part in path.split("."):
        cls = cls.__dict__[part]
    if not is_node(cls) or f"{cls.__module__}:{cls.__qualname__}" != name:
        raise LookupError(name)
    return cls  # type: ignore[no-any-return]


def _count_leaves(tree: Tree) -> int:
    if tree == "*" or tree is None:
        return 1 if tree == "*" else 0
    kind, *rest = tree
    if kind in ("tuple", "list"):
        return sum(_count_leaves(t) for t in rest)
    return sum(_count_leaves(t) for _, t in (rest[1:] if kind == "class" else rest))


def _size(n: Any) -> int:
    if type(n) is not int or not 0 <= n < 2**40:
        raise ValueError("not a size")
    return n


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("not a dtype")
    return dtype
