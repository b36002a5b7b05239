"""A second reader and writer of stores, written from docs/format.md alone: plain Python, no speed.

It shares no code with the library, so what both agree on is what the page says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
import zstandard

RAW, ZSTD = 0, 1
MASK = 2**64 - 1
BLOCK = struct.Struct("<4sHBBIIQQQQQ")  # all of a block's header but its own check
BLOCK_MAGIC, SEGMENT_MAGIC = bytes.fromhex("89544342"), bytes.fromhex("8954435345470D0A")
INDEX_MAGIC = bytes.fromhex("8954434944580D0A")


class Row(NamedTuple):
    key: int  # 128 bits
    layout: bytes
    data: bytes


def low(data: bytes) -> int:
    return xxhash.xxh3_128_intdigest(data.ljust(256, b"\0")) & MASK


def padded(data: bytes, unit: int) -> bytes:
    return data + bytes(-len(data) % unit)


def row_check(stored: bytes, key: int) -> int:
    high = key >> 64
    return low(stored) ^ key & MASK ^ (high << 32 | high >> 32) & MASK


# ---- reading


def read_store(directory: Path) -> Iterator[Row]:
    for path in sorted(directory.iterdir()):
        digits, suffix = path.name[:-4], path.name[-4:]
        if len(digits) == 32 and set(digits) <= set("0123456789abcdef") and suffix == ".seg":
            yield from read_segment(path.read_bytes()[: 2**31], bytes.fromhex(digits))


def read_segment(data: bytes, name: bytes) -> Iterator[Row]:
    at = 64
    while at + 64 <= len(data):
        end = block_end(data, at, name)
        if end is None:
            at += 64
        elif end > len(data):
            return
        else:
            yield from read_block(data, at)
            at = end


def block_end(data: bytes, at: int, name: bytes) -> int | None:
    """Where a right block at this offset ends (that may be after the data), or None."""
    magic, version, codec, zero, n, size, row, payload, offset, zeros, check = BLOCK.unpack_from(data, at)
    right = low(name + data[at : at + 56]) == int.from_bytes(data[at + 56 : at + 64], "little")
    if (magic, version, zero, zeros, offset) != (BLOCK_MAGIC, 1, 0, 0, at) or not right:
        return None
    if codec > ZSTD or not 1 <= n <= 2**20 or size > 65536 or row > 2**30:
        return None
    if payload > n * row or (codec == RAW and payload != n * row):
        return None
    start = payload_start(at, codec, n, size)
    end = start + payload + -payload % 64
    if end > len(data):
        return end if end <= 2**31 else None
    return end if low(data[at + 64 : start]) == check else None


def payload_start(at: int, codec: int, n: int, layout_bytes: int) -> int:
    table = layout_bytes + -layout_bytes % 8 + (28 if codec == ZSTD else 24) * n
    return at + 64 + table + -table % 64


def read_block(data: bytes, at: int) -> Iterator[Row]:
    _, _, codec, _, n, size, row_bytes, *_ = BLOCK.unpack_from(data, at)
    keys_at = at + 64 + size + -size % 8
    keys = [int.from_bytes(data[keys_at + 16 * i :][:16], "big") for i in range(n)]
    checks = np.frombuffer(data, "<u8", n, keys_at + 16 * n)
    lengths = np.frombuffer(data, "<u4", n, keys_at + 24 * n) if codec == ZSTD else [row_bytes] * n
    position = payload_start(at, codec, n, size)
    for key, check, length in zip(keys, checks, lengths, strict=True):
        stored = data[position : position + int(length)]
        position += int(length)
        if row_check(stored, key) == int(check):
            is_frame = len(stored) != row_bytes
            row = zstandard.ZstdDecompressor().decompress(stored) if is_frame else stored
            yield Row(key, data[at + 64 : at + 64 + size], row)


# ---- writing


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


def encode_block(name: bytes, at: int, codec: int, rows: list[Row]) -> bytes:
    layout, stored = rows[0].layout, stored_rows(codec, rows)
    checks = [row_check(s, row.key) for s, row in zip(stored, rows, strict=True)]
    table = padded(layout, 8) + b"".join(row.key.to_bytes(16, "big") for row in rows)
    table += np.array(checks, "<u8").tobytes()
    if codec == ZSTD:
        table += np.array([len(s) for s in stored], "<u4").tobytes()
    table, payload = padded(table, 64), b"".join(stored)
    sizes = (len(rows), len(layout), len(rows[0].data), len(payload))
    header = BLOCK.pack(BLOCK_MAGIC, 1, codec, 0, *sizes, at, 0, low(table))
    return header + struct.pack("<Q", low(name + header)) + table + padded(payload, 64)


def encode_index(name: bytes, data: bytes, blocks: list[tuple[int, int, list[Row]]]) -> bytes:
    layouts = sorted({rows[0].layout for _, _, rows in blocks})
    catalog = b"".join(padded(struct.pack("<I", len(text)) + text, 8) for text in layouts)
    entries = []
    for number, (at, codec, rows) in enumerate(blocks):
        stored = stored_rows(codec, rows)
        sizes = (len(rows[0].data), sum(map(len, stored)), len(rows))
        layout = layouts.index(rows[0].layout)
        catalog += struct.pack("<QQQIIII", at, *sizes, layout, codec, 0)
        for i, row in enumerate(rows):
            entries.append((row.key & MASK, row_check(stored[i], row.key), number, i))
    entries.sort()
    pages = b""
    for first in range(0, len(entries), 170):
        some = b"".join(struct.pack("<QQII", *entry) for entry in entries[first : first + 170])
        page = struct.pack("<Q", first // 170) + some
        pages += struct.pack("<Q", low(name + page)) + page
    footer = INDEX_MAGIC + struct.pack("<II", 1, len(layouts)) + name
    footer += struct.pack("<QIIQ", len(data), len(blocks), len(entries), low(catalog))
    return pages + catalog + footer + struct.pack("<Q", low(footer))
