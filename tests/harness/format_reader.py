"""A second reader of stores, written from docs/format.md alone: plain Python, no speed, at most 100 lines.

It shares no code with the library, so what both agree on is what the page says. Its counterpart is format_writer.py.
"""

from __future__ import annotations

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
BLOCK_MAGIC = bytes.fromhex("89544342")


class Row(NamedTuple):
    key: int  # 128 bits
    layout: bytes
    data: bytes


def low(data: bytes) -> int:
    return xxhash.xxh3_128_intdigest(data.ljust(256, b"\0")) & MASK


def row_check(stored: bytes, key: int) -> int:
    high = key >> 64
    return low(stored) ^ key & MASK ^ (high << 32 | high >> 32) & MASK


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
