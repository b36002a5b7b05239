"""Damaged, replaced and hostile files are misses: never a wrong row, never an exception."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from store_harness import DAMAGED, Store, batch, files, reopened, write


@pytest.fixture(params=[False, True], ids=["raw", "zstd"])
def zstd(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["pread", "mmap"])
def mmap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_a_segment_cut_at_any_byte_is_misses(tmp_path: Path, zstd: bool) -> None:
    keys, rows = batch(6, 1)
    write(tmp_path, (keys[:3], rows[:3]), (keys[3:], rows[3:]), zstd=zstd)
    (index,), (segment,) = files(tmp_path, "idx"), files(tmp_path, "seg")
    whole = segment.read_bytes()
    for with_index in (True, False):
        for size in reversed(range(len(whole))):
            os.truncate(segment, size)
            assert reopened(tmp_path, keys, rows) < 6 or size > len(whole) - 64
        segment.write_bytes(whole)
        assert reopened(tmp_path, keys, rows) == 6
        if with_index:
            index.unlink()


def test_any_flipped_bit_costs_only_the_rows_of_its_block(tmp_path: Path, zstd: bool) -> None:
    keys, rows = batch(6, 1)
    write(tmp_path, (keys[:2], rows[:2]), (keys[2:], rows[2:]), zstd=zstd)
    (index,), (segment,) = files(tmp_path, "idx"), files(tmp_path, "seg")
    index.unlink()
    data = bytearray(segment.read_bytes())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            segment.write_bytes(data)
            assert reopened(tmp_path, keys, rows) >= 2
            data[at] ^= 1 << bit


def test_any_flipped_bit_under_an_index_costs_one_row(tmp_path: Path) -> None:
    keys, rows = batch(4, 1)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    for at, bit in itertools.product(range(len(data)), range(8)):
        data[at] ^= 1 << bit
        segment.write_bytes(data)
        assert reopened(tmp_path, keys, rows) >= 3
        data[at] ^= 1 << bit


@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))))
def test_no_damage_gives_a_wrong_row(tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]) -> None:
    directory = tmp_path_factory.mktemp("store")
    keys, rows = batch(20, 1)
    write(directory, (keys[:9], rows[:9]), (keys[9:], rows[9:]), zstd=len(damage) % 2 == 1)
    for path in files(directory, "seg") + files(directory, "idx"):
        data = bytearray(path.read_bytes())
        for at, new in damage:
            at %= len(data)
            data[at : at + len(new)] = new
        path.write_bytes(data)
    reopened(directory, keys, rows)


def test_a_damaged_row_is_counted_and_may_be_put_again(tmp_path: Path) -> None:
    keys, rows = batch(10, 1)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    data[data.index(rows[4].numpy().tobytes())] ^= 1
    segment.write_bytes(data)
    store = Store(tmp_path)
    assert store.found(keys) == 10 and store.right(keys, rows) == 9
    assert store.stats()[DAMAGED] == 1 and store.found(keys) == 9
    (warning,) = store.warnings()
    assert str(segment) in warning
    store.put(keys, rows)
    assert store.right(keys, rows) == 10
    store.close()
    assert reopened(tmp_path, keys, rows) == 10  # the second copy counts where the first fails


def test_no_index_a_damaged_index_and_a_wrong_index_only_cost_a_scan(tmp_path: Path) -> None:
    keys, rows = batch(400, 1)
    write(tmp_path, (keys, rows))
    (index,) = files(tmp_path, "idx")
    data = bytearray(index.read_bytes())
    for at in range(0, len(data), 7):
        data[at] ^= 1 << at % 8
        index.write_bytes(data)
        assert reopened(tmp_path, keys, rows) == 400
        data[at] ^= 1 << at % 8
    for wrong in (b"", data[:-1], data + b"\0", bytes(len(data)), os.urandom(5000)):
        index.write_bytes(wrong)
        assert reopened(tmp_path, keys, rows) == 400
    other = tmp_path / "other"
    write(other, batch(400, 2))
    shutil.copy(files(other, "idx")[0], index)
    assert reopened(tmp_path, keys, rows) == 400
    index.unlink()
    assert reopened(tmp_path, keys, rows) == 400


def test_rows_behind_what_an_index_covers_are_found(tmp_path: Path) -> None:
    early, late = batch(5, 1), batch(5, 2)
    write(tmp_path, early, late)
    (segment,), (index,) = files(tmp_path, "seg"), files(tmp_path, "idx")
    whole = segment.read_bytes()
    short = tmp_path / "short"
    short.mkdir()
    start_of_second = whole.rindex(b"\x89TCB")
    (short / segment.name).write_bytes(whole[:start_of_second])
    shutil.copy(index, short)
    assert reopened(short, *early) == 5  # the index covers more than there is: scanned
    (short / segment.name).write_bytes(whole)
    assert reopened(short, *late) == 5


def test_segments_in_each_others_place_are_misses(tmp_path: Path) -> None:
    first, second = batch(5, 1), batch(5, 2)
    write(tmp_path, first)
    write(tmp_path, second)
    a, b = files(tmp_path, "seg")
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    assert reopened(tmp_path, *first) == 0 and reopened(tmp_path, *second) == 0


def test_a_segment_that_is_cut_or_replaced_while_open_is_misses(tmp_path: Path, mmap: bool) -> None:
    keys, rows = batch(2000, 1, 100)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    store = Store(tmp_path, mmap=mmap)
    assert store.right(keys[:1000], rows[:1000]) == 1000
    os.truncate(segment, segment.stat().st_size // 2)
    assert 0 < store.right(keys, rows) < 2000
    segment.write_bytes(os.urandom(900_000))
    assert store.right(keys, rows) == 0
    segment.unlink()
    assert store.right(keys, rows) == 0
    store.close()


def test_a_segment_that_another_takes_the_name_of_while_open_is_right_rows_or_misses(
    tmp_path: Path, mmap: bool
) -> None:
    keys, rows = batch(50, 1, 100)
    write(tmp_path / "store", (keys, rows))
    write(tmp_path / "other", batch(50, 2, 100))
    (segment,), (other,) = files(tmp_path / "store", "seg"), files(tmp_path / "other", "seg")
    store = Store(tmp_path / "store", mmap=mmap)
    store.right(keys[:25], rows[:25])
    other.rename(segment)
    store.right(keys, rows)
    assert store.found(batch(50, 2, 100)[0]) == 0  # its blocks are not those of this name
    store.close()
    assert reopened(tmp_path / "store", keys, rows) == 0
