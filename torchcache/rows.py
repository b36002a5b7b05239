"""Output of a forward ↔ layout and leaves.

A layout is everything about an output but its rows: the nesting, the dtypes, the shapes of a row.
A leaf is one tensor of it, batched on dimension 0. Equal layouts can share arenas and blocks.
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

from torchcache.encoding import is_plain
from torchcache.lazy import remembered

# The nesting: "*" for a leaf, None for None, else (kind, …): see Layout.to_json.
Tree = Any


class UnsupportedOutput(Exception):
    """An output that cannot be cached, though it may be right."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of an output: what is given back, and what is kept of it."""

    dtype: torch.dtype
    stored: torch.dtype  # differs from dtype with cache_dtype
    shape: tuple[int, ...]  # of one row
    device: str | None  # None: the device of the input

    @remembered
    def row_bytes(self) -> int:
        return self.stored.itemsize * functools.reduce(int.__mul__, self.shape, 1)

    def restore(self, rows: Tensor, input_device: torch.device) -> Tensor:
        """Kept rows as the forward would have given them."""
        device = input_device if self.device is None else torch.device(self.device)
        return rows.to(device, non_blocking=device.type == "cuda" and rows.is_pinned()).to(self.dtype)


@dataclasses.dataclass(frozen=True)
class Layout:
    tree: Tree
    leaves: tuple[Leaf, ...]

    @remembered
    def row_bytes(self) -> int:
        return sum(leaf.row_bytes for leaf in self.leaves)

    @remembered
    def verbatim(self) -> bool:
        """Whether rows are kept as they are given back, on the device of the input."""
        return all(leaf.stored is leaf.dtype and leaf.device is None for leaf in self.leaves)

    @remembered
    def json(self) -> str:
        """The canonical form that stands in a block; classes by name."""
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
        """The layout, or None where it is not one that this process can rebuild."""
        try:
            data = json.loads(text)
            leaves = tuple(
                Leaf(
                    _dtype_from_name(leaf["dtype"]),
                    _dtype_from_name(leaf["stored"]),
                    tuple(_size(n) for n in leaf["shape"]),
                    str(torch.device(leaf["device"])) if "device" in leaf else None,
                )
                for leaf in data["leaves"]
            )
            tree = _tree_from_json(data["tree"], depth=0)
            return cls(tree, leaves) if _count_leaves(tree) == len(leaves) else None
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            LookupError,
            RuntimeError,
            RecursionError,
        ):
            return None

    def join(self, tensors: list[Tensor]) -> Any:
        """An output of this layout from its leaves ``[B, …]``."""
        if self.tree == "*":
            return tensors[0]
        return _build(self.tree, iter(tensors))


# torch has no kernels for moving rows of these: the same bits as what has.
_MOVED_AS = {
    **{getattr(torch, f"uint{n}"): getattr(torch, f"int{n}") for n in (16, 32, 64)},
    **{getattr(torch, name): torch.uint8 for name in dir(torch) if name.startswith(("float8_", "float4_"))},
}


def movable(t: Tensor) -> Tensor:
    """The tensor in a dtype whose rows torch can move, bits unchanged."""
    dtype = _MOVED_AS.get(t.dtype)
    return t if dtype is None else t.view(dtype)


def select(t: Tensor, rows: Tensor) -> Tensor:
    """``t.index_select(0, rows)`` for every dtype."""
    return movable(t).index_select(0, rows).view(t.dtype) if t.dtype in _MOVED_AS else t.index_select(0, rows)


def split(
    output: Any, batch: int, inputs: list[Tensor], cache_dtype: torch.dtype | None
) -> tuple[Layout, list[Tensor]]:
    """Layout and leaves ``[B, …]`` of an output, detached, leaves in the dtype in which they are kept.

    The leaves are nobody else's memory: what is a view, or lies in an input, is copied.

    Raises:
        ValueError: it is not batched on dimension 0.
        UnsupportedOutput: it has tensors that cannot be kept (sparse, quantised, subclasses).
    """
    tensors: list[Tensor] = []
    tree = _flatten(output, tensors)
    if not tensors or any(t.dim() == 0 or t.shape[0] != batch for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensors"
        raise ValueError(
            f"the output is not batched: for {batch} rows of input every output tensor must have {batch} rows "
            f"in dimension 0, got {shapes}"
        )
    _check_rebuilds(output, tree, tensors)
    leaves = []
    kept = []
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
            raise UnsupportedOutput(f"{type(t).__name__} of layout {t.layout}")
        stored = cache_dtype if cache_dtype is not None and t.dtype.is_floating_point else t.dtype
        device = None if t.device == inputs[0].device else str(t.device)
        leaves.append(Leaf(t.dtype, stored, tuple(t.shape[1:]), device))
        rows = t.detach().resolve_conj().resolve_neg().to(stored)
        kept.append(rows.clone() if _is_alias(t, rows, inputs) else rows)
    return Layout(tree, tuple(leaves)), kept


def _check_rebuilds(output: Any, tree: Tree, tensors: list[Tensor]) -> None:
    """A class may want or make more than its fields; better told now than by a later hit."""
    if tree == "*":
        return
    try:
        rebuilt = _build(tree, iter(tensors))
    except Exception as error:  # a class of the user's may raise what it likes
        raise UnsupportedOutput(f"an output of this class cannot be made anew from its fields: {error}") from error
    if not _is_like(output, rebuilt):
        raise UnsupportedOutput(
            f"made anew from its fields an output would differ: {type(output).__qualname__}, or a class in it, "
            "changes them in its constructor or holds something else"
        )


def _is_like(a: Any, b: Any) -> bool:
    """Whether two outputs are alike and hold the same tensors."""
    if a is b:
        return True
    if type(a) is not type(b) or isinstance(a, Tensor):
        return False
    if isinstance(a, dict) and not (list(a) == list(b) and all(_is_like(a[key], b[key]) for key in a)):
        return False
    if isinstance(a, (tuple, list)) and not (len(a) == len(b) and all(map(_is_like, a, b))):
        return False
    if isinstance(a, (dict, tuple, list)) or dataclasses.is_dataclass(a):
        return _is_like(_attributes(a), _attributes(b)) if type(a) is not dict else True
    return is_plain(a) and bool(a == b)


def _attributes(value: Any) -> dict[str, Any]:
    """What an object holds, also in slots."""
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    return {**{name: getattr(value, name) for name in names if hasattr(value, name)}, **getattr(value, "__dict__", {})}


def _is_alias(output: Tensor, rows: Tensor, inputs: list[Tensor]) -> bool:
    storage = rows.untyped_storage().data_ptr()
    if storage != output.untyped_storage().data_ptr():
        return False
    return output._is_view() or any(storage == t.untyped_storage().data_ptr() for t in inputs)


def _flatten(value: Any, tensors: list[Tensor]) -> Tree:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "*"
    if value is None:
        return None
    kind = type(value)
    if kind in (tuple, list):
        return (kind.__name__, *(_flatten(v, tensors) for v in value))
    if kind is dict:
        for key in value:
            if type(key) not in (str, int, bool):
                raise ValueError(f"keys of an output dict must be str or int, got {key!r}")
        return ("dict", *((key, _flatten(v, tensors)) for key, v in value.items()))
    fields = _fields(value)
    if fields is None:
        raise ValueError(
            "the output is not batched: it must be a tensor or tuples, lists, dicts, named tuples or dataclasses of "
            f"tensors and None, got {kind.__name__}"
            + ("; pass use_cache=False" if kind.__name__.endswith("Cache") else "")
        )
    return ("class", kind, *((name, _flatten(v, tensors)) for name, v in fields))


def _fields(value: Any) -> list[tuple[str, Any]] | None:
    """Names and values of a named tuple (also torch's own, as of topk), dataclass, ModelOutput or OrderedDict."""
    if not _is_node(type(value)):
        return None
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value))
    if isinstance(value, tuple):
        return [(str(i), item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    return list(value.items())


def _is_node(kind: Any) -> bool:
    """Whether outputs may be of this class: nothing else is ever instantiated for a stored layout."""
    if not isinstance(kind, type):
        return False
    named_tuple = issubclass(kind, tuple) and (hasattr(kind, "_fields") or _is_return_type(kind))
    return named_tuple or dataclasses.is_dataclass(kind) or kind.__mro__[:2] == _ORDERED_DICT


def _is_return_type(kind: type) -> bool:
    """What torch's own functions return: a tuple whose items have names, made from one sequence."""
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
    if _is_return_type(constructor):
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
        raise ValueError("no tree")
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
    raise ValueError("no tree")


def _plain_key(key: Any) -> str | int:
    if type(key) not in (str, int, bool):
        raise ValueError("no key")
    return key  # type: ignore[no-any-return]


def _find_class(name: str) -> type:
    """A class among the modules that are already imported; nothing is imported for a stored layout."""
    module, _, path = name.partition(":")
    found: Any = sys.modules[module]
    for part in path.split("."):
        found = found.__dict__[part]
    if not _is_node(found) or f"{found.__module__}:{found.__qualname__}" != name:
        raise LookupError(name)
    return found  # type: ignore[no-any-return]


def _count_leaves(tree: Tree) -> int:
    if tree == "*" or tree is None:
        return 1 if tree == "*" else 0
    kind, *rest = tree
    if kind in ("tuple", "list"):
        return sum(_count_leaves(t) for t in rest)
    return sum(_count_leaves(t) for _, t in (rest[1:] if kind == "class" else rest))


def _size(n: Any) -> int:
    if type(n) is not int or not 0 <= n < 2**40:
        raise ValueError("no size")
    return n


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_from_name(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("no dtype")
    return dtype
