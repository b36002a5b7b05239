"""Keys and rows of a cache to a safetensors file, for what does not know torchcache.

The file is written here, not by the package of that name: it writes tensors that are in memory as a whole. Its format:
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
from torchcache.cli.maintenance import PART, Group, Summary, native, summarize
from torchcache.cli.progress import Progress
from torchcache.errors import MaintenanceError

_DTYPES = {  # what safetensors calls them
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
    """Writes the keys and rows of a folder to a safetensors file: how many rows.

    The tensors are ``keys`` (int64 ``[N, 2]``: low half, high half) and ``rows``, or ``rows.0``, ``rows.1`` … where an
    output has several; with several layouts they begin with the number of the layout (``0.keys``). The metadata has the
    layouts. Damaged rows are left out.

    Args:
        file: a regular file, which is replaced as a whole, or none yet.
        part: bytes of rows that are in memory at once, beside the keys of all of them.

    Raises:
        MaintenanceError: there are no rows, or the file is something else, such as a directory or a device.
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
            pass  # again, without the rows that turned out to be damaged
    return sum(len(table.keys) for table in tables)


def _regular(file: Path) -> Path:
    """Where the file is, or will be: what a link points to."""
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():
        raise MaintenanceError(f"{str(file)!r} is no regular file: name one, or one that is not there yet")
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
    """A temporary name for the file, which is there as a whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


# ---- what is written


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
    found = [
        native(ops.segment_keys, str(summary.directory), segment.name, group.layout) for segment in summary.segments
    ]
    return _Table(group.layout, _distinct(torch.cat(found)), [_Column(f"{prefix}keys", torch.int64, [2]), *columns])


def _leaves(group: Group) -> list[tuple[torch.dtype, list[int]]]:
    """Stored dtype and shape of each leaf. What a layout claims is checked before memory is taken for it."""
    try:
        stored = [(leaf["stored"], leaf["shape"]) for leaf in json.loads(group.layout)["leaves"]]
        leaves = [(getattr(torch, name), shape) for name, shape in stored if name in _DTYPES]
        right = sum(dtype.itemsize * math.prod(shape) for dtype, shape in leaves) * group.rows == group.bytes
        if right and len(leaves) == len(stored):
            return leaves
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise MaintenanceError(f"rows of this layout cannot be exported: {group.layout[:200]}")


def _distinct(keys: Tensor) -> Tensor:
    """Each key once, where it stood first: rows are then read in the order in which they lie."""
    distinct, numbers = torch.unique(keys, dim=0, return_inverse=True)
    first = torch.full((len(distinct),), len(keys))
    first.scatter_reduce_(0, numbers, torch.arange(len(keys)), "amin")
    return keys.index_select(0, first.sort().values)


# ---- writing it


def _write(path: Path, store: int, tables: list[_Table], about: dict[str, str], progress: Progress, part: int) -> bool:
    """Writes the file. False if rows were damaged: then it is not right, and they are no longer in the tables."""
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
    """The beginning of a safetensors file, and where the bytes of each tensor stand."""
    columns = [(column, len(table.keys)) for table in tables for column in table.columns]
    columns.sort(key=lambda pair: -pair[0].dtype.itemsize)  # so that all are aligned
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
    """Copies the rows of a table, some at a time → bool ``[N]``: which were right."""
    row_bytes = sum(column.row_bytes for column in table.columns)
    buffers = [bytearray(max(1, part // row_bytes) * column.row_bytes) for column in table.columns]
    good = []
    for first in range(0, len(table.keys), max(1, part // row_bytes)):
        keys = table.keys[first : first + max(1, part // row_bytes)]
        keys_out, *leaves = [_bytes(buffer, len(keys), column) for buffer, column in zip(buffers, table.columns)]
        keys_out.view(torch.int64).copy_(keys)
        good.append(ops.store_read(store, keys, table.layout, leaves))
        for buffer, column in zip(buffers, table.columns):
            file.seek(starts[column.name] + first * column.row_bytes)
            file.write(memoryview(buffer)[: len(keys) * column.row_bytes])
        progress(len(keys) * row_bytes)
    return torch.cat(good)


def _bytes(buffer: bytearray, rows: int, column: _Column) -> Tensor:
    """The memory of a buffer as uint8 ``[rows, bytes of a row]``."""
    size = rows * column.row_bytes
    flat = torch.frombuffer(buffer, dtype=torch.uint8, count=size) if size else torch.empty(0, dtype=torch.uint8)
    return flat.view(rows, column.row_bytes)
