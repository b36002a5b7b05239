"""A torchcache_ attribute that somebody sets after the first call takes effect, or is an error: never silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_harness import cache_of
from torch import Tensor, nn

from torchcache import torchcache

X = torch.arange(12.0).view(4, 3)


def class_decorated() -> Any:
    @torchcache()
    class Double(nn.Module):
        torchcache_subsample_count = 5000

        def __init__(self) -> None:
            super().__init__()
            self.torchcache_subsample = False

        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    return Double()


def function() -> Any:
    @torchcache()
    def double(x: Tensor) -> Tensor:
        return x * 2

    return double


MAKERS: list[Callable[[], Any]] = [
    class_decorated,
    function,
    lambda: torchcache()(nn.Identity()),
    lambda: torchcache()(torch.compile(nn.Identity(), backend="eager")),
]
FIXED = {
    "cache_dtype": torch.half,
    "subsample": True,
    "subsample_count": 7,
    "persistent": True,
    "persistent_cache_dir": "somewhere",
    "persistent_module_hash": "name",
    "max_persistent_cache_size": 5,
    "memory_cache_device": "cuda",
    "zstd_compression_level": 5,
    "zstd_compression_threads": 2,
    "use_mmap_on_load": True,
}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", FIXED)
def test_what_the_first_call_fixed_is_an_error_in_every_call_until_it_is_undone(
    name: str, make: Callable[[], Any]
) -> None:
    cached = make()
    right = cached(X)
    before = vars(cached).get(f"torchcache_{name}")
    setattr(cached, f"torchcache_{name}", FIXED[name])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"torchcache_{name} was set to .* after the first call"):
            cached(X)
    if before is None:
        delattr(cached, f"torchcache_{name}")
    else:
        setattr(cached, f"torchcache_{name}", before)
    assert torch.equal(cached(X), right) and cache_of(cached).info().memory_hits == 4


@pytest.mark.parametrize("make", MAKERS)
def test_close_starts_a_cache_with_the_new_options(make: Callable[[], Any], tmp_path: Path) -> None:
    cached = make()
    cached(X)
    cached.torchcache_cache_dtype = torch.half
    cached.torchcache_persistent = True
    cached.torchcache_persistent_cache_dir = tmp_path
    with pytest.raises(ValueError, match="close"):
        cached(X)
    cached.cache_instance.close()
    for _ in range(2):
        assert cached(X).dtype is torch.float32
    cache = cache_of(cached)
    assert cache.options.cache_dtype is torch.half and cache.info().disk_rows == 4
    assert cache.cache_dir is not None and cache.cache_dir.parent == tmp_path


@pytest.mark.parametrize("make", MAKERS)
def test_an_unknown_attribute_is_an_error_that_names_the_nearest_option(make: Callable[[], Any]) -> None:
    cached = make()
    cached(X)
    cached.torchcache_persistant = True
    for _ in range(2):
        with pytest.raises(ValueError, match=r"torchcache_persistant .* did you mean torchcache_persistent\?"):
            cached(X)
    del cached.torchcache_persistant
    cached(X)


def test_an_attribute_of_the_class_that_is_set_later_counts_too() -> None:
    cached = class_decorated()
    cached(X)
    type(cached).torchcache_subsample_count = 6000
    with pytest.raises(ValueError, match="torchcache_subsample_count was set to 6000"):
        cached(X)
    type(cached).torchcache_subsample_count = 5000
    type(cached).torchcache_subsampled = 1
    with pytest.raises(ValueError, match="did you mean torchcache_subsample"):
        cached(X)


@pytest.mark.parametrize("make", MAKERS)
def test_the_size_of_the_memory_takes_effect_at_once(make: Callable[[], Any]) -> None:
    cached = make()
    cached(X)
    cached.torchcache_max_memory_cache_size = 0
    cached(X + 100)
    assert cache_of(cached).info().memory_rows == 4 and cache_of(cached).is_memory_cache_full
    cached.torchcache_max_memory_cache_size = 6 * 12
    cached(X + 100)
    assert cache_of(cached).info().memory_rows == 6
    cached.torchcache_max_memory_cache_size = 10**9
    cached(torch.arange(30000.0).view(10000, 3) + 1000)
    assert cache_of(cached).info().memory_rows == 10006 and not cache_of(cached).is_memory_cache_full
    assert cache_of(cached).options.max_memory_cache_size == 10**9
    assert torch.equal(cached(X), make()(X)) and torch.equal(cached(X + 100), make()(X + 100))


def test_checks_can_be_switched_at_any_time() -> None:
    cached: Any = torchcache(verify=0)(nn.Identity())
    x = torch.arange(3000.0).view(1500, 2)
    cached(x), cached(x)
    assert cache_of(cached).info().checks == 0
    cached.torchcache_verify = 1
    cached(x), cached(x)
    checked = cache_of(cached).info().checks
    assert checked > 0
    cached.torchcache_verify = 0
    cached(x)
    assert cache_of(cached).info().checks == checked


def test_attributes_that_replace_each_other_are_noticed() -> None:
    cached = torchcache()(nn.Identity())
    cached.note = 1  # type: ignore[assignment]
    cached(X)
    del cached.note
    cached.torchcache_persistant = True  # type: ignore[assignment]
    with pytest.raises(ValueError, match="did you mean"):
        cached(X)


def test_a_forward_that_sets_other_attributes_is_no_matter() -> None:
    class Noting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.__dict__[f"note {len(self.__dict__)}"] = 1
            return x + 1

    cached = torchcache()(Noting())
    for offset in range(5):
        assert torch.equal(cached(X + offset), X + offset + 1)
