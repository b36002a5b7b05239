"""``torchcache.verify`` compares stored rows with what a module computes, and changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from cache_harness import cache_of

from torchcache import torchcache, verify

DATA = torch.randn(20, 4)


def linear(directory: Path | None = None) -> Any:
    options: dict[str, Any] = {"persistent_cache_dir": directory, "persistent_module_hash": "linear"}
    decorate = torchcache() if directory is None else torchcache(persistent=True, **options)
    return decorate(nn.Linear(4, 3).requires_grad_(False))


def test_the_rows_of_the_cache_itself_are_compared_in_memory_and_on_disk(tmp_path: Path) -> None:
    for module in (linear(), linear(tmp_path)):
        module(DATA[:12])
        before = cache_of(module).info()
        found = verify(module, zip(DATA.split(8), range(3)))
        assert (found.rows, found.found, found.wrong) == (20, 12, []) and found.largest_error < 1e-6
        assert cache_of(module).info()._replace(disk_bytes=0, queued_rows=0, tiers={}) == before._replace(
            disk_bytes=0, queued_rows=0, tiers={}
        )


@pytest.mark.parametrize("folder", ["", "linear"])
def test_rows_of_another_network_are_named(tmp_path: Path, folder: str) -> None:
    linear(tmp_path)(DATA)
    other = linear(tmp_path)
    cache_of(other).flush()
    found = verify(other, DATA.split(8), tmp_path / folder)
    keys = cache_of(other).keys(DATA).tolist()
    assert found.found == 20 and found.largest_error > 0.01
    assert found.wrong == [f"{high % 2**64:016x}{low % 2**64:016x}" for low, high in keys]


def test_one_wrong_row_among_right_ones_is_named(tmp_path: Path) -> None:
    module = linear(tmp_path)
    module(DATA[:10])
    with torch.no_grad():
        module.weight.add_(1)
    module(DATA[10:11])  # a given hash covers the new weights, too
    assert len(verify(module, [DATA[:11]], tmp_path).wrong) == 10
    with torch.no_grad():
        module.weight.sub_(1)
    assert len(verify(module, [DATA[:11]], tmp_path).wrong) == 1


def test_a_module_without_a_cache_and_a_missing_directory_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no cache"):
        verify(nn.Linear(4, 3), [DATA])
    with pytest.raises(ValueError, match=r"there is no directory .*missing"):
        verify(linear(), [DATA], tmp_path / "missing")
