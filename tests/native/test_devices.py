"""Each device of a call is asked once and waited for once, whatever is wanted: shown on devices that are not there.

tests/native/devices.cpp makes CPU tensors pass for tensors on devices; who asks them is the library's own code.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from keys_harness import CALL
from native_harness import CSRC, NATIVE, compiler
from torch import Tensor

from torchcache._native import build, ops


@functools.cache
def operations() -> Any:
    found = build.installed_torch()
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/devices.so"
        # Bound to itself: it stands in for some of torch's functions.
        flags = ["-O0", "-shared", "-fPIC", "-pthread", "-Wl,-Bsymbolic", f"-I{CSRC}"]
        flags += [flag for flag in build.COMPILE_FLAGS if not flag.startswith("-O")]
        flags += ["-isystem", str(found.folder / "include"), f"-L{found.folder / 'lib'}"]
        sources = [NATIVE / "devices.cpp", CSRC / "core" / "fork.cpp", *sorted((CSRC / "hash").glob("*.cpp"))]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
        subprocess.run([*compiler(), *flags, *map(str, sources), *libraries, "-o", built], check=True)
        torch.ops.load_library(built)
    return torch.ops.torchcache_devices


kept: list[Tensor] = []  # an address says on which device a tensor is: none may be used again within a test


@pytest.fixture(autouse=True)
def no_tensor_is_anywhere() -> Iterator[None]:
    operations().forget()
    yield
    operations().forget()
    kept.clear()


def drained_log() -> list[str]:
    return list(operations().drain_log())


def on(device: int, t: Tensor) -> Tensor:
    """A copy on a device; -1 is the CPU."""
    copy = t.double().contiguous().clone()
    kept.append(copy.detach())
    if device >= 0:
        operations().place(copy, device)
    return copy


def hash_batch(rows: list[Tensor], watch: int = 0) -> tuple[Tensor, int]:
    keys, probe = operations().hash_batch(rows, *CALL, watch)
    return keys, probe


DEVICES = st.integers(-1, 2)


@given(st.lists(st.tuples(DEVICES, st.integers(0, 1500)), min_size=1, max_size=6), st.integers(1, 5))
def test_keys_are_those_of_the_cpu_wherever_the_arguments_are(places: list[tuple[int, int]], batch: int) -> None:
    rows = [torch.randn(batch, size).double() for _, size in places]
    there = [on(device, t) if t.numel() else t for (device, _), t in zip(places, rows)]
    drained_log()
    assert torch.equal(hash_batch(there)[0], ops.keys(rows, CALL))
    devices = sorted({device for (device, size) in places if size and device >= 0})
    assert drained_log() == [f"{what} {device}" for what in ("enqueue", "wait") for device in devices]


@given(st.lists(st.tuples(DEVICES, st.integers(1, 1500)), max_size=8))
def test_digests_are_those_of_the_cpu_in_the_order_of_the_tensors(places: list[tuple[int, int]]) -> None:
    tensors = [torch.randn(size).double() for _, size in places]
    there = [on(device, t) for (device, _), t in zip(places, tensors)]
    drained_log()
    assert torch.equal(operations().digests(there), ops.digests(tensors))
    devices = sorted({device for device, _ in places if device >= 0})
    assert drained_log() == [f"{what} {device}" for what in ("enqueue", "wait") for device in devices]


def test_a_probe_rides_along_with_keys_and_nothing_is_listed_again_while_nothing_moves() -> None:
    state = [on(0, torch.ones(100)), on(0, torch.zeros(3, 5)), torch.ones(7)]
    watch = operations().watch_open(state)
    rows = [on(0, torch.randn(4, 600))]
    keys, first = hash_batch(rows, watch)
    assert drained_log() == ["upload 0", "enqueue 0", "wait 0"]
    assert torch.equal(keys, ops.keys(rows, CALL))
    assert hash_batch(rows, watch)[1] == first == operations().probe(watch)
    assert drained_log() == ["enqueue 0", "wait 0"] * 2


def test_a_probe_sees_updates_on_every_device() -> None:
    state = [on(0, torch.ones(100)), on(1, torch.ones(100)), torch.ones(100), on(1, torch.ones(1))]
    watch = operations().watch_open(state)
    seen = [operations().probe(watch)]
    for t in state:
        t.data.mul_(2)
        seen.append(operations().probe(watch))
        assert operations().probe(watch) == seen[-1]
    assert len(set(seen)) == 5
    assert hash_batch([torch.ones(2, 2)], watch)[1] == seen[-1]


def test_devices_of_state_and_rows_are_each_waited_for_once() -> None:
    watch = operations().watch_open([on(2, torch.ones(10)), on(1, torch.ones(10))])
    rows = [on(0, torch.randn(4, 3)), on(2, torch.randn(4, 3)), torch.randn(4, 3)]
    operations().probe(watch)
    drained_log()
    assert torch.equal(hash_batch(rows, watch)[0], ops.keys(rows, CALL))
    assert drained_log() == ["enqueue 0", "enqueue 1", "enqueue 2", "wait 0", "wait 1", "wait 2"]


def test_words_are_listed_anew_where_a_tensor_has_moved_and_never_read_where_it_was() -> None:
    t = on(0, torch.ones(100))
    watch = operations().watch_open([t])
    first = operations().probe(watch)
    t.data = on(1, torch.ones(100))  # words of device 0 would be an error now
    drained_log()
    second = operations().probe(watch)
    assert second != first and drained_log() == ["upload 1", "enqueue 1", "wait 1"]
    t.data = torch.ones(100)
    third = operations().probe(watch)
    assert third not in (first, second) and drained_log() == []
    t.untyped_storage().resize_(0)
    assert operations().probe(watch) == operations().probe(watch)


def test_a_device_that_refuses_is_an_error_and_no_keys() -> None:
    operations().capture(True)
    with pytest.raises(RuntimeError, match="capturing"):
        hash_batch([on(0, torch.randn(4, 3))])
    with pytest.raises(RuntimeError, match="capturing"):
        operations().digests([on(0, torch.randn(4, 3))])
    assert hash_batch([torch.ones(2, 2)])[0].shape == (2, 2)  # the CPU is asked nothing


def test_without_bytes_behind_it_a_tensor_on_a_device_is_refused() -> None:
    t = on(0, torch.ones(4, 3))
    t.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no memory behind a tensor"):
        operations().digests([t])
