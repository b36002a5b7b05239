"""The persistent cache as its users see it: directories, limits, processes, exits."""

from __future__ import annotations

import json
import logging
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
from cache_harness import cache_of
from process_harness import run
from store_harness import forked, succeeded
from torch import Tensor, nn

from torchcache import torchcache


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * 2


X = torch.arange(12.0).view(4, 3)


def cached(directory: Path | None, **options: object) -> Double:
    return torchcache(persistent=True, persistent_cache_dir=directory, **options)(Double())  # type: ignore[arg-type]


def directory_of(module: Double) -> Path:
    directory = cache_of(module).cache_dir
    assert directory is not None
    return directory


def test_the_subdirectory_is_named_by_the_module_hash_and_made_by_the_first_call(
    tmp_path: Path,
) -> None:
    module = cached(tmp_path / "a" / "b")
    cache = cache_of(module)
    assert cache.cache_dir == tmp_path / "a" / "b" / cache.module_hash
    assert not (tmp_path / "a").exists()
    module(X)
    meta = json.loads((directory_of(module) / "meta.json").read_text())
    assert meta["module_hash"] == cache.module_hash and meta["class"] == "Double"
    assert len(list(directory_of(module).glob("*.seg"))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zstd_compression": True},
        {"use_mmap_on_load": True},
        {"zstd_compression": True, "zstd_compression_threads": 2},
    ],
)
def test_rows_are_read_back_by_a_new_cache(tmp_path: Path, options: dict[str, object]) -> None:
    cached(tmp_path, **options)(X)
    module = cached(tmp_path, **options)
    assert torch.equal(module(X), X * 2) and module.calls == 0
    info = cache_of(module).info()
    assert (info.disk_hits, info.misses) == (4, 0)
    assert torch.equal(module(X), X * 2)
    assert cache_of(module).info().memory_hits == 4


def test_directory_sizes_and_devices_are_not_in_the_module_hash(tmp_path: Path) -> None:
    one = cached(tmp_path / "a", max_memory_cache_size=1, use_mmap_on_load=True, zstd_compression_threads=3)
    two = cached(tmp_path / "b", max_persistent_cache_size=7)
    assert cache_of(one).module_hash == cache_of(two).module_hash


@pytest.mark.parametrize("option", [{"cache_dtype": torch.half}, {"zstd_compression": True}, {"subsample_count": 5}])
def test_options_that_change_what_is_stored_are_in_the_module_hash(
    option: dict[str, object],
) -> None:
    assert cache_of(cached(None)).module_hash != cache_of(cached(None, **option)).module_hash


def test_a_given_module_hash_overrides_code_arguments_and_weights(tmp_path: Path) -> None:
    class Triple(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 3

    options = {"persistent": True, "persistent_cache_dir": tmp_path, "persistent_module_hash": "mine"}
    one = torchcache(**options)(Double())  # type: ignore[arg-type]
    two = torchcache(**options)(Triple())  # type: ignore[arg-type]
    one(X)
    assert torch.equal(two(X), X * 2)
    assert cache_of(two).module_hash == "mine" and (tmp_path / "mine").is_dir()


def test_the_persistent_limit_counts_bytes_of_files_and_keeps_the_oldest_rows(
    tmp_path: Path,
) -> None:
    limit = 200_000
    module = cached(tmp_path, max_persistent_cache_size=limit)
    x = torch.randn(1000, 100)
    for batch in x.split(50):
        module(batch)
    cache = cache_of(module)
    cache.flush()
    assert cache.is_persistent_cache_full
    on_disk = sum(f.stat().st_size for f in directory_of(module).glob("*.seg"))
    assert 0.8 * limit < on_disk <= cache.persistent_cache_size <= limit
    again = cached(tmp_path)
    again(x)
    rows = cache_of(again).info().disk_hits
    assert 0 < rows < 1000
    first = cached(tmp_path)
    first(x[:rows])
    assert first.calls == 0


def test_max_persistent_cache_size_zero_stores_nothing_on_disk(tmp_path: Path) -> None:
    module = cached(tmp_path, max_persistent_cache_size=0)
    assert torch.equal(module(X), X * 2)
    cache_of(module).flush()
    assert cache_of(module).is_persistent_cache_full
    assert not list(tmp_path.glob("*/*.seg"))


def test_caches_of_one_directory_find_each_others_rows_at_once(tmp_path: Path) -> None:
    one, two = cached(tmp_path), cached(tmp_path)
    two(X)
    one(X + 100), two(X + 100)
    assert two.calls == 1


def test_clear_keeps_the_rows_on_disk_unless_told_otherwise(tmp_path: Path) -> None:
    module, other = cached(tmp_path), cached(tmp_path)
    module(X)
    cache_of(module).clear()
    module(X)
    assert module.calls == 1 and cache_of(module).info().disk_hits == 4
    cache_of(module).clear(persistent=True)
    assert not list(tmp_path.glob("*/*.seg")) and cache_of(module).persistent_cache_size == 0
    module(X)
    assert module.calls == 2
    assert torch.equal(other(X), X * 2) and other.calls == 0


def test_info_counts_rows_that_are_damaged_dropped_and_waiting(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X)
    cache_of(module).flush()
    info = cache_of(module).info()
    assert (info.disk_rows, info.damaged_rows, info.dropped_rows, info.queued_rows) == (4, 0, 0, 0)
    assert info.disk_bytes >= sum(path.stat().st_size for path in tmp_path.glob("*/*.seg"))
    (segment,) = tmp_path.glob("*/*.seg")
    row = (X[2] * 2).numpy().tobytes()
    segment.write_bytes(segment.read_bytes().replace(row, bytes(len(row))))
    again = cached(tmp_path, max_memory_cache_size=0, max_persistent_cache_size=10**9)
    again(X)
    assert again.calls == 1 and cache_of(again).info().damaged_rows == 1
    nowhere = cached(tmp_path / "file")
    (tmp_path / "file").write_text("in the way")
    nowhere(X)
    assert cache_of(nowhere).info().dropped_rows == 4

    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        full = cached(tmp_path / "full")
        full(torch.randn(20, 100))
        assert 18 <= cache_of(full).info().queued_rows <= 20  # each takes 400 bytes

    assert succeeded(forked(on_a_full_disk))


# ---- what can be wrong with a directory


def test_a_directory_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = cached(tmp_path / "later")
    (tmp_path / "later").write_text("a file in its place")
    for i in range(3):
        assert torch.equal(module(X + i), (X + i) * 2)
    cache_of(module).flush()
    said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(said) == 1 and str(tmp_path / "later") in said[0]


def test_a_deleted_directory_is_made_again(tmp_path: Path) -> None:
    module = cached(tmp_path, max_memory_cache_size=0)
    module(X)
    cache_of(module).flush()
    for file in directory_of(module).iterdir():
        file.unlink()
    directory_of(module).rmdir()
    assert torch.equal(module(X), X * 2)
    assert torch.equal(module(X + 1), (X + 1) * 2)
    cache_of(module).flush()
    assert list(directory_of(module).glob("*.seg"))


def test_rows_of_a_class_that_cannot_be_found_are_computed_again_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Pair(NamedTuple):  # local: no name leads to it from a file
        value: Tensor

    class Pairing(Double):
        def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
            self.calls += 1
            return Pair(x * 2)

    decorate = torchcache(persistent=True, persistent_cache_dir=tmp_path)
    first, second = decorate(Pairing()), decorate(Pairing())
    first(X)
    for _ in range(2):
        got = second(X)
        assert type(got) is Pair and torch.equal(got.value, X * 2)
    assert second.calls == 1 and cache_of(second).info().disk_hits == 0
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 1 and "cannot rebuild" in said[0]


# ---- processes


def disk_hits(folder: Path) -> int:
    done = run(folder, "m = cached(sys.argv[1]); m(X); print(m.cache_instance.info().disk_hits)")
    assert done.stderr == ""
    return int(done.stdout)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "raise RuntimeError", "del m"])
def test_a_normal_exit_or_an_exception_writes_what_is_queued(tmp_path: Path, ending: str) -> None:
    run(tmp_path, f"m = cached(sys.argv[1]); m(X)\n{ending}", check=False)
    assert disk_hits(tmp_path) == 4


@pytest.mark.parametrize("ending", ["os._exit(0)", "os.kill(os.getpid(), signal.SIGTERM)", "os.kill(os.getpid(), 9)"])
def test_what_was_flushed_survives_any_death(tmp_path: Path, ending: str) -> None:
    run(tmp_path, f"m = cached(sys.argv[1]); m(X); m.cache_instance.flush()\n{ending}", check=False)
    assert disk_hits(tmp_path) == 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_children_of_multiprocessing_write_what_they_computed(tmp_path: Path, method: str) -> None:
    run(
        tmp_path,
        f"""
        def child(directory):
            cached(directory)(X)

        if __name__ == "__main__":
            p = multiprocessing.get_context({method!r}).Process(target=child, args=(sys.argv[1],))
            p.start(); p.join()
            assert p.exitcode == 0
        """,
    )
    assert disk_hits(tmp_path) == 4


def test_after_a_fork_parent_and_child_are_both_right(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        torch.set_num_threads(1)
        m = cached(sys.argv[1])
        m(X[:2])
        pid = os.fork()
        x = X[2:3] if pid == 0 else X[3:4]
        assert torch.equal(m(X[:2]), X[:2] * 2) and torch.equal(m(x), x * 2)
        if pid:
            assert os.waitpid(pid, 0)[1] == 0
        """,
    )
    assert done.stderr == ""
    assert disk_hits(tmp_path) == 4


def test_data_loader_workers_share_rows_through_the_directory(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        """
        import warnings
        from torch.utils.data import DataLoader, Dataset

        warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than a small machine has cores
        m = cached(sys.argv[1])

        class Rows(Dataset):
            def __len__(self): return 4
            def __getitem__(self, i): return m(X[i:i + 1])[0]

        m(X[:1])
        for _ in range(2):
            for i, row in enumerate(DataLoader(Rows(), batch_size=1, num_workers=2)):
                assert torch.equal(row, X[i:i + 1] * 2)
        """,
    )
    assert done.stderr == ""
    assert disk_hits(tmp_path) == 4


def test_meta_is_written_again_however_often_it_is_deleted(tmp_path: Path) -> None:
    module = cached(tmp_path)
    for turn in range(5):
        if turn == 1:
            (directory_of(module) / "meta.json").unlink()
        elif turn:
            shutil.rmtree(directory_of(module))
        module(torch.full((2, 2), float(turn)))
        cache_of(module).flush()  # makes the directory again, if that was deleted
        module(torch.full((2, 2), float(turn) + 10))
        assert json.loads((directory_of(module) / "meta.json").read_text())["class"] == "Double"


def test_a_clear_that_fails_leaves_the_rows_that_are_left_and_the_cache_in_use(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(torch.ones(2, 2))
    cache_of(module).flush()
    (directory_of(module) / ("a" * 32 + ".seg")).mkdir()
    with pytest.raises(OSError):
        cache_of(module).clear(persistent=True)
    assert torch.equal(module(torch.ones(2, 2) * 3), torch.ones(2, 2) * 6)
    cache_of(module).flush()
    assert cache_of(module).explain(torch.ones(2, 2) * 3).in_memory == 2 and cache_of(module).info().disk_rows >= 1


def test_a_clear_that_is_interrupted_anywhere_leaves_the_cache_in_use(tmp_path: Path) -> None:
    lines, done = 0, False
    while not done:
        lines += 1
        module = cached(tmp_path / str(lines))
        module(torch.ones(2, 2))
        cache_of(module).flush()
        done = not interrupted(lambda: cache_of(module).clear(persistent=True), lines)  # noqa: B023
        for factor in (3, 4, 3):
            assert torch.equal(module(torch.ones(2, 2) * factor), torch.ones(2, 2) * factor * 2)
        cache_of(module).flush()
        info = cache_of(module).info()
        assert info.memory_rows >= 2 and info.disk_rows >= 2 and (info.dropped_rows, info.bypassed_calls) == (0, 0)
        cache_of(module).clear(persistent=True)
        assert list(directory_of(module).glob("*.seg")) == [] and cache_of(module).info().disk_rows == 0
        assert torch.equal(module(torch.ones(2, 2)), torch.ones(2, 2) * 2)
    assert lines > 20


def interrupted(function: Callable[[], object], line: int) -> bool:
    """Runs a function, with a KeyboardInterrupt at this line of torchcache's; whether there was one."""
    left = line

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if "torchcache" not in frame.f_globals.get("__name__", ""):
            return None
        left -= event == "line"
        if left == 0 and event == "line":
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        function()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_clear_removes_what_it_may(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(torch.ones(2, 2))
    cache_of(module).flush()
    for name in ("0", "f"):
        (directory_of(module) / (name * 32 + ".seg")).mkdir()
    with pytest.raises(OSError):
        cache_of(module).clear(persistent=True)
    assert [path.name for path in sorted(directory_of(module).glob("*.seg"))] == ["0" * 32 + ".seg", "f" * 32 + ".seg"]
