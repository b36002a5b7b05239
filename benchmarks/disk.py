"""Writing, reading and opening, beside plain pwrite, pread and read of the same bytes (page cache warm)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from interleaved import table
from torch import Tensor

from torchcache import _ops

ROWS, BATCH = 8192, 64
OPENED_ROWS = 2_000_000
LAYOUT = '{"leaves":[],"tree":"*"}'
QUEUE_BYTES = 64 << 20


def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(BATCH) for t in tensors), strict=True)


def open_store(folder: Path, mmap: bool = False) -> int:
    return _ops.store_open(str(folder), 1 << 40, False, 3, 1, mmap, QUEUE_BYTES)


def run(root: Path, width: int, rows: int, rounds: int) -> None:
    data = torch.randn(rows, width)
    keys = torch.randint(-(2**63), 2**63 - 1, (rows, 2))
    order = torch.randperm(rows)
    shuffled = keys.index_select(0, order).contiguous()
    raw = data.numpy()
    row_bytes = 4 * width
    number = iter(range(10**6))

    def pwrite() -> None:
        file = os.open(root / f"plain{next(number)}", os.O_RDWR | os.O_CREAT)
        for i in range(0, rows, BATCH):
            os.pwrite(file, memoryview(raw[i : i + BATCH]).cast("B"), i * row_bytes)
        os.close(file)

    def put() -> None:
        store = open_store(root / f"store{next(number)}")
        for k, d in batches(keys, data):
            _ops.store_put(store, k, LAYOUT, [d])
        _ops.store_flush(store)
        _ops.store_close(store)

    title = f"{row_bytes} byte rows, batches of {BATCH}"
    rivals = [("limit: pwrite of the same bytes", pwrite), ("put and flush", put)]
    table(f"write {title}", rivals, rounds, rows / 1e3, "k rows/s")

    plain = os.open(root / "plain", os.O_RDWR | os.O_CREAT)
    os.pwrite(plain, memoryview(raw).cast("B"), 0)
    store = open_store(root / "read")
    for k, d in batches(keys, data):
        _ops.store_put(store, k, LAYOUT, [d])
    _ops.store_flush(store)
    mapped = open_store(root / "read", mmap=True)
    places = order.tolist()

    def pread() -> None:
        for i in range(0, rows, BATCH):
            out = torch.empty(min(BATCH, rows - i), width).numpy()
            for j, place in enumerate(places[i : i + BATCH]):
                os.preadv(plain, [memoryview(out[j]).cast("B")], place * row_bytes)

    def read(store: int) -> None:
        for (k,) in batches(shuffled):
            _ops.store_find(store, k)
            assert _ops.store_read(store, k, LAYOUT, [torch.empty(len(k), width)]).all()

    rivals = [
        ("limit: pread per row into a fresh tensor", pread),
        ("find and read, verified", lambda: read(store)),
        ("the same with use_mmap_on_load", lambda: read(mapped)),
    ]
    table(f"read {title}, warm, shuffled", rivals, rounds, rows / 1e3, "k rows/s")
    _ops.store_close(store)
    _ops.store_close(mapped)


def opening(root: Path) -> None:
    store = open_store(root)
    for _ in range(OPENED_ROWS // 1000):
        _ops.store_put(store, torch.randint(-(2**63), 2**63 - 1, (1000, 2)), LAYOUT, [torch.zeros(1000, 4)])
    _ops.store_close(store)
    indexes = list(root.glob("*.idx"))
    buffer = bytearray(1 << 18)

    def read() -> None:
        for index in indexes:
            with index.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    rivals = [
        ("limit: reading the index files", read),
        ("open", lambda: _ops.store_close(open_store(root))),
    ]
    table(f"open a store of {OPENED_ROWS} rows", rivals, 7, OPENED_ROWS / 1e6, "M rows/s")


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as folder:
        opening(Path(folder))
    for width, rows, rounds in ((768, ROWS, 9), (151_296, 512, 5)):
        with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as root:
            run(Path(root), width, rows, rounds)


if __name__ == "__main__":
    main()
