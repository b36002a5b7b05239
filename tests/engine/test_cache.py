"""Outputs with the cache are the outputs without it, each distinct row is computed once, nothing is aliased."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcache import torchcache


class Counting(nn.Module):
    """Remembers which rows were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows += x[:, 0].tolist()
        return x * 2 + 1


def numbered(rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).unsqueeze(1) * torch.ones(3)


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), max_size=8))
def test_outputs_are_right_and_each_distinct_row_is_computed_once(batches: list[list[int]]) -> None:
    module = torchcache()(Counting())
    for batch in batches:
        x = numbered(batch)
        assert torch.equal(module(x), x * 2 + 1)
    assert sorted(module.rows) == sorted({float(i) for batch in batches for i in batch})


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), max_size=8), st.integers(0, 200))
def test_outputs_are_right_whatever_fits_in_memory(batches: list[list[int]], limit: int) -> None:
    module = torchcache(max_memory_cache_size=limit)(Counting())
    for batch in batches:
        x = numbered(batch)
        assert torch.equal(module(x), x * 2 + 1)
    assert cache_of(module).memory_cache_size <= limit


@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=20), max_size=8),
    st.integers(0, 100),
    st.booleans(),
)
def test_outputs_are_right_from_disk_memory_and_forward_together(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[int]], limit: int, zstd: bool
) -> None:
    decorate = torchcache(
        persistent=True,
        persistent_cache_dir=tmp_path_factory.mktemp("rows"),
        max_memory_cache_size=limit,
        zstd_compression=zstd,
    )
    computed: list[float] = []
    for batch in batches:
        module = decorate(Counting())  # a new cache on the same rows
        x = numbered(batch)
        assert torch.equal(module(x), x * 2 + 1)
        computed += module.rows
    assert sorted(computed) == sorted({float(i) for batch in batches for i in batch})


def test_info_counts_rows_by_where_they_came_from() -> None:
    module = torchcache()(Counting())
    module(numbered([1, 2, 2, 3]))
    module(numbered([3, 4]))
    info = cache_of(module).info()
    assert (info.memory_hits, info.disk_hits, info.misses) == (2, 0, 4)
    assert (info.memory_rows, info.memory_bytes) == (4, 4 * 3 * 4)


# ---- the read-only view


def test_the_cache_maps_hashes_to_copies_of_rows_in_memory() -> None:
    module = torchcache()(Counting())
    x = numbered([1, 2, 3])
    assert len(cache_of(module).cache) == 0
    module(x)
    rows = cache_of(module).cache
    hashes = cache_of(module).hash_tensor(x)
    assert hashes.dtype == torch.int64 and hashes.shape == (3,)
    assert set(rows) == set(hashes.tolist()) and len(rows) == 3
    for h, row in zip(hashes, x):
        assert torch.equal(rows[h.item()], row[None] * 2 + 1)
        rows[h.item()].zero_()
        assert torch.equal(rows[h.item()], row[None] * 2 + 1)
    assert 5 not in rows and "x" not in rows  # type: ignore[comparison-overlap]
    with pytest.raises(KeyError):
        rows[5]
    with pytest.raises(TypeError):
        rows[5] = x  # type: ignore[index]


def test_clear_forgets_the_rows_in_memory() -> None:
    module = torchcache()(Counting())
    x = numbered([1, 2])
    module(x)
    cache_of(module).clear()
    assert len(cache_of(module).cache) == 0 == cache_of(module).memory_cache_size
    assert torch.equal(module(x), x * 2 + 1)
    assert module.rows == [1, 2, 1, 2]


# ---- limits


def test_of_a_batch_that_does_not_fit_whole_what_fits_is_kept() -> None:
    module = torchcache(max_memory_cache_size=3 * 12)(Counting())
    module(numbered([1, 2]))
    assert not cache_of(module).is_memory_cache_full
    module(numbered([3, 4, 5]))
    assert cache_of(module).is_memory_cache_full
    assert cache_of(module).memory_cache_size == 36
    kept = cache_of(module).hash_tensor(numbered([1, 2, 3])).tolist()
    assert set(cache_of(module).cache) == set(kept)  # the oldest stay


def test_sizes_may_be_floats() -> None:
    module = torchcache(max_memory_cache_size=5e9, max_persistent_cache_size=5e9)(Counting())
    assert cache_of(module).options.max_memory_cache_size == 5_000_000_000


# ---- threads


def test_rows_may_be_removed_from_disk_while_other_threads_call(caplog: pytest.LogCaptureFixture) -> None:
    cached = torchcache(persistent=True, max_memory_cache_size=0)(lambda x: x * 2)
    wrong: list[object] = []

    def work(seed: int) -> None:
        try:
            for i in range(60):
                x = torch.tensor([[float(seed * 1000 + i % 7)]])
                if not torch.equal(cached(x), x * 2):
                    wrong.append(x)
                if seed == 0 and i % 10 == 0:
                    cache_of(cached).clear(persistent=True)
        except Exception as error:
            wrong.append(error)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a thread raised
    assert not wrong


def test_clearing_while_others_look_up_gives_no_wrong_row() -> None:
    def function(x: Tensor) -> Tensor:  # layouts differ, so that their numbers can be mixed up
        return x[:, :1].expand(-1, int(x[0, 1]))

    cached = torchcache()(function)
    wrong: list[Tensor] = []

    def work(width: int) -> None:
        x = torch.tensor([[float(i), float(width)] for i in range(4)])
        for _ in range(300):
            out = cached(x)
            if not torch.equal(out, function(x)):
                wrong.append(out)
            cache_of(cached).clear()

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(1, 7)))  # raises what a thread raised
    assert not wrong


def test_eight_threads_on_one_module_compute_right_rows() -> None:
    module = torchcache()(Counting())
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            x = numbered(torch.randint(0, 40, (8,), generator=generator).tolist())
            if not torch.equal(module(x), x * 2 + 1):
                wrong.append(seed)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))  # raises what a thread raised
    assert not wrong
    assert len(cache_of(module).cache) == len(set(module.rows))
