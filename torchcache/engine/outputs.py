"""Output of a forward → layout and leaves, and back."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from torchcache.engine.call import Call
from torchcache.identity.encoding import is_plain
from torchcache.tiers.layout import Layout, Tree, is_node
from torchcache.tiers.tier import Rows


class UnsupportedOutput(Exception):
    """An output that cannot be cached, though it may be right; the message says what to change."""


def split(
    output: Any, batch: int, inputs: list[Tensor], cache_dtype: torch.dtype | None
) -> tuple[Layout, list[Tensor]]:
    """Layout and leaves ``[B, …]`` of an output, detached, leaves in the dtype in which they are kept.

    The leaves are nobody else's memory: what is a view, or lies in an input, is copied.

    Raises:
        UnsupportedOutput: it is not batched on dimension 0, or has tensors (sparse, quantised, subclasses) or other
            values that cannot be kept.
    """
    tensors: list[Tensor] = []
    tree = _flatten(output, tensors)
    if not tensors or any(t.shape[:1] != (batch,) for t in tensors):
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors) or "no tensors"
        raise UnsupportedOutput(
            f"it is not batched: for {batch} rows of input every output tensor must have {batch} rows in dimension 0, "
            f"got {shapes}; compute what is not a row, such as a loss, outside of the cached module"
        )
    _check_rebuilds(output, tree, tensors)
    leaves = []
    kept = []
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout is not torch.strided or t.is_quantized:
            raise UnsupportedOutput(f"{type(t).__name__} of layout {t.layout}")
        stored = cache_dtype if cache_dtype is not None and t.dtype.is_floating_point else t.dtype
        leaves.append((t.dtype, stored, tuple(t.shape[1:]), None if t.device == inputs[0].device else str(t.device)))
        kept.append(_own_rows(t, stored, inputs))
    return Layout.of(tree, tuple(leaves)), kept


def _own_rows(t: Tensor, stored: torch.dtype, inputs: list[Tensor]) -> Tensor:
    rows = t.detach().resolve_conj().resolve_neg().to(stored)
    return rows.clone() if _is_alias(t, rows, inputs) else rows


def _check_rebuilds(output: Any, tree: Tree, tensors: list[Tensor]) -> None:
    """A class may need or create more than its fields. This says so now, rather than at a later hit."""
    if tree == "*":
        return
    try:
        rebuilt = Layout(tree, ()).join(tensors)
    except Exception as error:  # a class of the user may raise anything
        raise UnsupportedOutput(f"an output of this class cannot be rebuilt from its fields: {error}") from error
    if not _is_like(output, rebuilt):
        raise UnsupportedOutput(
            f"rebuilt from its fields, an output would differ: {type(output).__qualname__}, or a class in it, "
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
                raise UnsupportedOutput(f"the keys of a dict must be str or int, got {key!r}")
        return ("dict", *((key, _flatten(v, tensors)) for key, v in value.items()))
    fields = _fields(value)
    if fields is None:
        raise UnsupportedOutput(
            "it must be a tensor or tuples, lists, dicts, named tuples or dataclasses of tensors and None, got "
            f"{kind.__name__}; "
            + ("pass use_cache=False" if kind.__name__.endswith("Cache") else "leave it out of the output")
        )
    return ("class", kind, *((name, _flatten(v, tensors)) for name, v in fields))


def _fields(value: Any) -> list[tuple[str, Any]] | None:
    """Names and values of a named tuple (also torch's own, as of topk), dataclass, ModelOutput or OrderedDict."""
    if not is_node(type(value)):
        return None
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value))
    if isinstance(value, tuple):
        return [(str(i), item) for i, item in enumerate(value)]
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.init]
    return list(value.items())


def output(rows: Rows, call: Call) -> Any:
    """The output of a call from all its rows as they are kept."""
    layout = rows.layout
    if layout.verbatim and rows.leaves[0].is_cpu and call.tensors[0].is_cpu:
        return layout.join(rows.leaves)
    return layout.join(layout.restore(rows.leaves, call.device))
