"""The gather kernel without a GPU: its code, compiled for the host, moves every byte once and reads nothing else."""

from __future__ import annotations

import ctypes
import functools

from hypothesis import given
from hypothesis import strategies as st
from native_harness import built

PART = 4096


@functools.cache
def library() -> ctypes.CDLL:
    found = built("gather.cpp")
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    found.gather_rows.argtypes = [pointer, long, long, pointer]
    found.gather_counted.argtypes = [pointer, long, long, pointer, pointer, long, pointer, pointer]
    return found


@st.composite
def gathers(draw: st.DrawFn) -> tuple[int, list[int], int]:
    """Bytes of a row, the slots that are wanted, and how far the first row is from an aligned address."""
    near = st.builds(lambda n, d: max(0, n + d), st.sampled_from([0, PART, 2 * PART, 512]), st.integers(-17, 17))
    size = draw(st.one_of(st.integers(0, 64), near, st.integers(0, 3 * PART)))
    return size, draw(st.lists(st.integers(0, 6), min_size=1, max_size=9)), draw(st.sampled_from([0, 0, 1, 2, 4, 8]))


@given(gathers(), st.binary(min_size=1, max_size=50))
def test_every_byte_is_moved_once_and_none_beside_it(gather: tuple[int, list[int], int], text: bytes) -> None:
    size, slots, shift = gather
    data = (text * (7 * size // len(text) + 2))[: 7 * size]
    space = ctypes.create_string_buffer(7 * size + 64)
    start = (ctypes.addressof(space) + 15) // 16 * 16 + shift
    ctypes.memmove(start, data, len(data))
    rows = (ctypes.c_void_p * len(slots))(*(start + slot * size for slot in slots))
    result = ctypes.create_string_buffer(b"\xa5" * (len(slots) * size + 48))
    out = (ctypes.addressof(result) + 15) // 16 * 16
    right = b"".join(data[slot * size : (slot + 1) * size] for slot in slots)

    library().gather_rows(rows, len(slots), size, out)
    offset = out - ctypes.addressof(result)
    assert result.raw[offset : offset + len(right)] == right
    assert set(result.raw[:offset] + result.raw[offset + len(right) : -1]) <= {0xA5}

    read = (ctypes.c_int64 * max(1, len(data)))()
    written = (ctypes.c_int64 * max(1, len(right)))()
    library().gather_counted(rows, len(slots), size, out, start, len(data), read, written)
    assert list(written)[: len(right)] == [1] * len(right)
    assert list(read)[: len(data)] == [slots.count(slot) for slot in range(7) for _ in range(size)]
