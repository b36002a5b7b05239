"""The tiers beside a GPU: rows in its memory, rows that go to the host behind the training step, and come back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops
from torchcache.tiers import arenas
from torchcache.tiers.arenas import RowArena
from torchcache.tiers.layout import Layout, Leaf
from torchcache.tiers.memory import MemoryTier

pytestmark = pytest.mark.gpu

needs_native = pytest.mark.skipif(
    not ops.cuda_architectures(), reason="the installed library was built without CUDA; `make cuda` makes one with it"
)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")

GPU = torch.device("cuda", 0)
LAST = torch.device("cuda", max(0, torch.cuda.device_count() - 1))
MEMORIES = ["cpu", "cuda"]
A_SECOND = 2_000_000_000  # cycles


class Double(nn.Module):
    def __init__(self, cycles: int = 0) -> None:
        super().__init__()
        self.rows = 0
        self.cycles = cycles

    def forward(self, x: Tensor) -> Any:
        self.rows += len(x)
        if self.cycles:
            torch.cuda._sleep(self.cycles)
        return {"double": x * 2, "sum": x.flatten(1).sum(1).half()}


def cached(directory: Path | None = None, cycles: int = 0, **options: Any) -> Double:
    if directory is not None:
        options |= {"persistent": True, "persistent_cache_dir": str(directory)}
    return torchcache(**options)(Double(cycles))


def assert_right(output: Any, x: Tensor) -> None:
    assert output["double"].device == x.device and torch.equal(output["double"], x * 2)
    assert output["sum"].dtype == torch.half and output["sum"].device == x.device


# ---- the memory tier


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_come_back_in_any_batch_from_any_memory(memory: str) -> None:
    module = cached(memory_cache_device=memory)
    x = torch.randn(100, 3, 7, device=GPU)
    for rows in (slice(0, 60), slice(30, 100), slice(None, None, 3), slice(0, 100)):
        assert_right(module(x[rows]), x[rows])
    assert module.rows == 100


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_of_a_gpu_are_found_by_calls_on_the_cpu_and_the_other_way_round(memory: str) -> None:
    module = cached(memory_cache_device=memory)
    x = torch.randn(10, 5)
    assert_right(module(x[:5].to(GPU)), x[:5].to(GPU))
    assert_right(module(x), x)
    assert_right(module(x.to(GPU)), x.to(GPU))
    assert module.rows == 10


@needs_native
@given(st.data())
def test_rows_of_any_size_are_gathered_on_the_gpu_from_any_chunks(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.uint8, torch.half, torch.float32, torch.int64, torch.complex128]))
    width, count = data.draw(st.integers(0, 3000)), data.draw(st.integers(1, 60))
    rows = torch.randint(0, 100, (count, width)).to(dtype)
    layout = Layout("*", (Leaf(dtype, dtype, (width,), None),))
    keys = ops.keys([torch.arange(count)], (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arenas, "_CHUNK_BYTES", data.draw(st.sampled_from([1, 5000, 64 << 20])))
        memory = MemoryTier("cuda", 1 << 30)
        for start in range(0, count, 7):
            memory.write(keys[start : start + 7], layout, [rows[start : start + 7].to(GPU)])
    where = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=100)))
    found = memory.read_whole(keys[where])
    assert found is not None and found.leaves[0].is_cuda and torch.equal(found.leaves[0].cpu(), rows[where])


@given(st.lists(st.integers(0, 49), min_size=1, max_size=100))
def test_rows_are_gathered_from_chunks_by_torch_too(slots: list[int]) -> None:
    rows = torch.randn(50, 9, device=GPU)
    layout = Layout("*", (Leaf(rows.dtype, rows.dtype, (9,), None),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arenas, "_CHUNK_BYTES", 100)
        arena = RowArena(layout, GPU, 1 << 20, None)
        for start in range(0, 50, 7):
            arena.append([rows[start : start + 7]], len(rows[start : start + 7]))
    assert torch.equal(arena.gather(torch.tensor(slots))[0], rows[slots])


def test_an_arena_on_the_gpu_stays_within_the_limit() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module = cached(memory_cache_device="cuda", max_memory_cache_size=1 << 20)
    for i in range(40):
        x = torch.randn(64, 256, device=GPU) + i
        assert_right(module(x), x)
    del x
    assert cache_of(module).is_memory_cache_full
    assert torch.cuda.memory_allocated() - before <= (1 << 20) + (64 << 10)


def test_a_gpu_without_memory_is_one_warning_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    module = cached(memory_cache_device="cuda", max_memory_cache_size=1e15)
    x = torch.randn(8, 1000, device=GPU)
    module(x)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + (96 << 20)) / total)
        for i in range(100):
            y = torch.randn(1000, 1000, device=GPU) + i
            assert_right(module(y), y)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert_right(module(x), x)
    assert cache_of(module).is_memory_cache_full
    assert [r.levelno for r in caplog.records if "memory" in r.getMessage()].count(logging.WARNING) <= 2


def test_rows_that_one_stream_writes_are_found_by_another() -> None:
    module = cached(memory_cache_device="cuda", cycles=A_SECOND // 10)
    x = torch.randn(64, 100, device=GPU)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        module(x)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = module(x)
        right = torch.equal(found["double"], x * 2)
    assert right and module.rows == 64


def test_rows_that_are_still_read_may_be_cleared() -> None:
    module = cached(memory_cache_device="cuda")
    x = torch.randn(64, 100, device=GPU)
    module(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(A_SECOND // 10)
        found = module(x)["double"]
    cache_of(module).clear()
    for _ in range(10):
        torch.full((64, 100), 7.0, device=GPU)
    torch.cuda.synchronize()
    assert torch.equal(found, x * 2)


@needs_two
def test_rows_are_kept_on_the_gpu_of_the_input_not_on_the_first() -> None:
    module = cached(memory_cache_device="cuda")
    x = torch.randn(8, 100, device=LAST)
    before = torch.cuda.memory_allocated(0)
    for _ in range(2):
        assert_right(module(x), x)
    assert torch.cuda.memory_allocated(0) == before
    assert_right(module(x.to(GPU)), x.to(GPU))
    assert module.rows == 8


@needs_native
def test_a_captured_graph_computes_the_rows_of_every_replay(caplog: pytest.LogCaptureFixture) -> None:
    module = cached(memory_cache_device="cuda")
    x = torch.randn(8, 100, device=GPU)
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = module(x)
    for _ in range(2):
        x.add_(1)
        graph.replay()
        assert_right(output, x)
    assert caplog.text.count("CUDA graph") == 1


# ---- to the host and back


@pytest.mark.parametrize("memory", MEMORIES)
def test_rows_get_to_disk_and_back(memory: str, tmp_path: Path) -> None:
    x = torch.randn(50, 33, device=GPU)
    first = cached(tmp_path, memory_cache_device=memory)
    assert_right(first(x), x)
    cache_of(first).flush()
    second = cached(tmp_path, memory_cache_device=memory)
    assert_right(second(x[10:]), x[10:])
    assert_right(second(torch.cat([x, x + 1])), torch.cat([x, x + 1]))
    assert second.rows == 50


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_miss_does_not_wait_for_the_forward(memory: str, tmp_path: Path) -> None:
    module = cached(tmp_path, memory_cache_device=memory)
    x = torch.randn(50, 33, device=GPU)
    module(x)  # what is made once: libraries loaded, memory pinned, streams
    cache_of(module).flush()
    module.cycles = A_SECOND
    done = torch.cuda.Event()
    found = module(x + 1)
    done.record()
    assert not done.query(), "the call waited for its forward"
    assert_right(found, x + 1)
    assert_right(module(x + 1), x + 1)
    assert module.rows == 100


@pytest.mark.parametrize("memory", MEMORIES)
def test_edits_of_an_output_never_reach_rows_on_their_way(memory: str, tmp_path: Path) -> None:
    module = cached(tmp_path, memory_cache_device=memory)
    x = torch.randn(5000, 333, device=GPU)
    module(x)["double"].zero_()
    assert_right(module(x), x)
    cache_of(module).flush()
    again = cached(tmp_path, memory_cache_device=memory)
    assert_right(again(x), x)
    assert again.rows == 0


@needs_native
def test_hits_in_the_memory_of_the_host_come_back_through_pinned_memory() -> None:
    module = cached()
    x = torch.randn(50, 33, device=GPU)
    module(x), module(x)
    with torch.profiler.profile() as profile:
        module(x)
    names = [event.name for event in profile.events() or []]
    assert sum("Memcpy HtoD (Pinned" in name for name in names) == 2  # one for each leaf
    assert not [name for name in names if "Memcpy HtoD (Pageable" in name]
