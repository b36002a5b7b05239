"""What a call costs besides the work that nobody can avoid, in microseconds: misses, rows from disk, full hits.

One thread, batches of 64 rows, through the decorator. The raw work next to each: hashing the input, the forward, pwrite
of the rows that are kept, a loop of pread over the rows that are read, index_select of the rows that are gathered.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from interleaved import measure
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops
from torchcache.engine.cache import Cache

BATCH = 64
ROUNDS = 400


class Copy(nn.Module):
    """The rows themselves: a forward that costs next to nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()


def cached(folder: Path | None = None) -> nn.Module:
    options = {} if folder is None else {"persistent": True, "persistent_cache_dir": folder}
    module: nn.Module = torchcache(**options)(Copy().eval())  # type: ignore[arg-type]
    return module


def report(name: str, microseconds: float, raw: float, limit: str = "") -> None:
    print(f"  {name:44} {microseconds:8.1f} µs   above the raw work {microseconds - raw:8.1f} µs   {limit}")


def misses(width: int, folder: Path) -> None:
    """New rows in every call: hashed, computed, kept in memory and queued for the disk."""
    batches = iter(torch.randn(3 * (ROUNDS + 1), BATCH, width))
    plain, module = Copy().eval(), cached(folder / f"misses-{width}")
    file = os.open(folder / f"plain-{width}", os.O_RDWR | os.O_CREAT)
    offsets = itertools.count(0, BATCH * width * 4)

    def raw() -> None:
        x = next(batches)
        ops.keys([x], (0, 0))
        plain(x)

    def write() -> None:
        os.pwrite(file, next(batches).numpy().data.cast("B"), next(offsets))

    with torch.no_grad():
        module(torch.zeros(BATCH, width))
        rivals: list[tuple[str, Callable[[], object]]] = [
            ("raw", raw),
            ("pwrite", write),
            ("miss", lambda: module(next(batches))),
        ]
        seconds = measure(rivals, ROUNDS)
    raw_us, pwrite_us, miss_us = (s * 1e6 for s in seconds)
    os.close(file)
    print(f"\nmiss, rows of {4 * width} bytes")
    report("raw work: hash and forward", raw_us, raw_us)
    report("pwrite of the rows", pwrite_us, 0.0)
    report("miss", miss_us, raw_us, f"reach 120 + 2 × pwrite = {120 + 2 * pwrite_us:.0f} µs above it")


def disk_hits(width: int, folder: Path) -> None:
    """Rows that are on disk and not in memory: hashed, looked up, read, verified, kept in memory."""
    batches = torch.randn(ROUNDS + 1, BATCH, width)
    module = cached(folder / f"hits-{width}")
    path = folder / f"rows-{width}"
    path.write_bytes(batches.numpy().tobytes())
    file = os.open(path, os.O_RDONLY)
    row = 4 * width
    out = torch.empty(BATCH, width)
    buffers = [out[i : i + 1].numpy().data.cast("B") for i in range(BATCH)]
    offsets = itertools.count(0, BATCH * row)

    def loop() -> None:
        first = next(offsets)
        for i, buffer in enumerate(buffers):
            os.preadv(file, [buffer], first + i * row)

    with torch.no_grad():
        for x in batches:
            module(x)
        cache = module.cache_instance
        assert isinstance(cache, Cache)
        cache.flush()
        cache.clear()
        hashed, read = iter(batches), iter(batches)
        rivals: list[tuple[str, Callable[[], object]]] = [
            ("hash", lambda: ops.keys([next(hashed)], (0, 0))),
            ("pread", loop),
            ("disk hit", lambda: module(next(read))),
        ]
        hash_us, pread_us, hit_us = (s * 1e6 for s in measure(rivals, ROUNDS))
    os.close(file)
    assert cache.info().disk_hits == BATCH * (ROUNDS + 1), cache.info()
    print(f"\ndisk hit, rows of {row} bytes")
    report("hash", hash_us, hash_us)
    report("loop of pread over the rows", pread_us, 0.0)
    report("disk hit", hit_us, hash_us, f"reach pread + 60 = {pread_us + 60:.0f} µs above it")


def full_hits(name: str, x: Tensor, width: int) -> None:
    """Rows that are in memory."""

    class Widen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :1].float().expand(-1, width) * torch.arange(width)

    module = torchcache()(Widen().eval())
    rows, order = torch.randn(len(x), width), torch.randperm(len(x))

    def raw() -> None:
        ops.keys([x], (0, 0))
        rows.index_select(0, order)

    with torch.no_grad():
        module(x)
        raw_us, hit_us = (s * 1e6 for s in measure([("raw", raw), ("hit", lambda: module(x))], 3 * ROUNDS))
    print(f"\nfull hit, {name} → {width} f32")
    report("raw work: hash and index_select", raw_us, raw_us)
    report("full hit", hit_us, raw_us, f"{hit_us / raw_us:.2f}× the raw work")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for width in (10, 768):
            misses(width, Path(folder))
            disk_hits(width, Path(folder))
    full_hits("(256, 512) f32", torch.randn(256, 512), 768)
    full_hits("(64, 128) int64", torch.randint(0, 1000, (64, 128)), 768)


if __name__ == "__main__":
    main()
