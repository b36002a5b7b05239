"""Extra columns of rows, such as labels: tensors ``[N, …]`` and lists of N values in tuples and dicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor


def map_columns(columns: Any, function: Callable[[Any], Any]) -> Any:
    """The same nesting with ``function(column)`` in place of each column."""
    if isinstance(columns, tuple):
        return tuple(map_columns(column, function) for column in columns)
    if isinstance(columns, dict):
        return {name: map_columns(column, function) for name, column in columns.items()}
    return function(columns)


def signature(columns: Any) -> str:
    """Names, dtypes and shapes, without the number of rows. Columns of equal signatures can be concatenated."""
    if isinstance(columns, tuple):
        return f"({', '.join(map(signature, columns))}{',' * (len(columns) == 1)})"
    if isinstance(columns, dict):
        return f"{{{', '.join(f'{name!r}: {signature(column)}' for name, column in columns.items())}}}"
    if isinstance(columns, Tensor):
        return f"{columns.dtype} [B{''.join(f', {n}' for n in columns.shape[1:])}]"
    return "list"


def concatenate(parts: list[Any]) -> Any:
    """The columns of several batches as those of all their rows."""
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(concatenate(list(column)) for column in zip(*parts))
    if isinstance(first, dict):
        return {name: concatenate([part[name] for part in parts]) for name in first}
    return torch.cat(parts) if isinstance(first, Tensor) else list(chain.from_iterable(parts))


def copied(value: Any, rows: int, name: str) -> Any:
    """Copies of the columns on the CPU: a tensor of a DataLoader worker would keep a file open.

    Args:
        value: a dict of columns, or one column: a tensor, an array, a list or a tuple.
        rows: how many entries each column must have.
        name: the word for `value` in messages.

    Raises:
        ValueError: a column does not have one entry for each row.
    """
    if isinstance(value, Mapping):
        return {key: copied(column, rows, f"{name}[{key!r}]") for key, column in value.items()}
    column = _without_numpy(value)
    if isinstance(column, Tensor) and column.dim() > 0 and len(column) == rows:
        return column.detach().to("cpu", copy=True)
    if isinstance(column, (list, tuple)) and len(column) == rows:
        return list(column)
    raise ValueError(
        f"{name} is an extra column and must be a tensor, list or tuple with one entry for each of {rows} rows, "
        f"got {_size(column)}"
    )


def _size(column: Any) -> str:
    if isinstance(column, Tensor):
        return f"a tensor of shape {tuple(column.shape)}"
    return f"a {type(column).__name__}" + (f" of {len(column)}" if isinstance(column, (list, tuple)) else "")


def _without_numpy(value: Any) -> Any:
    """An array of numbers as a tensor, one of strings or objects as a list."""
    if not hasattr(value, "__array__") or isinstance(value, Tensor):
        return value
    return value.tolist() if getattr(value.dtype, "kind", "") in "OSU" else torch.as_tensor(value)
