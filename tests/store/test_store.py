"""The store keeps its promises: what is put is found, within its limits, by any process, beside others."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_harness import store_program
from store_harness import (
    BYTES_WRITTEN,
    DAMAGED,
    FULL,
    LAYOUT,
    QUEUED,
    ROWS,
    Store,
    batch,
    files,
    forked,
    reopened,
    succeeded,
)

from torchcache._native import ops

RUNS = int(os.environ.get("TORCHCACHE_RUNS", "1"))  # of eight processes; 100 for the slow part


@pytest.fixture(params=[False, True], ids=["raw", "zstd"])
def zstd(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["pread", "mmap"])
def mmap(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# ---- what it is for


def test_rows_are_found_in_the_queue_in_the_files_and_by_the_next_process(
    tmp_path: Path, zstd: bool, mmap: bool
) -> None:
    keys, rows = batch(300, 1, 100)
    store = Store(tmp_path, zstd=zstd, mmap=mmap)
    assert store.put(keys, rows) == 300 and store.right(keys, rows) == 300
    store.flush()
    assert store.stats()[QUEUED] == 0 and store.right(keys, rows) == 300
    store.close()
    assert reopened(tmp_path, keys, rows, mmap=mmap) == 300


def test_rows_of_another_layout_are_absent(tmp_path: Path) -> None:
    keys, rows = batch(10, 1)
    store = Store(tmp_path)
    store.put(keys[:4], rows[:4])
    assert ops.store_write(store.id, keys[4:], "other", [rows[4:]])[0] == 6
    present, layout = ops.store_lookup(store.id, keys)
    assert layout == LAYOUT and present.tolist() == [True] * 4 + [False] * 6
    present, layout = ops.store_lookup(store.id, keys.flip(0))
    assert layout == "other" and int(present.sum()) == 6
    store.close()


def test_keys_that_are_stored_are_not_written_again(tmp_path: Path) -> None:
    keys, rows = batch(100, 1)
    store = Store(tmp_path)
    assert store.put(keys, rows) == 100
    store.flush()
    written = store.stats()[BYTES_WRITTEN]
    assert store.put(keys, rows) == 100
    assert store.stats()[BYTES_WRITTEN] == written and store.stats()[ROWS] == 100
    store.close()


def test_an_empty_batch_and_empty_rows_are_fine(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.put(*batch(0, 1)) == 0 and store.found(batch(0, 1)[0]) == 0
    assert not files(tmp_path, "seg")
    keys, rows = batch(3, 1, 0)
    assert store.put(keys, rows) == 3
    store.flush()
    assert store.right(keys, rows) == 3
    store.close()


@given(n=st.integers(1, 60), width=st.integers(1, 300), limit=st.integers(0, 40_000))
def test_the_limit_keeps_the_first_rows_and_is_never_passed(
    tmp_path_factory: pytest.TempPathFactory, n: int, width: int, limit: int
) -> None:
    directory = tmp_path_factory.mktemp("store")
    store = Store(directory, limit)
    keys, rows = batch(n, 1, width)
    kept = store.put(keys, rows)
    assert store.found(keys[:kept]) == kept and store.found(keys[kept:]) == 0
    assert bool(store.stats()[FULL]) == (kept < n)
    assert kept == n or rows[: kept + 1].nbytes + 1000 + 100 * kept > limit
    store.close()
    size = sum(path.stat().st_size for path in directory.iterdir())
    assert size <= limit and reopened(directory, keys, rows) == kept


def test_bad_options_say_what_they_may_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"zstd_level must be between .* and 22, got 23"):
        ops.store_open(str(tmp_path), 1, True, 23, 1, False, 1)
    with pytest.raises(ValueError, match=r"zstd_threads must be between 1 and .*, got 0"):
        ops.store_open(str(tmp_path), 1, True, 3, 0, False, 1)
    with pytest.raises(ValueError, match="directory must"):
        ops.store_open("", 1, False, 3, 1, False, 1)


# ---- processes


@pytest.mark.parametrize("repetition", range(RUNS))
def test_eight_processes_write_and_read_one_directory(tmp_path: Path, repetition: int) -> None:
    def work(number: int) -> None:
        store = Store(tmp_path)
        for seed in range(20):
            for keys, rows in (batch(20, 1000 * number + seed), batch(20, seed)):
                store.put(keys, rows)
                assert store.right(keys, rows) == 20
            store.right(*batch(20, (number + 1) % 8 * 1000 + seed))
        store.flush()
        for seed in [1000 * other + seed for other in range(1, 9) for seed in range(20)]:
            keys, rows = batch(20, seed)
            while store.found(keys) < 20:
                os.sched_yield()  # others are still writing; the directory is looked at every quarter of a second
            assert store.right(keys, rows) == 20
        assert store.warnings() == [] and store.stats()[DAMAGED] == 0
        store.close()

    pids = [forked(functools.partial(work, number)) for number in range(1, 9)]
    assert [succeeded(pid) for pid in pids] == [True] * 8
    store = Store(tmp_path)
    for seed in [1000 * n + s for n in range(9) for s in range(20)]:
        assert store.right(*batch(20, seed)) == 20
    store.close()


def test_rows_that_another_process_flushed_are_found_while_it_lives(tmp_path: Path) -> None:
    store = Store(tmp_path)
    reading, writing = os.pipe()
    waiting, leaving = os.pipe()

    def put_twice() -> None:
        theirs = Store(tmp_path)
        for seed in (1, 2):
            theirs.put(*batch(9, seed))
            theirs.flush()
        os.write(writing, b".")
        os.read(waiting, 1)

    pid = forked(put_twice)
    os.read(reading, 1)
    while store.found(batch(9, 1)[0]) + store.found(batch(9, 2)[0]) < 18:
        os.sched_yield()  # a look at the directory comes at most every quarter of a second
    assert store.right(*batch(9, 1)) == store.right(*batch(9, 2)) == 9
    os.write(leaving, b".")
    assert succeeded(pid)
    store.close()


def test_a_fork_with_a_live_store_leaves_both_sides_right(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(*batch(500, 1))

    def work() -> None:
        assert store.put(*batch(50, 2)) == 50 and store.right(*batch(50, 2)) == 50
        store.close()

    pid = forked(work)
    store.put(*batch(50, 3))
    assert succeeded(pid)
    store.close()
    for n, seed in ((500, 1), (50, 2), (50, 3)):
        assert reopened(tmp_path, *batch(n, seed)) == n


# ---- ending


def test_a_closed_store_is_empty_and_its_directory_stays_usable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(*batch(5, 1))
    store.close()
    store.close()
    with pytest.raises(ValueError, match="no open store"):
        store.found(batch(5, 1)[0])


# ---- what only native code can make happen


@pytest.mark.slow
def test_the_native_tests_pass(tmp_path: Path) -> None:
    """Failing, short and hanging system calls, crowded keys, forks beside threads."""
    program = store_program("store_test.cpp", tmp_path)
    subprocess.run([program, tmp_path], check=True)
