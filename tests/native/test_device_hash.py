"""The hash kernels without a GPU: their code, compiled for the host with lanes as loops, gives the CPU's digests."""

from __future__ import annotations

import ctypes
import functools
import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keys_harness import CALL, DTYPES, LEAF, as_pair, row_digest, strided
from native_harness import built
from torch import Tensor

from torchcache._native import ops

LANES = 8


class Argument(ctypes.Structure):
    """A tensor, for native code: tests/native/team.cpp."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("item", ctypes.c_int64),
        ("dims", ctypes.c_int64),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
    )


def argument(t: Tensor) -> Argument:
    numbers = ctypes.c_int64 * t.dim()
    return Argument(t.data_ptr(), t.element_size(), t.dim(), numbers(*t.shape), numbers(*t.stride()))


@functools.cache
def library() -> ctypes.CDLL:
    found = built("team.cpp")
    long, pointer = ctypes.c_int64, ctypes.c_void_p
    found.team_digests.argtypes = [pointer, ctypes.c_bool, pointer, pointer]
    found.team_keys.argtypes = [pointer, long, ctypes.c_uint64, ctypes.c_uint64, pointer, pointer]
    found.team_reads.argtypes = [long, long, pointer, pointer]
    found.team_mapping.argtypes = [long, long, pointer, pointer, pointer]
    found.team_mapping.restype = found.team_blocks.restype = long
    found.team_blocks.argtypes = [long, ctypes.c_int]
    return found


class Shape(ctypes.Structure):
    """Of a launch: blocks (0: as many as on a device), threads of a block, and in which order its teams come."""

    _fields_ = (("blocks", ctypes.c_int64), ("threads", ctypes.c_int), ("seed", ctypes.c_uint32))

    def __repr__(self) -> str:
        return f"Shape({self.blocks}, {self.threads}, {self.seed})"


ON_A_DEVICE = Shape(0, 128, 0)
TEAMS = st.integers(1, 16).map(lambda teams: LANES * teams)
SHAPES = st.builds(Shape, st.integers(0, 9), TEAMS, st.integers(0, 2**32 - 1))


def team_digests(t: Tensor, whole: bool, shape: Shape) -> list[list[int]]:
    out = torch.zeros(1 if whole else len(t), 2, dtype=torch.int64)
    library().team_digests(ctypes.byref(argument(t)), whole, ctypes.byref(shape), out.data_ptr())
    return out.tolist()


def team_keys(tensors: list[Tensor], shape: Shape) -> list[list[int]]:
    out = torch.zeros(len(tensors[0]), 2, dtype=torch.int64)
    low, high = (n % 2**64 for n in CALL)
    arguments = (Argument * len(tensors))(*map(argument, tensors))
    library().team_keys(arguments, len(tensors), low, high, ctypes.byref(shape), out.data_ptr())
    return out.tolist()


# ---- digests


def test_digests_by_teams_equal_xxhash_for_lengths_up_to_9000_bytes() -> None:
    data = random.Random(0).randbytes(9000)
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    for n in [*range(1300), *range(1300, 9000, 37), *range(2 * LEAF - 70, 2 * LEAF + 70)]:
        assert team_digests(buffer[:n], True, ON_A_DEVICE) == [as_pair(row_digest(data[:n]))], n


@given(st.integers(0, 3 * LEAF), st.integers(0, 15), SHAPES, st.randoms(use_true_random=False))
def test_digests_by_teams_equal_xxhash_at_any_address(size: int, shift: int, shape: Shape, rng: random.Random) -> None:
    data = rng.randbytes(size + shift)
    buffer = torch.frombuffer(bytearray(data + b" "), dtype=torch.uint8)
    assert team_digests(buffer[shift : shift + size], True, shape) == [as_pair(row_digest(data[shift:]))]


@given(strided(), st.booleans(), SHAPES)
def test_digests_by_teams_equal_those_of_the_cpu_for_any_strides(x: Tensor, whole: bool, shape: Shape) -> None:
    expected = ops.digests([x] if whole else list(x)).tolist()
    assert team_digests(x, whole, shape) == expected


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), min_size=1, max_size=4), SHAPES)
def test_digests_by_teams_equal_those_of_the_cpu_for_any_dtype(
    dtype: torch.dtype, sizes: list[int], shape: Shape
) -> None:
    x = torch.randint(0, 2, sizes).to(dtype)
    assert team_digests(x, True, shape) == ops.digests([x]).tolist()


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 80_000), SHAPES)
def test_rows_of_many_leaves_have_the_digests_of_the_cpu(rows: int, size: int, shape: Shape) -> None:
    x = torch.arange(rows * size).view(rows, size)
    x = x.to(torch.int32)
    assert team_digests(x, False, shape) == ops.digests(list(x)).tolist()


@given(st.data(), SHAPES)
def test_keys_by_teams_equal_those_of_the_cpu(data: st.DataObject, shape: Shape) -> None:
    batch = data.draw(st.integers(1, 5))
    rows = [torch.randn(batch, data.draw(st.integers(0, 3000))) for _ in range(data.draw(st.integers(1, 20)))]
    assert team_keys(rows, shape) == ops.keys(rows, CALL).tolist()


@given(st.data(), strided(), SHAPES)
def test_keys_by_teams_of_any_strides_equal_those_of_the_cpu(data: st.DataObject, x: Tensor, shape: Shape) -> None:
    other = torch.randn(len(x), data.draw(st.integers(0, 50)))
    rows = data.draw(st.permutations([x, other]))
    assert team_keys(rows, shape) == ops.keys(rows, CALL).tolist()


# ---- which lane reads which bytes

ROWS = st.integers(1, 40)
BYTES = st.one_of(st.integers(0, 300), st.integers(0, 5 * LEAF))


@given(ROWS, BYTES, SHAPES)
def test_messages_cover_every_byte_of_every_row_once(rows: int, size: int, shape: Shape) -> None:
    begins = range(0, size, LEAF) or range(1)
    expected = [[row, begin, min(LEAF, size - begin)] for row in range(rows) for begin in begins]
    found = torch.zeros(len(expected), 3, dtype=torch.int64)
    takers = torch.zeros(len(expected), dtype=torch.int32)
    count = library().team_mapping(rows, size, ctypes.byref(shape), found.data_ptr(), takers.data_ptr())
    assert count == len(expected) and found.tolist() == expected
    assert takers.tolist() == [LANES * 256 + 255] * count  # eight threads, each another lane


@given(ROWS, BYTES, SHAPES)
def test_lanes_read_every_byte_once_and_none_past_the_end(rows: int, size: int, shape: Shape) -> None:
    found = torch.zeros(rows, size, dtype=torch.int32)
    assert library().team_reads(rows, size, ctypes.byref(shape), found.data_ptr()) == 0
    expected = torch.ones(size, dtype=torch.int32)
    for begin in range(0, size, LEAF):
        leaf = expected[begin : begin + LEAF]
        if len(leaf) >= 256:  # XXH3's last stripe is the last 64 bytes, wherever the one before it ends
            leaf[len(leaf) - 64 : (len(leaf) - 1) // 64 * 64] += 1
    assert torch.equal(found, expected.expand(rows, size))


@given(st.integers(0, 2**40), st.sampled_from([32, 128, 1024]))
def test_launches_give_each_message_a_team_up_to_more_than_a_device_runs_at_once(messages: int, threads: int) -> None:
    teams = threads // LANES
    assert library().team_blocks(messages, threads) == min(-(-messages // teams), 8192)
