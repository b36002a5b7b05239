"""The files are what docs/format.md says: a second implementation reads ours, ours reads its."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from format_reader import RAW, ZSTD, Row, read_segment, read_store
from format_writer import write_segment
from golden_rows import DTYPES, golden_rows
from golden_rows import keys_tensor as as_tensor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchcache._native import ops

LIMIT = 10**12


def open_store(directory: Path, *, zstd: bool = False, mmap: bool = False) -> int:
    return ops.store_open(str(directory), LIMIT, zstd, 3, 2, mmap, 64 << 20)


def as_bytes(rows: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).reshape(len(rows), -1)


def key(low: int) -> int:
    """A 128-bit key; keys that share their low half are one to the store."""
    return low | (low * 0x9E3779B97F4A7C15 & 2**64 - 1) << 64


rows_of_one_size = st.integers(1, 300).flatmap(
    lambda size: st.dictionaries(
        st.integers(0, 2**62 - 1),
        st.one_of(st.binary(min_size=size, max_size=size), st.just(bytes(size))),
        min_size=1,
        max_size=20,
    )
)
layouts = st.text(max_size=30)


@given(rows=rows_of_one_size, layout=layouts, zstd=st.booleans())
def test_an_independent_reader_reads_what_the_store_wrote(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[int, bytes], layout: str, zstd: bool
) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = open_store(directory, zstd=zstd)
    keys, data = [key(low) for low in rows], as_bytes(list(rows.values()))
    assert ops.store_write(store, as_tensor(keys), layout, [data])[0] == len(keys)
    ops.store_close(store)
    read = {row.key: (row.layout, row.data) for row in read_store(directory)}
    assert read == {key(low): (layout.encode(), row) for low, row in rows.items()}


@given(
    blocks=st.lists(st.tuples(st.sampled_from([RAW, ZSTD]), rows_of_one_size), max_size=4),
    layout=layouts.filter(bool),
    index=st.booleans(),
    mmap=st.booleans(),
)
def test_the_store_reads_what_an_independent_writer_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    blocks: list[tuple[int, dict[int, bytes]]],
    layout: str,
    index: bool,
    mmap: bool,
) -> None:
    directory = tmp_path_factory.mktemp("store")
    encoded = [
        (codec, [Row(key(4 * low + i), layout.encode(), data) for low, data in rows.items()])
        for i, (codec, rows) in enumerate(blocks)
    ]
    write_segment(directory, encoded, index)
    store = open_store(directory, mmap=mmap)
    for _, rows in encoded:
        keys = as_tensor([row.key for row in rows])
        present, found = ops.store_lookup(store, keys)
        assert present.all() and found == layout
        wanted = as_bytes([row.data for row in rows])
        out = torch.empty_like(wanted)
        assert ops.store_read(store, keys, layout, [out]).all()
        assert torch.equal(out, wanted)
    ops.store_close(store)


@pytest.mark.parametrize("zstd", [False, True])
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, zstd: bool) -> None:
    bits = torch.randint(0, 2, (5, 64), dtype=torch.uint8)
    for number, name in enumerate(DTYPES):
        store = open_store(tmp_path, zstd=zstd)
        keys = torch.arange(10).reshape(5, 2) + 100 * number
        leaf = bits.view(getattr(torch, name))
        ops.store_write(store, keys, name, [leaf])
        ops.store_close(store)
        store = open_store(tmp_path)
        out = torch.empty_like(leaf)
        assert ops.store_read(store, keys, name, [out]).all()
        assert torch.equal(out.view(torch.uint8), bits)
        ops.store_close(store)


@pytest.mark.parametrize("zstd", [False, True])
def test_an_independent_reader_reads_every_layout_and_dtype(tmp_path: Path, zstd: bool) -> None:
    store = open_store(tmp_path, zstd=zstd)
    rows = golden_rows("zstd" if zstd else "raw")
    for row in rows:
        ops.store_write(store, as_tensor([row.key]), row.layout, [leaf.unsqueeze(0) for leaf in row.leaves])
    ops.store_close(store)
    read = {row.key: (row.layout.decode(), row.data) for row in read_store(tmp_path)}
    assert read == {row.key: (row.layout, row.data) for row in rows}


@pytest.mark.parametrize("codec", [RAW, ZSTD])
def test_the_store_reads_every_layout_and_dtype_of_an_independent_writer(tmp_path: Path, codec: int) -> None:
    rows = golden_rows("zstd" if codec == ZSTD else "raw")
    write_segment(tmp_path, [(codec, [Row(row.key, row.layout.encode(), row.data)]) for row in rows], index=True)
    store = open_store(tmp_path)
    for row in rows:
        out = [torch.empty_like(leaf).unsqueeze(0) for leaf in row.leaves]
        assert ops.store_read(store, as_tensor([row.key]), row.layout, out).all()
        assert all(torch.equal(got[0], leaf) for got, leaf in zip(out, row.leaves, strict=True))
    ops.store_close(store)


def test_leaves_of_a_row_stand_one_after_another(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[3, 4], [5, 6]], dtype=torch.int16)
    ops.store_write(store, as_tensor([1, 2]), "two leaves", [first, second])
    ops.store_close(store)
    rows = {row.key: row.data for row in read_store(tmp_path)}
    assert rows == {
        1: first[0].numpy().tobytes() + second[0].numpy().tobytes(),
        2: first[1].numpy().tobytes() + second[1].numpy().tobytes(),
    }


def test_files_are_named_and_sized_as_the_page_says(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    keys = torch.arange(2000).reshape(1000, 2)
    ops.store_write(store, keys, "layout", [torch.rand(1000, 768)])
    ops.store_flush(store)
    assert [path.suffix for path in tmp_path.iterdir()] == [".seg"]
    ops.store_close(store)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".idx", ".seg"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1.02 * 1000 * 3072


def test_a_block_in_another_segment_or_place_is_no_block(tmp_path: Path) -> None:
    rows = [Row(1, b"layout", b"some bytes")]
    path = write_segment(tmp_path, [(RAW, rows)])
    block = path.read_bytes()[64:]
    other = write_segment(tmp_path, [])
    with other.open("ab") as file:
        file.write(block)  # copied from another segment
    assert not list(read_segment(other.read_bytes(), bytes.fromhex(other.stem)))
    with path.open("ab") as file:
        file.write(block)  # copied within its segment
    path.rename(tmp_path / "gone")
    store = open_store(tmp_path)
    present, _ = ops.store_lookup(store, as_tensor([1]))
    assert not present.any()
    ops.store_close(store)
