"""What the world does to a store: one test for each fault (damaged files: test_damage.py, system calls: native/)."""

from __future__ import annotations

import fcntl
import itertools
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_harness import DAMAGED, DROPPED, Store, batch, files, forked, reopened, succeeded, write

from torchcache import errors
from torchcache.cli import maintenance

KILLS = int(os.environ.get("TORCHCACHE_KILLS", "100"))  # 1000 for the slow part
NOBODY = 65534
ROOT = Path(__file__).resolve().parents[2]


def first_warnings(store: Store) -> list[str]:
    """Those of the writer's thread, which come when it has tried."""
    while not (warnings := store.warnings()):
        os.sched_yield()
    return warnings


# ---- death


@pytest.mark.slow
def test_rows_flushed_before_a_kill_9_at_any_moment_are_found_again(tmp_path: Path) -> None:
    for number in range(KILLS):
        directory = tmp_path / str(number)
        reading, writing = os.pipe()

        def put_for_ever(directory: Path = directory, writing: int = writing) -> None:
            store = Store(directory)
            for seed in itertools.count():
                store.put(*batch(16, seed, 200))
                if seed % 3 == 0:
                    store.flush()
                    os.write(writing, b"%10d" % seed)

        pid = forked(put_for_ever)
        for _ in range(1 + number % 10):
            flushed = int(os.read(reading, 10))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
        store = Store(directory)
        assert all(store.right(*batch(16, seed, 200)) == 16 for seed in range(flushed + 1))
        assert store.warnings() == [] and store.stats()[DAMAGED] == 0
        store.close()
        shutil.rmtree(directory)


def test_what_was_flushed_is_there_after_os_exit(tmp_path: Path) -> None:
    def put_and_leave() -> None:
        store = Store(tmp_path)
        store.put(*batch(9, 1))
        store.flush()
        os._exit(0)

    assert succeeded(forked(put_and_leave))
    assert reopened(tmp_path, *batch(9, 1)) == 9


def test_an_index_that_a_kill_left_unfinished_is_removed_but_not_one_that_is_being_written(tmp_path: Path) -> None:
    left, written = tmp_path / f"{1:032x}.tmp", tmp_path / f"{2:032x}.tmp"
    left.write_bytes(b"half")
    with written.open("wb") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        write(tmp_path, batch(5, 1))
    assert not left.exists() and written.exists()
    assert reopened(tmp_path, *batch(5, 1)) == 5


# ---- disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("file systems cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.root
def test_a_full_disk_is_one_warning_and_writing_resumes_when_there_is_space(disk: Path) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(700_000))
    store = Store(disk / "store")
    for seed in range(10):
        store.put(*batch(64, seed, 200))
    (warning,) = first_warnings(store)
    assert "No space left on device" in warning and str(disk / "store") in warning
    assert sum(store.right(*batch(64, seed, 200)) for seed in range(10)) == 640
    filler.unlink()
    store.flush()
    assert store.warnings() == [] and store.stats()[DROPPED] == 0
    store.close()
    assert all(reopened(disk / "store", *batch(64, seed, 200)) == 64 for seed in range(10))


@pytest.mark.root
def test_a_compaction_on_a_full_disk_is_an_error_that_costs_no_row(disk: Path) -> None:
    for seed in range(2):
        write(disk / "store", batch(400, seed, 200))
    with pytest.raises(errors.MaintenanceError, match=r"cannot write to .*: No space left on device"):
        maintenance.compact(disk / "store")
    assert all(reopened(disk / "store", *batch(400, seed, 200)) == 400 for seed in range(2))
    assert sorted(path.suffix for path in (disk / "store").iterdir()) == [".idx", ".idx", ".seg", ".seg"]


def test_a_file_size_limit_is_one_warning_and_writing_resumes_when_it_is_lifted(tmp_path: Path) -> None:
    def fill() -> None:
        unlimited = resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, unlimited))
        store = Store(tmp_path)
        for seed in range(10):
            store.put(*batch(64, seed, 200))
        (warning,) = first_warnings(store)
        assert "File too large" in warning
        assert sum(store.right(*batch(64, seed, 200)) for seed in range(10)) == 640
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        store.flush()
        assert store.stats()[DROPPED] == 0 and store.warnings() == []
        store.close()

    assert succeeded(forked(fill))
    assert all(reopened(tmp_path, *batch(64, seed, 200)) == 64 for seed in range(10))


@pytest.mark.root
def test_a_read_only_file_system_is_read_and_one_warning_says_that_nothing_is_kept(disk: Path) -> None:
    write(disk, batch(50, 1))
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    store = Store(disk)
    assert store.right(*batch(50, 1)) == 50
    assert store.put(*batch(50, 2)) == 50 and store.put(*batch(50, 3)) == 50
    store.flush()
    (warning,) = store.warnings()
    assert "Read-only file system" in warning and str(disk) in warning
    assert store.right(*batch(50, 1)) == 50 and store.stats()[DROPPED] == 100
    store.close()


def test_a_directory_without_write_permission_is_read_and_one_warning_names_it() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(directory, batch(50, 1))
        directory.chmod(0o555)

        def use() -> None:
            if os.geteuid() == 0:
                os.setresuid(NOBODY, NOBODY, NOBODY)
            store = Store(directory)
            assert store.right(*batch(50, 1)) == 50
            assert store.put(*batch(50, 2)) == 50
            store.flush()
            (warning,) = store.warnings()
            assert "Permission denied" in warning and name in warning
            assert store.right(*batch(50, 1)) == 50 and store.found(batch(50, 2)[0]) == 0
            store.close()

        assert succeeded(forked(use))
        directory.chmod(0o755)


@pytest.mark.root
def test_a_directory_without_read_permission_is_an_empty_store_and_a_warning() -> None:
    with tempfile.TemporaryDirectory() as name:
        write(Path(name), batch(50, 1))
        Path(name).chmod(0o700)

        def use() -> None:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            store = Store(Path(name))
            assert store.found(batch(50, 1)[0]) == 0 and store.put(*batch(50, 2)) == 50
            store.flush()
            warnings = store.warnings()
            assert warnings and all("Permission denied" in w and name in w for w in warnings)
            store.close()

        assert succeeded(forked(use))
        assert reopened(Path(name), *batch(50, 1)) == 50


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


# ---- the process, the clock and the machine


@pytest.mark.parametrize("mmap", [False, True], ids=["pread", "mmap"])
def test_without_file_descriptors_rows_are_misses_and_come_back_with_them(tmp_path: Path, mmap: bool) -> None:
    for seed in range(3):
        write(tmp_path, batch(9, seed))

    def use() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        early = Store(tmp_path, mmap=mmap)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        late = Store(tmp_path, mmap=mmap)
        for seed in range(3):
            early.right(*batch(9, seed))
            assert late.found(batch(9, seed)[0]) == 0
        assert late.put(*batch(9, 5)) == 9
        late.flush()
        warnings = late.warnings()
        assert warnings and all("Too many open files" in w and str(tmp_path) in w for w in warnings)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for store in (early, late):
            for seed in range(3):
                while store.found(batch(9, seed)[0]) < 9:
                    os.sched_yield()  # the directory is looked at every quarter of a second
                assert store.right(*batch(9, seed)) == 9
            assert store.stats()[DAMAGED] == 0
            store.close()

    assert succeeded(forked(use))


@pytest.mark.parametrize("moment", [0, 2**32], ids=["1970", "2106"])
def test_file_times_of_any_clock_change_nothing(tmp_path: Path, moment: int) -> None:
    store = Store(tmp_path)
    write(tmp_path, batch(9, 1))
    for path in (*files(tmp_path, "seg"), *files(tmp_path, "idx"), tmp_path):
        os.utime(path, (moment, moment))
    while store.found(batch(9, 1)[0]) < 9:
        os.sched_yield()
    assert store.right(*batch(9, 1)) == reopened(tmp_path, *batch(9, 1)) == 9
    store.close()


def test_a_big_endian_machine_is_refused_when_the_store_is_compiled() -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not (ROOT / "csrc").is_dir():
        pytest.skip("no C++ compiler")
    swapped = ["-U__BYTE_ORDER__", "-D__BYTE_ORDER__=__ORDER_BIG_ENDIAN__"]
    source = ROOT / "csrc" / "store" / "format" / "format.cpp"
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", *swapped, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "torchcache needs a little-endian machine" in done.stderr
