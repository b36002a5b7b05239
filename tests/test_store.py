"""The store keeps its promises through damage, kills, hostile files and many processes."""

from __future__ import annotations

import functools
import itertools
import os
import resource
import shutil
import signal
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from torchcache import _ops

ROOT = Path(__file__).resolve().parent.parent
LAYOUT = "layout"
NAME = "0123456789abcdef" * 2  # of a segment
ROWS, BYTES_WRITTEN, QUEUED, _, DAMAGED, DROPPED, FULL = range(7)  # of the statistics


class Store:
    """A store of float32 rows; closed by its test, or by nobody."""

    def __init__(self, directory: Path, limit: int = 10**12, zstd: bool = False, mmap: bool = False) -> None:
        self.id = _ops.store_open(str(directory), limit, zstd, 3, 1, mmap, 64 << 20)

    def put(self, keys: Tensor, rows: Tensor) -> int:
        return _ops.store_put(self.id, keys, LAYOUT, [rows])

    def found(self, keys: Tensor) -> int:
        return int(_ops.store_find(self.id, keys)[0].sum())

    def right(self, keys: Tensor, rows: Tensor) -> int:
        """How many rows are read; those must be right."""
        out = torch.empty_like(rows)
        good = _ops.store_read(self.id, keys, LAYOUT, [out])
        assert torch.equal(out[good], rows[good])
        return int(good.sum())

    def stats(self) -> list[int]:
        return _ops.store_stats(self.id)

    def flush(self) -> None:
        _ops.store_flush(self.id)

    def warnings(self) -> list[str]:
        return _ops.store_warnings(self.id)

    def close(self) -> None:
        _ops.store_close(self.id)


def batch(n: int, seed: int, width: int = 4) -> tuple[Tensor, Tensor]:
    """Keys and rows, the same for the same seed in every process."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randint(-(2**63), 2**63 - 1, (n, 2), generator=generator)
    return keys, torch.randn(n, width, generator=generator)


def write(directory: Path, *batches: tuple[Tensor, Tensor], zstd: bool = False) -> None:
    """A segment with a block for each batch."""
    store = Store(directory, zstd=zstd)
    for keys, rows in batches:
        store.put(keys, rows)
        store.flush()
    store.close()


def files(directory: Path, suffix: str) -> list[Path]:
    return sorted(directory.glob(f"*.{suffix}"))


def reopened(directory: Path, keys: Tensor, rows: Tensor, **options: bool) -> int:
    """How many rows a process that starts now would read."""
    store = Store(directory, **options)
    try:
        found = store.found(keys)
        right = store.right(keys, rows)
        assert right <= found
        return right
    finally:
        store.close()


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
    assert _ops.store_put(store.id, keys[4:], "other", [rows[4:]]) == 6
    present, layout = _ops.store_find(store.id, keys)
    assert layout == LAYOUT and present.tolist() == [True] * 4 + [False] * 6
    present, layout = _ops.store_find(store.id, keys.flip(0))
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
        _ops.store_open(str(tmp_path), 1, True, 23, 1, False, 1)
    with pytest.raises(ValueError, match=r"zstd_threads must be between 1 and .*, got 0"):
        _ops.store_open(str(tmp_path), 1, True, 3, 0, False, 1)
    with pytest.raises(ValueError, match="directory must"):
        _ops.store_open("", 1, False, 3, 1, False, 1)


# ---- damage


def test_a_segment_cut_at_any_byte_is_misses(tmp_path: Path, zstd: bool) -> None:
    keys, rows = batch(6, 1)
    write(tmp_path, (keys[:3], rows[:3]), (keys[3:], rows[3:]), zstd=zstd)
    (index,), (segment,) = files(tmp_path, "idx"), files(tmp_path, "seg")
    whole = segment.read_bytes()
    for with_index in (True, False):
        for size in reversed(range(len(whole))):
            os.truncate(segment, size)
            assert reopened(tmp_path, keys, rows) < 6 or size > len(whole) - 64
        segment.write_bytes(whole)
        assert reopened(tmp_path, keys, rows) == 6
        if with_index:
            index.unlink()


def test_any_flipped_bit_costs_only_the_rows_of_its_block(tmp_path: Path, zstd: bool) -> None:
    keys, rows = batch(6, 1)
    write(tmp_path, (keys[:2], rows[:2]), (keys[2:], rows[2:]), zstd=zstd)
    (index,), (segment,) = files(tmp_path, "idx"), files(tmp_path, "seg")
    index.unlink()
    data = bytearray(segment.read_bytes())
    for at in range(len(data)):
        for bit in range(8):
            data[at] ^= 1 << bit
            segment.write_bytes(data)
            assert reopened(tmp_path, keys, rows) >= 2
            data[at] ^= 1 << bit


def test_any_flipped_bit_under_an_index_costs_one_row(tmp_path: Path) -> None:
    keys, rows = batch(4, 1)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    for at in range(len(data)):
        data[at] ^= 1 << at % 8
        segment.write_bytes(data)
        assert reopened(tmp_path, keys, rows) >= 3
        data[at] ^= 1 << at % 8


@given(damage=st.lists(st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=40))))
def test_no_damage_gives_a_wrong_row(tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, bytes]]) -> None:
    directory = tmp_path_factory.mktemp("store")
    keys, rows = batch(20, 1)
    write(directory, (keys[:9], rows[:9]), (keys[9:], rows[9:]), zstd=len(damage) % 2 == 1)
    for path in files(directory, "seg") + files(directory, "idx"):
        data = bytearray(path.read_bytes())
        for at, new in damage:
            at %= len(data)
            data[at : at + len(new)] = new
        path.write_bytes(data)
    reopened(directory, keys, rows)


def test_a_damaged_row_is_counted_and_may_be_put_again(tmp_path: Path) -> None:
    keys, rows = batch(10, 1)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    data = bytearray(segment.read_bytes())
    data[data.index(rows[4].numpy().tobytes())] ^= 1
    segment.write_bytes(data)
    store = Store(tmp_path)
    assert store.found(keys) == 10 and store.right(keys, rows) == 9
    assert store.stats()[DAMAGED] == 1 and store.found(keys) == 9
    (warning,) = store.warnings()
    assert str(segment) in warning
    store.put(keys, rows)
    assert store.right(keys, rows) == 10
    store.close()
    assert reopened(tmp_path, keys, rows) == 10  # the second copy counts where the first fails


def test_no_index_a_damaged_index_and_a_wrong_index_only_cost_a_scan(tmp_path: Path) -> None:
    keys, rows = batch(400, 1)
    write(tmp_path, (keys, rows))
    (index,) = files(tmp_path, "idx")
    data = bytearray(index.read_bytes())
    for at in range(0, len(data), 7):
        data[at] ^= 1 << at % 8
        index.write_bytes(data)
        assert reopened(tmp_path, keys, rows) == 400
        data[at] ^= 1 << at % 8
    for wrong in (b"", data[:-1], data + b"\0", bytes(len(data)), os.urandom(5000)):
        index.write_bytes(wrong)
        assert reopened(tmp_path, keys, rows) == 400
    other = tmp_path / "other"
    write(other, batch(400, 2))
    shutil.copy(files(other, "idx")[0], index)
    assert reopened(tmp_path, keys, rows) == 400
    index.unlink()
    assert reopened(tmp_path, keys, rows) == 400


def test_rows_behind_what_an_index_covers_are_found(tmp_path: Path) -> None:
    early, late = batch(5, 1), batch(5, 2)
    write(tmp_path, early, late)
    (segment,), (index,) = files(tmp_path, "seg"), files(tmp_path, "idx")
    whole = segment.read_bytes()
    short = tmp_path / "short"
    short.mkdir()
    start_of_second = whole.rindex(b"\x89TCB")
    (short / segment.name).write_bytes(whole[:start_of_second])
    shutil.copy(index, short)
    assert reopened(short, *early) == 5  # the index covers more than there is: scanned
    (short / segment.name).write_bytes(whole)
    assert reopened(short, *late) == 5


def test_segments_in_each_others_place_are_misses(tmp_path: Path) -> None:
    first, second = batch(5, 1), batch(5, 2)
    write(tmp_path, first)
    write(tmp_path, second)
    a, b = files(tmp_path, "seg")
    a.rename(tmp_path / "c")
    b.rename(a)
    (tmp_path / "c").rename(b)
    assert reopened(tmp_path, *first) == 0 and reopened(tmp_path, *second) == 0


def test_a_segment_that_is_cut_or_replaced_while_open_is_misses(tmp_path: Path, mmap: bool) -> None:
    keys, rows = batch(2000, 1, 100)
    write(tmp_path, (keys, rows))
    (segment,) = files(tmp_path, "seg")
    store = Store(tmp_path, mmap=mmap)
    assert store.right(keys[:1000], rows[:1000]) == 1000
    os.truncate(segment, segment.stat().st_size // 2)
    assert 0 < store.right(keys, rows) < 2000
    segment.write_bytes(os.urandom(900_000))
    assert store.right(keys, rows) == 0
    segment.unlink()
    assert store.right(keys, rows) == 0
    store.close()


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    def name(number: int, suffix: str = "seg") -> Path:
        return tmp_path / f"{number:032x}.{suffix}"

    os.mkfifo(name(1))
    name(2).symlink_to("/dev/zero")
    name(3).mkdir()
    name(4).write_bytes(os.urandom(100_000))
    name(5).symlink_to(name(4))
    with name(6).open("wb") as sparse:
        sparse.truncate(1 << 40)
    name(6, "idx").symlink_to("/dev/zero")
    name(7).write_bytes(b"")
    name(7, "idx").write_bytes(os.urandom(5000))
    os.mkfifo(name(8, "idx"))
    name(8).write_bytes(b"\x89TCB" * 1000)
    (tmp_path / f"{'A' * 32}.seg").write_bytes(b"upper case")
    (tmp_path / "new\nline.seg").write_bytes(b"")
    (tmp_path / f"{9:032x}.seg.tmp").write_bytes(b"")
    yield tmp_path


def test_a_hostile_directory_is_ignored_with_warnings_that_name_it(hostile: Path) -> None:
    keys, rows = batch(10, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store = Store(hostile)
    assert store.found(keys) == 0
    store.put(keys, rows)
    store.flush()
    assert store.right(keys, rows) == 10
    warnings = store.warnings()
    assert warnings and all(str(hostile) in warning for warning in warnings)
    assert len(warnings) == len(set(warnings)) <= 10
    store.close()
    assert reopened(hostile, keys, rows) == 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024


def test_a_frame_that_expands_to_more_than_its_row_is_a_miss(tmp_path: Path) -> None:
    keys, rows = batch(1, 1, 1000)
    write(tmp_path, (keys, torch.zeros_like(rows)), zstd=True)
    store = Store(tmp_path)
    out = torch.full((1, 10), 7.0)
    assert not _ops.store_read(store.id, keys, LAYOUT, [out]).any()
    assert (out == 7).all()
    store.close()


# ---- processes


def forked(run: Callable[[], None]) -> int:
    """The id of a child that does this and ends, with status 0 if nothing was raised."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.set_num_threads(1)  # a forked child has torch's pool, but not its threads
        run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def succeeded(pid: int) -> bool:
    return os.waitpid(pid, 0)[1] == 0


def test_flushed_rows_survive_kill_9_while_more_are_written(tmp_path: Path) -> None:
    for number in range(20):
        directory = tmp_path / str(number)
        reading, writing = os.pipe()

        def put_for_ever(directory: Path = directory, writing: int = writing) -> None:
            store = Store(directory)
            for seed in itertools.count():
                store.put(*batch(64, seed, 200))
                if seed % 3 == 0:
                    store.flush()
                    os.write(writing, b"%10d" % seed)

        pid = forked(put_for_ever)
        for _ in range(1 + 3 * number):
            flushed = int(os.read(reading, 10))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        store = Store(directory)
        for seed in range(flushed + 1):
            assert store.right(*batch(64, seed, 200)) == 64
        assert store.warnings() == [] and store.stats()[DAMAGED] == 0
        store.close()


def test_eight_processes_write_and_read_one_directory(tmp_path: Path) -> None:
    def work(number: int) -> None:
        store = Store(tmp_path)
        for seed in range(20):
            for keys, rows in (batch(20, 1000 * number + seed), batch(20, seed)):
                store.put(keys, rows)
                assert store.right(keys, rows) == 20
            store.right(*batch(20, (number + 1) % 8 * 1000 + seed))
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


def test_what_was_flushed_is_there_after_os_exit(tmp_path: Path) -> None:
    def put_and_leave() -> None:
        store = Store(tmp_path)
        store.put(*batch(9, 1))
        store.flush()
        os._exit(0)

    assert succeeded(forked(put_and_leave))
    assert reopened(tmp_path, *batch(9, 1)) == 9


# ---- disks and directories


def test_a_full_disk_is_one_warning_and_writing_resumes_when_there_is_space(tmp_path: Path) -> None:
    def fill() -> None:
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited))
        store = Store(tmp_path)
        for seed in range(10):
            store.put(*batch(64, seed, 200))
        warnings = store.warnings()
        while not warnings:
            warnings = store.warnings()
        assert len(warnings) == 1 and "File too large" in warnings[0], warnings
        assert sum(store.right(*batch(64, seed, 200)) for seed in range(10)) == 640
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        store.flush()
        assert store.stats()[DROPPED] == 0 and store.warnings() == []
        store.close()

    assert succeeded(forked(fill))
    for seed in range(10):
        assert reopened(tmp_path, *batch(64, seed, 200)) == 64


def test_a_directory_that_cannot_be_made_is_a_warning_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")
    keys, rows = batch(5, 1)
    assert store.put(keys, rows) == 5 and store.put(keys, rows) == 5
    store.flush()
    assert store.found(keys) == 0 and store.stats()[DROPPED] == 10
    warnings = store.warnings()
    assert warnings and all("Not a directory" in w and str(tmp_path) in w for w in warnings)
    assert store.warnings() == []
    store.close()


def test_a_deleted_directory_is_made_again_with_one_warning(tmp_path: Path) -> None:
    directory = tmp_path / "store"
    store = Store(directory)
    store.put(*batch(5, 1))
    store.flush()
    shutil.rmtree(directory)
    store.put(*batch(5, 2))
    store.flush()
    assert len(store.warnings()) == 1
    store.put(*batch(5, 1))
    store.close()
    assert reopened(directory, *batch(5, 1)) == reopened(directory, *batch(5, 2)) == 5


def test_a_closed_store_is_empty_and_its_directory_stays_usable(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(*batch(5, 1))
    store.close()
    store.close()
    with pytest.raises(ValueError, match="no open store"):
        store.found(batch(5, 1)[0])


# ---- what only native code can make happen


def test_the_native_tests_pass(tmp_path: Path) -> None:
    """Failing, short and hanging system calls, crowded keys, forks beside threads."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler")
    sources = [ROOT / "tests/native/store_test.cpp", ROOT / "csrc/hash/digest.cpp"]
    sources += [ROOT / "csrc/fork.cpp", *sorted((ROOT / "csrc/store").glob("*.cpp"))]
    program = tmp_path / "store_test"
    flags = ["-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-pthread", "-o", str(program)]
    subprocess.run([compiler, *flags, *map(str, sources), "-lzstd"], check=True)
    subprocess.run([program, tmp_path], check=True)
