"""What is in a directory on purpose, right checks and all, is ignored: memory stays bounded, nothing is executed."""

from __future__ import annotations

import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from format_reader import BLOCK, BLOCK_MAGIC, MASK, RAW, ZSTD, Row, low, row_check
from format_writer import Block, Entry, encode_block, encode_index_of, write_segment
from golden_rows import keys_tensor
from hypothesis import given
from hypothesis import strategies as st
from store_harness import LAYOUT, Store, batch, forked, reopened, succeeded, write

from torchcache._native import ops
from torchcache.tiers.layout import Layout

NAME = bytes(range(16))
MIB = 1024  # kibibytes, in which the system counts memory


def in_bounded_memory(run: Callable[[], None], most: int) -> None:
    """Runs it in a child, which may take so many kibibytes more than it has."""

    def measured() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before <= most

    assert succeeded(forked(measured))


def read(directory: Path, keys: list[int], size: int, layout: str = LAYOUT) -> list[bytes | None]:
    """Rows of so many bytes as the store reads them; None for those that it does not."""
    store = Store(directory)
    out = torch.zeros(len(keys), size, dtype=torch.uint8)
    good = ops.store_read(store.id, keys_tensor(keys), layout, [out])
    store.close()
    return [bytes(row.tolist()) if found else None for row, found in zip(out, good.tolist())]


# ---- a directory


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    def name(number: int, suffix: str = "seg") -> Path:
        return tmp_path / f"{number:032x}.{suffix}"

    os.mkfifo(name(1))
    name(2).symlink_to("/dev/zero")
    name(3).mkdir()
    name(4).write_bytes(os.urandom(100_000))
    name(5).symlink_to(name(4))
    with name(6).open("wb") as sparse:
        sparse.truncate(1 << 40)
    name(6, "idx").symlink_to("/dev/zero")
    name(7).write_bytes(b"")
    name(7, "idx").write_bytes(os.urandom(5000))
    os.mkfifo(name(8, "idx"))
    name(8).write_bytes(b"\x89TCB" * 1000)
    (tmp_path / f"{'A' * 32}.seg").write_bytes(b"upper case")
    (tmp_path / "new\nline.seg").write_bytes(b"")
    (tmp_path / f"{9:032x}.seg.tmp").write_bytes(b"")
    yield tmp_path


@pytest.mark.slow
def test_a_hostile_directory_is_ignored_with_warnings_that_name_it(hostile: Path) -> None:
    def use() -> None:
        keys, rows = batch(10, 1)
        store = Store(hostile)
        assert store.found(keys) == 0
        store.put(keys, rows)
        store.flush()
        assert store.right(keys, rows) == 10
        warnings = store.warnings()
        assert warnings and all(str(hostile) in warning for warning in warnings)
        assert len(warnings) == len(set(warnings)) <= 10
        store.close()
        (hostile / f"{6:032x}.seg").unlink()  # two gigabytes of zeros are enough once
        assert reopened(hostile, keys, rows) == 10

    in_bounded_memory(use, 32 * MIB)


# ---- blocks


def header(at: int, **wrong: Any) -> bytes:
    """The header of a block of one raw row of 8 bytes at this offset; its check is right, whatever is wrong."""
    fields: dict[str, Any] = {"magic": BLOCK_MAGIC, "version": 1, "codec": RAW, "zero": 0, "rows": 1, "layout": 0}
    fields |= {"row_bytes": 8, "payload": 8, "offset": at, "zeros": 0, "table_check": 0} | wrong
    packed = BLOCK.pack(*fields.values())
    return packed + struct.pack("<Q", low(NAME + packed))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0, "payload": 0},
        {"rows": 2**20 + 1, "payload": 8 * (2**20 + 1)},
        {"rows": 2**32 - 1, "row_bytes": 2**30, "payload": (2**32 - 1) * 2**30},
        {"layout": 65537},
        {"layout": 2**32 - 1},
        {"row_bytes": 2**30 + 1, "payload": 2**30 + 1},
        {"row_bytes": 2**61, "rows": 8, "payload": 0},
        {"row_bytes": 2**30, "rows": 2**20, "payload": 2**50},
        {"payload": 2**64 - 64},
        {"codec": ZSTD, "payload": 9},
        {"codec": 2},
        {"version": 2},
        {"zero": 1},
        {"zeros": 1},
        {"offset": 0},
        {"magic": b"ABCD"},
    ],
    ids=str,
)
def test_a_header_that_claims_too_much_is_passed_over_and_what_follows_is_read(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    data = bytes(64) + header(64, **wrong)
    row = Row(5, LAYOUT.encode(), b"12345678")
    (tmp_path / f"{NAME.hex()}.seg").write_bytes(data + encode_block(NAME, len(data), RAW, [row]))
    in_bounded_memory(lambda: exit_unless(read(tmp_path, [5], 8) == [row.data]), 32 * MIB)


def exit_unless(right: bool) -> None:
    assert right


# ---- frames

ROW = bytes(1000)
FRAME = zstandard.ZstdCompressor().compress(ROW)
MAGIC = bytes.fromhex("28B52FFD")
# A single segment whose content size is 1000, and in it one block of 128 KiB of equal bytes: RFC 8878, 3.1.1.
LARGER_THAN_IT_SAYS = (
    MAGIC + b"\x60" + struct.pack("<H", 1000 - 256) + (131072 << 3 | 2 | 1).to_bytes(3, "little") + b"7"
)


@pytest.mark.parametrize(
    "stored",
    [
        pytest.param(zstandard.ZstdCompressor().compress(bytes(1 << 28)), id="a bomb of 256 MiB"),
        pytest.param(LARGER_THAN_IT_SAYS, id="larger than it says"),
        pytest.param(zstandard.ZstdCompressor().compress(bytes(999)), id="smaller"),
        pytest.param(zstandard.ZstdCompressor(write_content_size=False).compress(ROW), id="without a size"),
        pytest.param(FRAME + FRAME, id="two frames"),
        pytest.param(FRAME + b"more", id="a frame and more"),
        pytest.param(FRAME[:-1], id="cut off"),
        pytest.param(struct.pack("<II", 0x184D2A50, 4) + b"skip", id="a skippable frame"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"no frame", id="no frame"),
    ],
)
def test_what_is_not_one_frame_of_the_row_is_a_miss(tmp_path: Path, stored: bytes) -> None:
    bad, good = Row(1, LAYOUT.encode(), ROW), Row(2, LAYOUT.encode(), ROW)
    block = encode_block(NAME, 64, ZSTD, [bad, good], [stored, FRAME])
    if len(stored) >= len(ROW):  # longer than a row may be: no block then
        block += encode_block(NAME, 64 + len(block), ZSTD, [good])
    (tmp_path / f"{NAME.hex()}.seg").write_bytes(bytes(64) + block)
    in_bounded_memory(lambda: exit_unless(read(tmp_path, [1, 2], 1000) == [None, ROW]), 32 * MIB)


def test_rows_of_another_size_than_is_asked_for_are_misses(tmp_path: Path) -> None:
    keys, rows = batch(1, 1, 1000)
    write(tmp_path, (keys, torch.zeros_like(rows)), zstd=True)
    store = Store(tmp_path)
    out = torch.full((1, 10), 7.0)
    assert not ops.store_read(store.id, keys, LAYOUT, [out]).any()
    assert (out == 7).all()
    store.close()


# ---- indexes


def a_segment(directory: Path) -> tuple[Path, list[Row], int]:
    """A segment of ten rows of 16 bytes, in one block at 64, and its size."""
    rows = [Row(1000 + i, LAYOUT.encode(), bytes([i]) * 16) for i in range(10)]
    path = write_segment(directory, [(RAW, rows)])
    return path, rows, path.stat().st_size


numbers = st.one_of(st.sampled_from([0, 1, 8, 10, 16, 64, 128, 160, 448, 512]), st.integers(0, 2**32 - 1))
lying_blocks = st.builds(Block, numbers, numbers, numbers, numbers, st.integers(0, 1), st.integers(0, 1))
lying_entries = st.tuples(st.integers(0, 9), st.integers(0, 3), st.integers(0, 12))


@given(
    blocks=st.lists(st.one_of(st.just(Block(64, 16, 160, 10, 0, RAW)), lying_blocks), min_size=1, max_size=3),
    entries=st.lists(lying_entries, max_size=200),
    covered=st.sampled_from([64, 128, 512, 640, 2**31, 2**31 + 64]),
)
def test_an_index_with_right_checks_that_lies_gives_no_wrong_row(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[Block], entries: list[tuple[int, int, int]], covered: int
) -> None:
    path, rows, size = a_segment(tmp_path_factory.mktemp("store"))
    claims = [Entry(rows[i].key, row_check(rows[i].data, rows[i].key), block, row) for i, block, row in entries]
    name = bytes.fromhex(path.stem)
    index = encode_index_of(name, min(covered, size) if covered < 2**31 else covered, [LAYOUT.encode()], blocks, claims)
    path.with_suffix(".idx").write_bytes(index)
    got = read(path.parent, [row.key & MASK for row in rows], 16)
    assert all(data is None or data == row.data for data, row in zip(got, rows))


def test_an_index_with_overlapping_blocks_gives_right_rows(tmp_path: Path) -> None:
    path, rows, size = a_segment(tmp_path)
    blocks = [Block(64, 16, 160, 10, 0, RAW), Block(64, 16, 160, 10, 0, RAW), Block(128, 16, 96, 6, 0, RAW)]
    claims = [
        Entry(row.key, row_check(row.data, row.key), block, i) for i, row in enumerate(rows) for block in (2, 1, 0)
    ]
    claims = [entry for entry in claims if entry.row < blocks[entry.block].rows]
    name = bytes.fromhex(path.stem)
    path.with_suffix(".idx").write_bytes(encode_index_of(name, size, [LAYOUT.encode()], blocks, claims))
    assert read(tmp_path, [row.key for row in rows], 16) == [row.data for row in rows]


def test_an_index_for_which_there_is_no_memory_is_a_warning_and_the_store_goes_on(tmp_path: Path) -> None:
    """Files without bytes on the disk that say that they have gigabytes."""
    path = tmp_path / f"{NAME.hex()}.seg"
    with path.open("wb") as segment, path.with_suffix(".idx").open("wb") as index:
        segment.truncate(1 << 31)
        index.truncate((1 << 32) - 64)
        index.seek(0, os.SEEK_END)
        index.write(encode_index_of(NAME, 1 << 31, [], [], []))

    def use() -> None:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 30), -1))
        store = Store(tmp_path)
        keys, rows = batch(10, 1)
        store.put(keys, rows)
        store.flush()
        assert store.right(keys, rows) == 10
        (warning,) = store.warnings()
        assert "Cannot allocate memory" in warning and str(tmp_path) in warning
        store.close()

    assert succeeded(forked(use))


# ---- layouts


@pytest.mark.parametrize("name", ["os:system", "builtins:exec", "subprocess:Popen", "pathlib:Path", "antigravity:fly"])
def test_nothing_that_a_layout_names_is_imported_or_called(name: str) -> None:
    text = '{"leaves":[{"dtype":"float32","shape":[1],"stored":"float32"}],"tree":["class","%s",["a","*"]]}'
    assert Layout.from_json(text % name) is None
    assert "antigravity" not in sys.modules


LEAF = '{"leaves":[{"dtype":"%s","shape":%s,"stored":"float32"}],"tree":"*"}'
NO_LAYOUTS = {
    "nothing": "",
    "a list": "[]",
    "deep JSON": "[" * 100_000,
    "a deep tree": '{"leaves":[],"tree":' + '["list",' * 500 + '"*"' + "]" * 500 + "}",
    "no leaves": '{"leaves":1e999}',
    "a negative size": LEAF % ("float32", "[-1]"),
    "a size that is no int": LEAF % ("float32", "[1e9]"),
    "a huge size": LEAF % ("float32", "[99999999999999999999]"),
    "a function for a dtype": LEAF % ("load", "[1]"),
    "a module for a dtype": LEAF % ("nn", "[1]"),
}


@pytest.mark.parametrize("text", NO_LAYOUTS.values(), ids=NO_LAYOUTS.keys())
def test_a_layout_that_is_none_is_a_miss(text: str) -> None:
    assert Layout.from_json(text) is None
