"""Keys, state and rows of tensors on a GPU: the values of the CPU, in the order of the caller's stream, one wait."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from cache_harness import cache_of
from hypothesis import given, settings
from hypothesis import strategies as st
from keys_harness import CALL, DTYPES, reference_keys, strided
from torch import Tensor, nn

from torchcache import torchcache
from torchcache._native import ops
from torchcache.identity.watch import NativeWatch

pytestmark = pytest.mark.gpu

needs_native = pytest.mark.skipif(
    not ops.cuda_architectures(), reason="the installed library was built without CUDA; `make cuda` makes one with it"
)
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is only one GPU here")

GPU = torch.device("cuda")
LAST = torch.device("cuda", max(0, torch.cuda.device_count() - 1))


def on_gpu(x: Tensor, device: torch.device = GPU) -> Tensor:
    """The same values with the same strides on a GPU: also those of views and expanded tensors."""
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


# ---- keys and digests


@needs_native
@given(strided())
def test_keys_on_a_gpu_equal_those_on_the_cpu_for_any_strides(x: Tensor) -> None:
    y = on_gpu(x)
    assert y.stride() == x.stride()
    assert torch.equal(ops.keys([y], CALL), ops.keys([x], CALL))


@needs_native
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_keys_on_a_gpu_equal_those_on_the_cpu_for_any_dtype(dtype: torch.dtype, sizes: list[int]) -> None:
    x = torch.randint(0, 2, sizes).to(dtype)
    if len(x):
        assert torch.equal(ops.keys([x.to(GPU)], CALL), ops.keys([x], CALL))
    assert torch.equal(ops.digests([x.to(GPU)]), ops.digests([x]))


@needs_native
@given(st.integers(0, 70_000), st.integers(0, 15))
def test_digests_on_a_gpu_equal_those_on_the_cpu_for_any_length_at_any_address(size: int, shift: int) -> None:
    x = torch.randint(0, 256, (size + shift,), dtype=torch.uint8)
    assert torch.equal(ops.digests([x.to(GPU)[shift:]]), ops.digests([x[shift:]]))


@needs_native
@given(st.data())
def test_keys_of_several_arguments_on_a_gpu_equal_the_reference(data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 5))
    rows = [torch.randn(batch, data.draw(st.integers(0, 3000))) for _ in range(data.draw(st.integers(1, 20)))]
    assert ops.keys([t.to(GPU) for t in rows], CALL).tolist() == reference_keys(CALL, *rows)


@needs_native
@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_keys_of_arguments_in_several_places_equal_those_on_the_cpu(places: list[bool]) -> None:
    rows = [torch.randn(4, 1 + 700 * i) for i in range(len(places))]
    mixed = [t.to(GPU) if there else t for t, there in zip(rows, places)]
    assert torch.equal(ops.keys(mixed, CALL), ops.keys(rows, CALL))


@needs_native
@settings(max_examples=5)
@given(st.sampled_from([(64, 3, 224, 224), (4096, 512), (100_000, 3), (2, 50_000_000), (70_000, 16)]))
def test_keys_of_large_batches_equal_those_on_the_cpu(shape: tuple[int, ...]) -> None:
    x = torch.randint(-128, 127, shape, dtype=torch.int8)
    assert torch.equal(ops.keys([x.to(GPU)], CALL), ops.keys([x], CALL))


@needs_native
def test_channels_last_images_have_the_keys_of_contiguous_ones() -> None:
    x = torch.randn(16, 3, 65, 33, device=GPU)
    assert torch.equal(ops.keys([x], CALL), ops.keys([x.to(memory_format=torch.channels_last)], CALL))


@needs_native
def test_digests_of_tensors_in_several_places_come_in_their_order() -> None:
    tensors = [torch.randn(n) for n in (0, 1, 5000, 3, 70_000)]
    mixed = [t.to(GPU) if i % 2 else t for i, t in enumerate(tensors)]
    assert torch.equal(ops.digests(mixed), ops.digests(tensors))
    assert ops.digests(mixed).device.type == "cpu"


@needs_native
def test_a_tensor_of_a_freed_storage_is_refused() -> None:
    x = torch.ones(2, 8, device=GPU)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory behind a tensor"):
        ops.keys([x], CALL)


# ---- streams, threads, devices


def busy(stream: torch.cuda.Stream) -> None:
    """Keeps a stream at work for long enough to be overtaken."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)


@needs_native
def test_keys_are_of_what_the_current_stream_wrote_before() -> None:
    x = torch.randn(64, 5000)
    expected = ops.keys([x], CALL)
    source, target = x.to(GPU), torch.zeros(64, 5000, device=GPU)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    busy(side)
    with torch.cuda.stream(side):
        target.copy_(source)
        assert torch.equal(ops.keys([target], CALL), expected)


@needs_native
def test_keys_do_not_wait_for_other_streams() -> None:
    x = torch.randn(64, 500, device=GPU)
    ops.keys([x], CALL)
    torch.cuda.synchronize()
    other = torch.cuda.Stream()
    mine = torch.cuda.Stream()
    done = torch.cuda.Event()
    with torch.cuda.stream(other):
        torch.cuda._sleep(2_000_000_000)  # about a second
        done.record()
    with torch.cuda.stream(mine):
        ops.keys([x], CALL)
    assert not done.query(), "keys waited for a stream that is not the caller's"
    done.synchronize()


@needs_native
def test_threads_on_streams_of_their_own_get_their_own_keys() -> None:
    batches = [torch.randn(50, 3000) for _ in range(8)]
    expected = [ops.keys([x], CALL) for x in batches]
    right: list[int] = []

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            x = batches[number].to(GPU)
            if all(torch.equal(ops.keys([x], CALL), expected[number]) for _ in range(50)):
                right.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(right) == list(range(len(batches)))


@needs_native
@needs_two
def test_keys_are_made_where_the_tensor_is_whichever_device_is_current() -> None:
    x = torch.randn(8, 3000)
    for current in range(torch.cuda.device_count()):
        with torch.cuda.device(current):
            assert torch.equal(ops.keys([x.to(LAST)], CALL), ops.keys([x], CALL))
            assert torch.cuda.current_device() == current


@needs_native
@needs_two
def test_arguments_on_two_devices_have_the_keys_of_the_cpu() -> None:
    x, y = torch.randn(8, 3000), torch.randn(8, 5)
    mixed = [x.to(LAST), y.to(torch.device("cuda", 0))]
    assert torch.equal(ops.keys(mixed, CALL), ops.keys([x, y], CALL))


@needs_native
@needs_two
def test_nothing_is_left_on_the_first_device_by_work_on_the_last() -> None:
    script = """
        import torch
        from torchcache._native import ops

        last = torch.device("cuda", torch.cuda.device_count() - 1)
        x = torch.ones(8, 3000, device=last)
        ops.keys([x], (0, 0))
        print(torch.cuda.memory_allocated(0), torch._C._cuda_hasPrimaryContext(0))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]


@needs_native
def test_keys_during_the_capture_of_a_graph_are_an_error_that_says_what_to_do() -> None:
    x = torch.randn(8, 3000, device=GPU)
    expected = ops.keys([x], CALL)
    y = torch.empty_like(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y.copy_(x)
        with pytest.raises(RuntimeError, match=r"CUDA graph.*outside of torch.cuda.graph.*torchcache_enabled = False"):
            ops.keys([y], CALL)
        y.add_(1)
    graph.replay()  # the capture went on
    assert torch.equal(y, x + 1)
    assert torch.equal(ops.keys([x], CALL), expected)


def test_a_module_in_a_captured_graph_computes_in_every_replay() -> None:
    plain = nn.LayerNorm(16).requires_grad_(False).to(GPU)
    module = torchcache()(copy.deepcopy(plain))
    x = torch.randn(8, 16, device=GPU)
    module(x)  # its rows are in the cache now, and must not come back below
    plain(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for _ in range(3):
        x.copy_(torch.randn(8, 16))
        graph.replay()
        torch.testing.assert_close(y, plain(x))


# ---- state


@needs_native
@given(st.lists(strided(), min_size=1, max_size=4))
def test_state_digests_on_a_gpu_equal_those_on_the_cpu(tensors: list[Tensor]) -> None:
    assert torch.equal(ops.digests([on_gpu(t) for t in tensors]), ops.digests(tensors))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4).half()).eval().requires_grad_(False)


@needs_native
def test_a_probe_sees_whole_updates_and_is_the_same_while_nothing_changes() -> None:
    module = network().to(GPU)
    tensors = [*module.parameters(), *module.buffers()]
    watch = NativeWatch(tensors)
    seen = [watch.probe()]
    for t in tensors:
        assert watch.probe() == seen[-1]
        t.data.add_(1)
        seen.append(watch.probe())
    assert watch.probe() == seen[-1] and len(set(seen)) == len(seen)


@needs_native
def test_a_probe_follows_a_tensor_to_another_storage() -> None:
    t = torch.zeros(1000, device=GPU)
    watch = NativeWatch([t])
    first = watch.probe()
    t.data = torch.zeros(1000, device=GPU)
    torch.cuda.empty_cache()
    second = watch.probe()
    assert second != first
    t.data.add_(1)
    assert watch.probe() != second
    t.data = t.data.cpu()
    assert watch.probe() == watch.probe()
    t.untyped_storage().resize_(0)
    assert watch.probe() == watch.probe()


@needs_native
def test_a_probe_that_rides_along_with_keys_is_the_probe() -> None:
    module = network().to(GPU)
    watch = NativeWatch([*module.parameters(), torch.ones(3), *module.buffers()])
    x = torch.randn(8, 3000, device=GPU)
    table = ops.table_open()
    _, (keys, slots, missing), layout, seen = ops.table_hash_and_read(table, [x], CALL, watch.id)
    assert seen == watch.probe()
    assert torch.equal(keys, ops.keys([x.cpu()], CALL))
    assert slots.tolist() == [-1 - i for i in range(8)] and missing.tolist() == list(range(8)) and layout == -1
    next(module.parameters()).data.mul_(2)
    assert ops.table_hash_and_read(table, [x], CALL, watch.id)[3] != seen
    ops.table_close(table)


@needs_native
@needs_two
def test_a_watch_looks_at_every_device() -> None:
    tensors = [torch.zeros(100, device=torch.device("cuda", 0)), torch.zeros(100, device=LAST), torch.zeros(100)]
    watch = NativeWatch(tensors)
    seen = {watch.probe()}
    for t in tensors:
        t.data.add_(1)
        seen.add(watch.probe())
    assert len(seen) == 4


# ---- the whole


def test_a_module_on_a_gpu_finds_the_rows_of_the_cpu_and_the_other_way_round() -> None:
    module = torchcache()(network())
    x = torch.randn(8, 16)
    on_cpu = cache_of(module).keys(x)
    module.to(GPU)
    assert torch.equal(cache_of(module).keys(x.to(GPU)), on_cpu)


def test_hits_on_a_gpu_are_the_rows_that_were_computed() -> None:
    module = torchcache()(nn.Linear(16, 8).requires_grad_(False).to(GPU))
    x = torch.randn(32, 16, device=GPU)
    first = module(x)
    order = torch.randperm(32, device=GPU)
    again = module(x[order])
    assert again.device == x.device and torch.equal(again, first[order])
    info = cache_of(module).info()
    assert info.misses == 32


def test_an_update_on_the_gpu_that_no_counter_records_makes_other_keys() -> None:
    module = torchcache()(nn.Linear(16, 8).requires_grad_(False).to(GPU))
    x = torch.randn(4, 16, device=GPU)
    before = module(x)
    module.weight.data.mul_(2)
    after = module(x)
    plain = nn.functional.linear(x, module.weight, module.bias)
    assert torch.equal(after, plain) and not torch.equal(after, before)


@needs_native
def test_a_hit_waits_once_for_the_gpu() -> None:
    """Counted by torch's profiler: waits, and transfers to the host, of one take with a watch."""
    module = network().to(GPU)
    watch = NativeWatch([*module.parameters(), *module.buffers()])
    x = torch.randn(64, 3000, device=GPU)
    table = ops.table_open()
    ops.table_hash_and_read(table, [x], CALL, watch.id)
    with torch.profiler.profile() as profile:
        ops.table_hash_and_read(table, [x], CALL, watch.id)
    ops.table_close(table)
    names = [event.name for event in profile.events() or []]
    assert sum("Synchronize" in name and "Device" not in name for name in names) == 1
    assert sum("Memcpy DtoH" in name for name in names) == 1


@pytest.mark.skipif(bool(ops.cuda_architectures()), reason="the installed library was built with CUDA")
def test_a_library_without_cuda_says_once_that_rows_go_through_the_host(caplog: pytest.LogCaptureFixture) -> None:
    ops._warnings.subjects.clear()
    module = torchcache()(nn.Linear(4, 4).requires_grad_(False).to(GPU))
    x = torch.randn(4, 4, device=GPU)
    assert torch.equal(module(x), module(x))
    assert caplog.text.count("copied to the host to be hashed") == 1
