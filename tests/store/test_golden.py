"""Stores of version 1 that are committed (tests/store/golden) are read bit for bit, and what is in them is a hit."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from format_reader import read_store
from golden_rows import (
    MASK,
    MODULE_ROWS,
    SEGMENTS,
    GoldenRow,
    Pair,
    X,
    cached_function,
    cached_module,
    function_call,
    golden_rows,
    keys_tensor,
)
from torch import Tensor

from torchcache._native import ops

VERSION_1 = Path(__file__).parent / "golden" / "version1"


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    """A copy, so that nothing can be written to what is committed."""
    return Path(shutil.copytree(VERSION_1, tmp_path / "version1"))


# ---- rows


@pytest.mark.parametrize("mmap", [False, True], ids=["pread", "mmap"])
@pytest.mark.parametrize("index", [True, False], ids=["index", "scan"])
def test_the_library_reads_every_row_bit_for_bit(golden: Path, index: bool, mmap: bool) -> None:
    for path in golden.glob("store/*.idx"):
        if not index:
            path.unlink()
    store = ops.store_open(str(golden / "store"), 0, False, 3, 1, mmap, 1)
    for segment in SEGMENTS:
        for layout, rows in by_layout(golden_rows(segment)):
            keys = keys_tensor([row.key for row in rows])
            present, found = ops.store_lookup(store, keys)
            assert present.all() and found == layout
            wanted = [torch.stack(parts) for parts in zip(*(row.leaves for row in rows))]
            out = [torch.empty_like(leaf) for leaf in wanted]
            assert ops.store_read(store, keys, layout, out).all()
            assert all(map(torch.equal, out, wanted))
    assert ops.store_stats(store)[0] == sum(len(layouts) * count for layouts, count, _ in SEGMENTS.values())
    assert ops.store_warnings(store) == []
    ops.store_close(store)


def by_layout(rows: Iterable[GoldenRow]) -> Iterator[tuple[str, list[GoldenRow]]]:
    groups: dict[str, list[GoldenRow]] = {}
    for row in rows:
        groups.setdefault(row.layout, []).append(row)
    yield from groups.items()


def test_an_independent_reader_reads_every_row_bit_for_bit() -> None:
    read = {row.key: (row.layout.decode(), row.data) for row in read_store(VERSION_1 / "store")}
    assert read == {row.key: (row.layout, row.data) for segment in SEGMENTS for row in golden_rows(segment)}


# ---- hits


def assert_equal(got: Any, wanted: Any) -> None:
    assert type(got) is type(wanted)
    if isinstance(wanted, Tensor):
        assert got.dtype == wanted.dtype and torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert_equal(list(got.items()), list(wanted.items()))
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for pair in zip(got, wanted):
            assert_equal(*pair)
    else:
        assert got == wanted


def test_what_a_decorated_function_wrote_is_a_hit(golden: Path) -> None:
    features = cached_function(golden, compute=False)
    pair = Pair((X * 5).to(torch.bfloat16), MASK)
    assert_equal(function_call(features), {"pair": pair, "total": (X.sum(1), None), "more": [X.double() + 1.5]})
    assert features.cache_instance.info().disk_hits == 6


def test_what_a_decorated_module_wrote_is_a_hit(golden: Path) -> None:
    module = cached_module(golden, compute=False)
    assert_equal(module(MODULE_ROWS), MODULE_ROWS * 2)
    assert module.cache_instance.info().disk_hits == 6


# ---- keys, from docs/format.md alone


def h(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data.ljust(256, b"\0"))


def encoded(value: Any) -> bytes:
    def frame(tag: str, payload: bytes) -> bytes:
        return tag.encode() + struct.pack("<Q", len(payload)) + payload

    if value is None:
        return frame("N", b"")
    if isinstance(value, int):
        return frame("i", value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True))
    if isinstance(value, float):
        return frame("f", struct.pack("<d", value))
    if isinstance(value, torch.dtype):
        return frame("T", encoded("dtype") + encoded(str(value)))
    if isinstance(value, tuple):
        return frame("t", b"".join(map(encoded, value)))
    return frame("y", value) if isinstance(value, bytes) else frame("s", value.encode())


def row_digests(x: Tensor) -> list[bytes]:
    digests = []
    for row in x:
        data = bytes(row.reshape(-1).view(torch.uint8).tolist())
        leaves = [h(data[i : i + 4096]) for i in range(0, len(data), 4096)]
        digests.append(h(b"".join(leaves)) if len(leaves) > 1 else leaves[0])
    return digests


def keys_of(description: bytes, mode: bytes, *rows: Tensor) -> list[int]:
    call = h(encoded((1, description, mode, b"", b"")))
    return [int.from_bytes(h(call + b"".join(digests)), "big") for digests in zip(*map(row_digests, rows))]


def tensor(name: str, dtype: torch.dtype, *shape: int) -> bytes:
    return encoded((name, "tensor", dtype, shape))


def plain(name: str, value: Any) -> bytes:
    return encoded(name) + encoded(value)


def test_keys_of_a_function_are_those_that_the_page_defines() -> None:
    description = tensor("x", torch.int64, 4) + tensor("mask", torch.bool) + plain("scale", 5)
    description += tensor("*rest[0]", torch.float64, 4) + plain("mode", "total")
    description += plain("**names", ("a", 2.5, None)) + plain("**weight", torch.float16)
    keys = [row.key for row in read_store(VERSION_1 / "function")]
    assert keys == keys_of(description, b"", X, MASK, X.double())


def test_keys_of_a_module_are_those_that_the_page_defines() -> None:
    keys = [row.key for row in read_store(VERSION_1 / "module")]
    assert keys == keys_of(tensor("x", torch.float32, 2000), b"\0", MODULE_ROWS)
