"""A second writer of stores, written from docs/format.md alone. Its counterpart is format_reader.py."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import zstandard
from format_reader import BLOCK, BLOCK_MAGIC, MASK, ZSTD, Row, low, row_check

SEGMENT_MAGIC, INDEX_MAGIC = bytes.fromhex("8954435345470D0A"), bytes.fromhex("8954434944580D0A")


def padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def write_segment(directory: Path, blocks: list[tuple[int, list[Row]]], index: bool = False) -> Path:
    """Blocks are (codec, rows of one layout and size)."""
    name = os.urandom(16)
    header = SEGMENT_MAGIC + struct.pack("<II", 1, 64) + name + bytes(24)
    data = header + struct.pack("<Q", low(header))
    placed = []
    for codec, rows in blocks:
        placed.append((len(data), codec, rows))
        data += encode_block(name, len(data), codec, rows)
    path = directory / f"{name.hex()}.seg"
    path.write_bytes(data)
    if index:
        path.with_suffix(".idx").write_bytes(encode_index(name, data, placed))
    return path


def stored_rows(codec: int, rows: list[Row]) -> list[bytes]:
    frames = [zstandard.ZstdCompressor().compress(row.data) for row in rows] if codec else []
    smaller = [f if len(f) < len(r.data) else r.data for f, r in zip(frames, rows, strict=False)]
    return smaller if codec == ZSTD else [row.data for row in rows]


def encode_block(name: bytes, at: int, codec: int, rows: list[Row], stored: list[bytes] | None = None) -> bytes:
    layout, stored = rows[0].layout, stored_rows(codec, rows) if stored is None else stored
    checks = [row_check(s, row.key) for s, row in zip(stored, rows, strict=True)]
    table = padded(layout, 8) + b"".join(row.key.to_bytes(16, "big") for row in rows)
    table += np.array(checks, "<u8").tobytes()
    if codec == ZSTD:
        table += np.array([len(s) for s in stored], "<u4").tobytes()
    table, payload = padded(table, 64), b"".join(stored)
    sizes = (len(rows), len(layout), len(rows[0].data), len(payload))
    header = BLOCK.pack(BLOCK_MAGIC, 1, codec, 0, *sizes, at, 0, low(table))
    return header + struct.pack("<Q", low(name + header)) + table + padded(payload, 64)


class Block(NamedTuple):
    """As it stands in the catalog of an index."""

    offset: int
    row_bytes: int
    payload_bytes: int
    rows: int
    layout: int  # number
    codec: int


class Entry(NamedTuple):
    low: int  # of the key
    check: int
    block: int  # number
    row: int


def encode_index(name: bytes, data: bytes, placed: list[tuple[int, int, list[Row]]]) -> bytes:
    """The index of a segment with these blocks: (offset, codec, rows)."""
    layouts = sorted({rows[0].layout for _, _, rows in placed})
    blocks, entries = [], []
    for number, (at, codec, rows) in enumerate(placed):
        stored = stored_rows(codec, rows)
        payload = sum(map(len, stored))
        blocks.append(Block(at, len(rows[0].data), payload, len(rows), layouts.index(rows[0].layout), codec))
        for i, row in enumerate(rows):
            entries.append(Entry(row.key & MASK, row_check(stored[i], row.key), number, i))
    return encode_index_of(name, len(data), layouts, blocks, sorted(entries))


def encode_index_of(
    name: bytes, covered: int, layouts: list[bytes], blocks: list[Block], entries: list[Entry]
) -> bytes:
    """An index that says this, be it true or not, with right checks."""
    pages = b""
    for first in range(0, len(entries), 170):
        some = b"".join(struct.pack("<QQII", *entry) for entry in entries[first : first + 170])
        page = struct.pack("<Q", first // 170) + some
        pages += struct.pack("<Q", low(name + page)) + page
    catalog = b"".join(padded(struct.pack("<I", len(text)) + text, 8) for text in layouts)
    catalog += b"".join(struct.pack("<QQQIIII", *block, 0) for block in blocks)
    footer = INDEX_MAGIC + struct.pack("<II", 1, len(layouts)) + name
    footer += struct.pack("<QIIQ", covered, len(blocks), len(entries), low(catalog))
    return pages + catalog + footer + struct.pack("<Q", low(footer))
