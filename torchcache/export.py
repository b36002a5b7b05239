"""Keys and rows of a cache to a safetensors file, for what does not know torchcache."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcache import _ops
from torchcache.maintenance import PART, Group, MaintenanceError, Progress, Summary, native, summarize


def export(directory: Path, file: Path, progress: Progress = lambda n: None) -> int:
    """Writes the keys and rows of a folder to a safetensors file: how many rows.

    The tensors are ``keys`` (int64 ``[N, 2]``: low half, high half) and ``rows``, or ``rows.0``, ``rows.1`` … where an
    output has several; with several layouts they begin with the number of the layout (``0.keys``). The metadata has the
    layouts. Rows are held in memory; damaged ones are left out.
    """
    save = _safetensors()
    summary = summarize(directory)
    if not summary.rows:
        raise MaintenanceError(f"{str(directory)!r} has no rows to export")
    store = _ops.store_open(str(directory), 0, False, 3, 1, False, PART)
    try:
        groups = {group.layout: group for group in summary.groups()}
        tensors: dict[str, Tensor] = {}
        for number, group in enumerate(groups.values()):
            prefix = f"{number}." if len(groups) > 1 else ""
            keys, leaves = _read(store, summary, group, progress)
            names = ["rows"] if len(leaves) == 1 else [f"rows.{i}" for i in range(len(leaves))]
            tensors |= {prefix + name: tensor for name, tensor in zip(["keys", *names], [keys, *leaves])}
    finally:
        _ops.store_close(store)
    about = {"class": summary.module, "module_hash": summary.module_hash, "layouts": json.dumps(list(groups))}
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save(tensors, temporary, about)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return sum(len(tensor) for name, tensor in tensors.items() if name.endswith("keys"))


def _safetensors() -> Callable[..., Any]:
    try:
        save: Callable[..., Any] = importlib.import_module("safetensors.torch").save_file
    except ImportError as error:
        raise MaintenanceError("export needs the package safetensors: pip install safetensors") from error
    return save


def _read(store: int, summary: Summary, group: Group, progress: Progress) -> tuple[Tensor, list[Tensor]]:
    """Keys and leaves of all rows of a layout that verify."""
    names = [segment.name for segment in summary.segments]
    found = [native(_ops.segment_keys, str(summary.directory), name, group.layout) for name in names]
    keys = torch.unique(torch.cat(found), dim=0)
    leaves = [torch.empty((len(keys), *shape), dtype=dtype) for dtype, shape in _leaves(group)]
    row_bytes = group.bytes // group.rows
    some = max(1, PART // max(1, row_bytes))
    good = []
    for first in range(0, len(keys), some):
        part = [_ops.bits(leaf[first : first + some]) for leaf in leaves]
        good.append(_ops.store_read(store, keys[first : first + some], group.layout, part))
        progress(len(good[-1]) * row_bytes)
    verified = torch.cat(good)
    return (keys, leaves) if verified.all() else (keys[verified], [leaf[verified] for leaf in leaves])


def _leaves(group: Group) -> list[tuple[torch.dtype, list[int]]]:
    """Stored dtype and shape of each leaf. What a layout claims is checked before memory is taken for it."""
    try:
        leaves = [(getattr(torch, leaf["stored"]), leaf["shape"]) for leaf in json.loads(group.layout)["leaves"]]
        if sum(dtype.itemsize * math.prod(shape) for dtype, shape in leaves) * group.rows == group.bytes:
            return leaves
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise MaintenanceError(f"rows of this layout cannot be exported: {group.layout[:200]}")
