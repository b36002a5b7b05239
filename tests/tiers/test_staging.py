"""Rows that are copied from a GPU are written late and never missed. A fake copy stands in, so no GPU is needed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache
from torchcache.engine.cache import Cache
from torchcache.tiers import staging

X = torch.arange(12.0).reshape(6, 2)


class SlowCopy:
    """Arrives when somebody waits for it, and no earlier."""

    waiting = 0

    def __init__(self, leaves: list[Tensor]) -> None:
        self.leaves = [t.clone() for t in leaves]
        self.bytes = sum(t.nbytes for t in leaves)
        SlowCopy.waiting += 1

    def wait(self) -> list[Tensor]:
        SlowCopy.waiting -= 1
        return self.leaves


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return x * 2


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    SlowCopy.waiting = 0
    monkeypatch.setattr(staging, "HostCopy", SlowCopy)
    monkeypatch.setattr(staging, "is_needed", lambda leaves: True)


def cached(directory: Path, **options: Any) -> Backbone:
    return torchcache(persistent=True, persistent_cache_dir=str(directory), **options)(Backbone())


def test_a_call_does_not_wait_for_the_rows_of_its_misses(tmp_path: Path) -> None:
    module = cached(tmp_path)
    assert torch.equal(module(X), X * 2)
    assert SlowCopy.waiting == 1


def test_the_next_call_finds_them_in_whatever_batch(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X[:3])
    assert torch.equal(module(X.flip(0)), X.flip(0) * 2)  # half of it is in memory now
    assert torch.equal(module(X.repeat(2, 1)), X.repeat(2, 1) * 2)
    assert module.rows == len(X)


def test_editing_an_output_does_not_reach_rows_on_their_way(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X).zero_()
    assert torch.equal(module(X), X * 2)


LOOKS: dict[str, Callable[[Cache], bool]] = {
    "info": lambda c: c.info().memory_rows == len(X) and c.info().disk_rows == len(X),
    "cache": lambda c: len(c.cache) == len(X),
    "memory_cache_size": lambda c: c.memory_cache_size == X.nbytes,
    "persistent_cache_size": lambda c: c.persistent_cache_size >= X.nbytes,
    "explain": lambda c: c.explain(X).in_memory == len(X),
    "tiers": lambda c: not len(c.tiers().missing(c.keys(X))),
}


@pytest.mark.parametrize("look", LOOKS)
def test_every_reader_gets_queued_rows(look: str, tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X)
    assert LOOKS[look](cache_of(module))


def test_limits_are_reached_by_rows_on_their_way(tmp_path: Path) -> None:
    module = cached(tmp_path, max_memory_cache_size=8, max_persistent_cache_size=1)
    module(X)
    assert cache_of(module).is_memory_cache_full
    module(X)
    assert cache_of(module).is_persistent_cache_full


def test_another_cache_of_the_directory_finds_them(tmp_path: Path) -> None:
    first, second = cached(tmp_path), cached(tmp_path)
    first(X)
    assert torch.equal(second(X), X * 2) and second.rows == 0


@pytest.mark.parametrize("how", ["flush", "close"])
def test_what_is_flushed_or_closed_is_on_disk(how: str, tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X)
    getattr(module.cache_instance, how)()
    script = f"""
import torch
from torchcache.cached_rows import CachedRows
from torchcache.tiers.disk import DiskTier
from torchcache.options import Options
from pathlib import Path
directory = {str(cache_of(module).cache_dir)!r}
print(DiskTier(Path(directory), Options(persistent=True)).stats().rows)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(len(X))


def test_clear_forgets_rows_on_their_way_too(tmp_path: Path) -> None:
    module = cached(tmp_path)
    module(X)
    cache_of(module).clear(persistent=True)
    assert cache_of(module).info().memory_rows == 0
    module(X)
    assert module.rows == 2 * len(X)


def test_rows_are_written_at_once_if_no_copy_can_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(leaves: list[Tensor]) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(staging, "HostCopy", fail)
    module = cached(tmp_path)
    module(X)
    assert torch.equal(module(X), X * 2) and module.rows == len(X)


def test_not_more_than_the_limit_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_MAX_QUEUED_BYTES", X.nbytes)
    for i in range(5):
        staging.enqueue([X + i], [lambda on_host: None])
        assert SlowCopy.waiting <= 1
    staging.drain()


def test_threads_find_the_rows_of_each_other(tmp_path: Path) -> None:
    module = cached(tmp_path)
    wrong: list[Tensor] = []

    def work(number: int) -> None:
        for step in range(20):
            x = torch.full((4, 2), float((number + step) % 7))
            if not torch.equal(module(x), x * 2):
                wrong.append(x)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))  # raises what a thread raised
    computed = module.rows
    for number in range(7):
        module(torch.full((4, 2), float(number)))
    assert not wrong and module.rows == computed


@pytest.mark.parametrize("leave", ["", "module(X); os.fork() or os._exit(0); os.wait()"])
def test_rows_on_their_way_are_on_disk_after_a_normal_exit(leave: str, tmp_path: Path) -> None:
    script = f"""
import os
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1] / "harness")!r}]
from test_staging import Backbone, SlowCopy, X, cached, staging
staging.HostCopy, staging.is_needed = SlowCopy, lambda leaves: True
module = cached({str(tmp_path)!r})
{leave or "module(X)"}
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ})
    module = cached(tmp_path)
    module(X)
    assert module.rows == 0
