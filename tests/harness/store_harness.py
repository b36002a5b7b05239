"""A store of float32 rows as the tests use it, and other processes."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchcache._native import ops

LAYOUT = "layout"
ROWS, BYTES_WRITTEN, QUEUED, _, DAMAGED, DROPPED, FULL = range(7)  # of the statistics


class Store:
    """A store of float32 rows; closed by its test, or by nobody."""

    def __init__(self, directory: Path, limit: int = 10**12, zstd: bool = False, mmap: bool = False) -> None:
        self.id = ops.store_open(str(directory), limit, zstd, 3, 1, mmap, 64 << 20)

    def put(self, keys: Tensor, rows: Tensor) -> int:
        return ops.store_write(self.id, keys, LAYOUT, [rows])[0]

    def found(self, keys: Tensor) -> int:
        return int(ops.store_lookup(self.id, keys)[0].sum())

    def right(self, keys: Tensor, rows: Tensor) -> int:
        """How many rows are read; those must be right."""
        out = torch.empty_like(rows)
        good = ops.store_read(self.id, keys, LAYOUT, [out])
        assert torch.equal(out[good], rows[good])
        return int(good.sum())

    def stats(self) -> list[int]:
        return ops.store_stats(self.id)

    def flush(self) -> None:
        ops.store_flush(self.id)

    def warnings(self) -> list[str]:
        return ops.store_warnings(self.id)

    def close(self) -> None:
        ops.store_close(self.id)


def batch(n: int, seed: int, width: int = 4) -> tuple[Tensor, Tensor]:
    """Keys and rows, the same for the same seed in every process."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (n, 2), generator=generator)
    return keys, torch.randn(n, width, generator=generator)


def write(directory: Path, *batches: tuple[Tensor, Tensor], zstd: bool = False) -> None:
    """A segment with a block for each batch."""
    store = Store(directory, zstd=zstd)
    for keys, rows in batches:
        store.put(keys, rows)
        store.flush()
    store.close()


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"*.{suffix}"))


def reopened(directory: Path, keys: Tensor, rows: Tensor, **options: bool) -> int:
    """How many rows a process that starts now would read."""
    store = Store(directory, **options)
    try:
        found = store.found(keys)
        right = store.right(keys, rows)
        assert right <= found
        return right
    finally:
        store.close()


def forked(run: Callable[[], None]) -> int:
    """The id of a child that does this and ends, with status 0 if nothing was raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # a forked child has torch's pool, but not its threads
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0
