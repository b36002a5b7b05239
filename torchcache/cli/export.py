"""Exports keys and rows of a cache to a safetensors file, for programs that do not use torchcache.

The package safetensors can only write tensors that are in memory as a whole, so this module writes the file itself:
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from torchcache._native import ops
from torchcache.cli.inspection import PART, Group, Summary, native, summarize
from torchcache.cli.progress import Progress
from torchcache.errors import MaintenanceError

_DTYPES = {  # torch → safetensors
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}


def export(directory: Path, file: Path, progress: Progress = lambda n: None, part: int = PART) -> int:
    """Writes the keys and rows of a folder to a safetensors file, without damaged rows.

    The tensors are ``keys`` (int64 ``[N, 2]``: low half, high half) and ``rows``, or ``rows.0``, ``rows.1`` … if
    outputs have several tensors. If there are several layouts, names start with the number of the layout (``0.keys``).
    The metadata holds the layouts.

    Args:
        directory: a folder that holds segments.
        file: a regular file, which is replaced atomically, or a new one.
        progress: called with the bytes of rows that were written since the last call.
        part: how many bytes of rows are in memory at once, in addition to all keys.

    Returns:
        The number of rows in the file.

    Raises:
        MaintenanceError: there are no rows, or the file is not regular, such as a directory or a device.
    """
    file = _regular(file)
    summary = summarize(directory)
    if not summary.rows:
        raise MaintenanceError(f"{str(directory)!r} has no rows to export")
    groups = {group.layout: group for group in summary.groups()}
    about = {"class": summary.module, "module_hash": summary.module_hash, "layouts": json.dumps(list(groups))}
    prefixes = [f"{number}." for number in range(len(groups))] if len(groups) > 1 else [""]
    tables = [_table(summary, group, prefix) for prefix, group in zip(prefixes, groups.values())]
    with _store(directory) as store, _replaced(file) as temporary:
        while not _write(temporary, store, tables, about, progress, part):
            pass  # write it again, without the rows that turned out to be damaged
    return sum(len(table.keys) for table in tables)


def _regular(file: Path) -> Path:
    """The path of the file, or of the target of a link."""
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise MaintenanceError(f"{str(file)!r} is not a regular file: name a regular or a new file")
    return target


@contextlib.contextmanager
def _store(directory: Path) -> Iterator[int]:
    store = ops.store_open(str(directory), 0, False, 3, 1, False, PART)
    try:
        yield store
    finally:
        ops.store_close(store)


@contextlib.contextmanager
def _replaced(file: Path) -> Iterator[Path]:
    """The path of a temporary file, which then replaces the file atomically."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- tables


@dataclasses.dataclass
class _Column:
    name: str
    dtype: torch.dtype
    shape: list[int]  # of one row

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclasses.dataclass
class _Table:
    """The rows of one layout."""

    layout: str
    keys: Tensor  # int64 [N, 2], in the order of the files
    columns: list[_Column]  # of the keys, then of the leaves


def _table(summary: Summary, group: Group, prefix: str) -> _Table:
    leaves = _leaves(group)
    names = ["rows"] if len(leaves) == 1 else [f"rows.{i}" for i in range(len(leaves))]
    columns = [_Column(prefix + name, dtype, shape) for name, (dtype, shape) in zip(names, leaves)]
    keys = [
        native(ops.segment_keys, str(summary.directory), segment.name, group.layout) for segment in summary.segments
    ]
    return _Table(group.layout, _distinct(torch.cat(keys)), [_Column(f"{prefix}keys", torch.int64, [2]), *columns])


def _leaves(group: Group) -> list[tuple[torch.dtype, list[int]]]:
    """Stored dtype and shape of each leaf, checked against the size of the rows before memory is allocated for them."""
    try:
        stored = [(leaf["stored"], leaf["shape"]) for leaf in json.loads(group.layout)["leaves"]]
        leaves = [(getattr(torch, name), shape) for name, shape in stored if name in _DTYPES]
        row_bytes = sum(dtype.itemsize * math.prod(shape) for dtype, shape in leaves)
        if row_bytes * group.rows == group.bytes and len(leaves) == len(stored):
            return leaves
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise MaintenanceError(f"rows of this layout cannot be exported: {group.layout[:200]}")


def _distinct(keys: Tensor) -> Tensor:
    """Each key once, in the order of first occurrence, so that rows are read in the order of the files."""
    distinct, numbers = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(keys))
    first.scatter_reduce_(0, numbers, torch.arange(len(keys)), "amin")
    return keys.index_select(0, first.sort().values)


# ---- the file


def _write(path: Path, store: int, tables: list[_Table], about: dict[str, str], progress: Progress, part: int) -> bool:
    """Writes the file. False: rows were damaged and are removed from the tables, so the file must be written again."""
    header, starts = _header(tables, about)
    whole = True
    with path.open("wb") as file:
        file.write(header)
        for table in tables:
            good = _copy(file, store, table, starts, progress, part)
            whole &= bool(good.all())
            table.keys = table.keys[good]
    return whole


def _header(tables: list[_Table], about: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and the offset in the file of the bytes of each tensor."""
    columns = [(column, len(table.keys)) for table in tables for column in table.columns]
    columns.sort(key=lambda pair: -pair[0].dtype.itemsize)  # so that each is aligned
    entries: dict[str, object] = {"__metadata__": about}
    begins, end = {}, 0
    for column, rows in columns:
        begins[column.name], end = end, end + rows * column.row_bytes
        dtype = _DTYPES[str(column.dtype).removeprefix("torch.")]
        offsets = [begins[column.name], end]
        entries[column.name] = {"dtype": dtype, "shape": [rows, *column.shape], "data_offsets": offsets}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: start + begin for name, begin in begins.items()}


def _copy(file: BinaryIO, store: int, table: _Table, starts: dict[str, int], progress: Progress, part: int) -> Tensor:
    """Copies the rows of a table, some at a time → bool ``[N]``: which are undamaged."""
    row_bytes = sum(column.row_bytes for column in table.columns)
    step = max(1, part // row_bytes)
    buffers = [bytearray(step * column.row_bytes) for column in table.columns]
    good = []
    for first in range(0, len(table.keys), step):
        keys = table.keys[first : first + step]
        keys_out, *leaves = [_bytes(buffer, len(keys), column) for buffer, column in zip(buffers, table.columns)]
        keys_out.view(torch.int64).copy_(keys)
        good.append(ops.store_read(store, keys, table.layout, leaves))
        for buffer, column in zip(buffers, table.columns):
            file.seek(starts[column.name] + first * column.row_bytes)
            file.write(memoryview(buffer)[: len(keys) * column.row_bytes])
        progress(len(keys) * row_bytes)
    return torch.cat(good)


def _bytes(buffer: bytearray, rows: int, column: _Column) -> Tensor:
    """The memory of a buffer as uint8 ``[rows, bytes per row]``."""
    size = rows * column.row_bytes
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)
    return flat.view(rows, column.row_bytes)
