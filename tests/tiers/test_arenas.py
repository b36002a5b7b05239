"""Rows in arenas: whatever was appended in whatever parts comes back for any slots, from one chunk or from many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchcache._native import ops
from torchcache.tiers import arenas
from torchcache.tiers.arenas import RowArena
from torchcache.tiers.layout import Layout, Leaf
from torchcache.tiers.memory import MemoryTier

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.uint8, torch.complex128, torch.bool, torch.uint16, torch.float8_e4m3fn]


def layout_of(leaves: list[Tensor]) -> Layout:
    return Layout("*", tuple(Leaf(t.dtype, t.dtype, tuple(t.shape[1:]), None) for t in leaves))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y) for x, y in zip(a, b, strict=True))


def bits(t: Tensor) -> list[int]:
    return t.contiguous().view(torch.uint8).tolist() if t.numel() else []


@st.composite
def rows(draw: st.DrawFn) -> list[Tensor]:
    """Leaves [N, …] of random bits."""
    count = draw(st.integers(1, 60))
    leaves = []
    for dtype in draw(st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3)):
        shape = draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
        numbers = torch.randint(0, 2 if dtype is torch.bool else 100, (count, *shape))
        leaves.append(numbers.to(torch.float32 if dtype.is_floating_point else torch.int64).to(dtype))
    return leaves


@pytest.fixture(params=["reserved", "refused"])
def reserved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether address space for all rows is to be had; else chunks are of a few rows, and grow."""
    monkeypatch.setattr(arenas, "_CHUNK_BYTES", 40)
    if request.param == "refused":
        monkeypatch.setattr(arenas, "_reserve", lambda leaf, capacity: None)
    return bool(request.param == "reserved")


@given(rows(), st.lists(st.integers(1, 9)), st.randoms())
def test_any_rows_come_back(reserved: bool, leaves: list[Tensor], parts: list[int], random: object) -> None:
    layout, count = layout_of(leaves), len(leaves[0])
    known: list[tuple[int, list[Tensor]]] = []
    arena = RowArena(layout, CPU, 1 << 30, lambda first, chunk: known.append((first, chunk)))
    done = 0
    for n in (*parts, count):
        n = min(n, count - done)
        if n:
            assert arena.append([t[done : done + n] for t in leaves], n) == done
        done += n
    slots = torch.randint(0, count, (random.randrange(1, 80),))  # type: ignore[attr-defined]
    assert same(arena.gather(slots), [t[slots] for t in leaves])
    starts = [first for first, _ in known]
    assert starts == sorted(set(starts)) and starts[0] == 0
    if not reserved and sum(leaf.row_bytes for leaf in layout.leaves) > 40:
        assert len(known) > 1 or count == 1


@given(rows(), st.lists(st.integers(1, 9)), st.randoms())
def test_native_code_finds_the_same(reserved: bool, leaves: list[Tensor], parts: list[int], random: object) -> None:
    layout, count = layout_of(leaves), len(leaves[0])
    memory = MemoryTier("cpu", 1 << 30)
    keys = ops.keys([torch.arange(count)], (0, 0))
    done = 0
    for n in (*parts, count):
        n = min(n, count - done)
        if n:
            memory.write(keys[done : done + n].contiguous(), layout, [t[done : done + n] for t in leaves])
        done += n
    where = torch.randint(0, count, (random.randrange(1, 80),))  # type: ignore[attr-defined]
    found = memory.read_whole(keys[where])
    assert found is not None and found.layout == layout
    assert same(found.leaves, [t[where] for t in leaves])


def test_the_last_chunk_ends_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arenas, "_CHUNK_BYTES", 64)
    monkeypatch.setattr(arenas, "_reserve", lambda leaf, capacity: None)
    chunks: list[list[Tensor]] = []
    leaves = [torch.arange(100.0).reshape(100, 1)]
    arena = RowArena(layout_of(leaves), CPU, 400, lambda first, chunk: chunks.append(chunk))
    for i in range(100):
        arena.append([leaves[0][i : i + 1]], 1)
    assert sum(chunk[0].nbytes for chunk in chunks) == 400
    assert same(arena.gather(torch.arange(100)), leaves)


@pytest.mark.parametrize("after", [True, False])
def test_a_chunk_whose_registration_was_interrupted_is_registered_once_more(
    after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, leaves = MemoryTier("cpu", 1 << 20), [torch.arange(12.0).reshape(6, 2)]
    layout, keys = layout_of(leaves), ops.keys([torch.arange(6)], (0, 0))
    register = ops.table_add_chunk

    def interrupted(*args: Any) -> None:
        if after:
            register(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "table_add_chunk", interrupted)
        memory.write(keys[:2], layout, [leaves[0][:2]])
    memory.write(keys[:3], layout, [leaves[0][:3]])
    memory.write(keys[3:], layout, [leaves[0][3:].t().contiguous().t()])  # not contiguous: written by torch
    for found in (memory.read(keys), memory.read_whole(keys)):
        assert found is not None and torch.equal(found.leaves[0], leaves[0])
