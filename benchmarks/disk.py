"""Writing, reading and opening a store, beside pwrite, pread and read of the same bytes, LMDB and zstd, page-cached."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import torch
import zstandard
from interleaved import Rival, table
from torch import Tensor

from torchcache._native import ops

ROWS, BATCH = 8192, 64
OPENED_ROWS = 10_000_000
LAYOUT = '{"leaves":[],"tree":"*"}'
QUEUE_BYTES = 64 << 20


def batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(BATCH) for t in tensors), strict=True)


def open_store(folder: Path, mmap: bool = False, zstd: bool = False) -> int:
    return ops.store_open(str(folder), 1 << 40, zstd, 3, 2, mmap, QUEUE_BYTES)


def filled(folder: Path, keys: Tensor, data: Tensor, zstd: bool = False) -> int:
    store = open_store(folder, zstd=zstd)
    for k, d in batches(keys, data):
        ops.store_write(store, k, LAYOUT, [d])
    ops.store_flush(store)
    return store


def filled_lmdb(folder: Path, keys: Tensor, data: Tensor) -> lmdb.Environment:
    environment = lmdb.open(str(folder), map_size=1 << 33, sync=False, metasync=False)
    names, rows = [k.tobytes() for k in keys.numpy()], data.numpy()
    for i in range(0, len(names), BATCH):
        with environment.begin(write=True) as transaction:
            for j in range(i, min(i + BATCH, len(names))):
                transaction.put(names[j], memoryview(rows[j]).cast("B"))
    return environment


def new_folders(root: Path) -> Callable[[], Path]:
    """Gives one folder after another; what was in the last one is gone, so that dirty pages do not pile up."""
    folder = root / "new"

    def new() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    return new


def writing(root: Path, keys: Tensor, data: Tensor, rounds: int) -> None:
    raw, row_bytes = data.numpy(), data[0].nbytes
    new = new_folders(root)

    def pwrite() -> None:
        file = os.open(new() / "plain", os.O_RDWR | os.O_CREAT)
        for i in range(0, len(raw), BATCH):
            os.pwrite(file, raw[i : i + BATCH].data.cast("B"), i * row_bytes)
        os.close(file)

    rivals: list[Rival] = [
        ("limit: pwrite of the same bytes", pwrite),
        ("put and flush", lambda: ops.store_close(filled(new(), keys, data))),
    ]
    if row_bytes <= 1 << 16:
        rivals.append(("LMDB without sync", lambda: filled_lmdb(new(), keys, data).close()))
    title = f"write {row_bytes} byte rows, batches of {BATCH}"
    table(title, rivals, rounds, len(raw) / 1e3, "k rows/s")


def reading(root: Path, keys: Tensor, data: Tensor, rounds: int) -> None:
    rows, width = data.shape
    row_bytes = data[0].nbytes
    order = torch.randperm(rows)
    places, shuffled = order.tolist(), keys.index_select(0, order).contiguous()
    plain = os.open(root / "plain", os.O_RDWR | os.O_CREAT)
    os.pwrite(plain, data.numpy().data.cast("B"), 0)
    store = filled(root / "read", keys, data)
    mapped = open_store(root / "read", mmap=True)

    def pread() -> None:
        for i in range(0, rows, BATCH):
            out = torch.empty(min(BATCH, rows - i), width).numpy()
            for j, place in enumerate(places[i : i + BATCH]):
                os.preadv(plain, [memoryview(out[j]).cast("B")], place * row_bytes)

    def read(store: int) -> None:
        for (k,) in batches(shuffled):
            ops.store_lookup(store, k)
            assert ops.store_read(store, k, LAYOUT, [torch.empty(len(k), width)]).all()

    rivals: list[Rival] = [
        ("limit: pread per row into a fresh tensor", pread),
        ("find and read, verified", lambda: read(store)),
        ("the same with use_mmap_on_load", lambda: read(mapped)),
    ]
    if row_bytes <= 1 << 16:
        environment = filled_lmdb(root / "lmdb", keys, data)
        names = [k.tobytes() for k in shuffled.numpy()]

        def get() -> None:
            for i in range(0, rows, BATCH):
                out = torch.empty(min(BATCH, rows - i), width).numpy()
                with environment.begin(buffers=True) as transaction:
                    for j, name in enumerate(names[i : i + BATCH]):
                        memoryview(out[j]).cast("B")[:] = transaction.get(name)

        rivals.append(("LMDB", get))
    table(f"read {row_bytes} byte rows, batches of {BATCH}, warm, shuffled", rivals, rounds, rows / 1e3, "k rows/s")
    ops.store_close(store)
    ops.store_close(mapped)


def system_zstd() -> Callable[[int, int, int], None]:
    """compress(address, rows, bytes of a row) by the libzstd that the store uses, in the calling thread."""
    library = ctypes.CDLL(ctypes.util.find_library("zstd"))
    library.ZSTD_createCCtx.restype = ctypes.c_void_p
    compress_row = library.ZSTD_compressCCtx
    compress_row.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    compress_row.restype = ctypes.c_size_t

    def compress(address: int, rows: int, row_bytes: int) -> None:
        context, out = library.ZSTD_createCCtx(), ctypes.create_string_buffer(2 * row_bytes + 512)
        for row in range(rows):
            compress_row(context, out, len(out), address + row * row_bytes, row_bytes, 3)

    return compress


def compressing(root: Path, keys: Tensor, data: Tensor, rounds: int) -> None:
    """zstd at level 3 with 2 threads, on rows of which half is zero, as behind a ReLU, in half precision."""
    rows = data.relu().half()
    row_bytes, half = rows[0].nbytes, len(rows) // 2
    new, compress, pool = new_folders(root), system_zstd(), ThreadPoolExecutor(2)
    parts: list[bytes | bytearray | memoryview] = [memoryview(row).cast("B") for row in rows.numpy()]

    def limit() -> None:
        list(pool.map(lambda i: compress(rows.data_ptr() + i * half * row_bytes, half, row_bytes), range(2)))

    def bundled() -> None:
        zstandard.ZstdCompressor(level=3).multi_compress_to_buffer(parts, threads=2)

    rivals: list[Rival] = [
        ("limit: the same libzstd, 2 threads", limit),
        ("put and flush with zstd", lambda: ops.store_close(filled(new(), keys, rows, zstd=True))),
        (f"zstandard with its zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}", bundled),
    ]
    table(f"compress {row_bytes} byte rows, level 3, 2 threads", rivals, rounds, rows.nbytes / 1e6, "MB/s")


def sizes(root: Path) -> None:
    """Bytes of all files, closed stores, for each byte of rows."""
    print("\nbytes on disk for each byte of rows, indexes included")
    for width, count in ((768, 20_000), (10, 200_000)):
        store = filled(root / str(width), torch.randint(-(2**63), 2**63 - 1, (count, 2)), torch.randn(count, width))
        ops.store_close(store)
        files = sum(path.stat().st_size for path in (root / str(width)).iterdir())
        print(f"  {4 * width:5} byte rows {files / (4 * width * count):39.3f}")


def opening(root: Path) -> None:
    store = open_store(root)
    for _ in range(OPENED_ROWS // 1000):
        ops.store_write(store, torch.randint(-(2**63), 2**63 - 1, (1000, 2)), LAYOUT, [torch.zeros(1000, 4)])
    ops.store_close(store)
    indexes = list(root.glob("*.idx"))
    buffer = bytearray(1 << 18)

    def read() -> None:
        for index in indexes:
            with index.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    rivals = [
        ("limit: reading the index files", read),
        ("open", lambda: ops.store_close(open_store(root))),
    ]
    table(f"open a store of {OPENED_ROWS} rows", rivals, 7, OPENED_ROWS / 1e6, "M rows/s")


def main() -> None:
    torch.set_num_threads(1)
    for measured in (sizes, opening):
        with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as folder:
            measured(Path(folder))
    for width, rows, rounds in ((768, ROWS, 15), (151_296, 512, 5)):
        keys, data = torch.randint(-(2**63), 2**63 - 1, (rows, 2)), torch.randn(rows, width)
        for compare in (writing, reading, compressing) if width == 768 else (writing, reading):
            with tempfile.TemporaryDirectory(prefix="torchcache-bench-") as folder:
                compare(Path(folder), keys, data, rounds)


if __name__ == "__main__":
    main()
